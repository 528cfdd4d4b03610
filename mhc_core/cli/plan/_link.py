"""The speed of the link between the devices that JAX has here."""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any

__all__ = ["measure"]

NUMBERS = 1 << 24  # float32 on each device, 64 MiB
REPEATS = 5


def measure() -> tuple[str | None, float]:
    """Return why it cannot be measured, or None, and the GB/s that a device sends.

    A ring all-reduce of S bytes over D devices sends 2 (D - 1) / D x S from each.
    """
    if find_spec("jax") is None:
        return "needs JAX: pip install jax", 0.0
    jax: Any = import_module("jax")
    sharding: Any = import_module("jax.sharding")
    count = jax.device_count()
    if count < 2:
        return f"needs two devices, JAX has {count} here: give GB/s", 0.0
    mesh = jax.make_mesh((count,), ("d",), axis_types=(sharding.AxisType.Auto,))
    spec = sharding.PartitionSpec("d")
    place = sharding.NamedSharding(mesh, spec)

    def drawn() -> Any:
        return jax.random.normal(jax.random.key(0), (count, NUMBERS), "float32")

    numbers = jax.jit(drawn, out_shardings=place)()

    def summed(part: Any) -> Any:
        return jax.lax.psum(part, "d")

    add = jax.jit(
        jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=sharding.PartitionSpec())
    )
    jax.block_until_ready(add(numbers))
    turns: list[float] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(add(numbers))
        turns.append(time.perf_counter() - began)
    return None, 2 * (count - 1) / count * 4 * NUMBERS / median(turns) / 1e9
