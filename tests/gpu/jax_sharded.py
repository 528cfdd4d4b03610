"""Run a sublayer of jax-cuda on one GPU and on all of the host: python tests/gpu/jax_sharded.py

Needs two NVIDIA GPUs or more. Prints, for sharded tokens and for sharded channels, the collectives
of the compiled forward and backward with their bytes, the largest distance of its gradients from
those of one GPU, and the time of a step on one GPU and on all. Tokens are measured twice: all
devices share one GPU's tokens, and each has as many.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_sharded import collectives, one_sublayer, summed

import mhc_core as mhc

N = 4


def arrays_of(T: int, C: int) -> tuple[Any, ...]:
    """Return streams [T, n, C] in bfloat16, and the parameters."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(T, N, C)), jnp.bfloat16)
    m = mhc.DEEPSEEK_V4.columns(N)
    phi = jnp.asarray(rng.normal(size=(m, N * C)) / 64, jnp.float32)
    return x, phi, jnp.ones(3), jnp.zeros(m)


def milliseconds(step: Callable[..., Any], given: Any, rounds: int = 9, calls: int = 10) -> float:
    """Return the median time of a step, with some under way."""
    jax.block_until_ready(step(*given))
    found: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            made = step(*given)
        jax.block_until_ready(made)
        found.append((time.perf_counter() - begin) / calls * 1e3)
    return statistics.median(found)


def distance(a: Any, b: Any) -> float:
    """Return the largest distance of gradients, each over its own largest number."""
    pairs = [
        (np.asarray(one, np.float32), np.asarray(other, np.float32))
        for one, other in zip(a, b, strict=True)
    ]
    return max(float(np.abs(one - other).max() / np.abs(one).max()) for one, other in pairs)


def main() -> None:
    """Print a line for each layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, default=4096)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--backend", default="jax-cuda")
    asked = parser.parse_args()
    devices = jax.device_count()
    print(
        f"jax {jax.__version__}, {devices} x {jax.devices()[0].device_kind}, T={asked.T}, n={N}, "
        f"C={asked.C}, bfloat16, backend {asked.backend}",
        flush=True,
    )
    every = tuple(range(4))
    step: Any = jax.jit(jax.value_and_grad(summed(one_sublayer), argnums=every))
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    layouts = {
        "tokens, shared": (P("d"), 1),
        "tokens, as many on each": (P("d"), devices),
        "channels, shared": (P(None, None, "d"), 1),
    }
    with mhc.use_backend(asked.backend):
        alone = arrays_of(asked.T, asked.C)
        own = milliseconds(step, alone)
        print(f"one GPU: {own:.3f} ms", flush=True)
        for name, (spec, times) in layouts.items():
            arrays = arrays_of(asked.T * times, asked.C)
            specs = (spec, P(), P(), P())
            given = [
                jax.device_put(array, NamedSharding(mesh, one))
                for array, one in zip(arrays, specs, strict=True)
            ]
            compiled = step.lower(*given).compile()
            found = collectives(compiled.as_text())
            error = distance(step(*arrays)[1], compiled(*given)[1])
            took = milliseconds(compiled, given)
            efficiency = own * times / devices / took
            print(
                f"{name}: {took:.3f} ms, efficiency {efficiency:.2f}, distance {error:.1e}, "
                f"collectives {', '.join(f'{kind} {size}' for kind, size in found)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
