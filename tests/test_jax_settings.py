"""JAX at its own defaults and at its strictest: shard_map, Explicit meshes, promotions.

Everything runs in one process of its own with two host devices, which JAX must be told of before
it starts; what that process finds is held here, a test for each setting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed")
# JAX raises for axes and promotions while it traces: where a setting differs from another in these
# alone, it is traced and not run.
TRACED = ("explicit, batch", "strict promotions")
SETTINGS = ("shard_map", "explicit, sequence", *TRACED)
DEVICES = 2


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """Return, by setting and then by call, how far results are from unsharded ones, or an error."""
    # most of the time is XLA's, whose optimisations are not what is tested
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("setting", SETTINGS)
def test_forwards_and_gradients_are_those_of_one_device(
    setting: str, found: dict[str, dict[str, Any]]
) -> None:
    results = found[setting]
    assert set(results) >= {"pre", "combine_pre", "combine_pre, shared", "sinkhorn_knopp"}
    wrong = {call: result for call, result in results.items() if result != "right"}
    assert not wrong


# ---- inside the process with several devices -----------------------------------------------------


def _calls() -> dict[str, tuple[Callable[..., Any], list[np.ndarray[Any, Any]], list[int]]]:
    """Return, by name, a function of arrays, the arrays, and which of them have tokens."""
    import mhc_core as mhc
    from mhc_conformance.cases import SMALL, Case, data, declaration
    from mhc_core.math import OPS

    statics: dict[str, dict[str, Any]] = {
        **dict.fromkeys(("mappings", "pre", "combine_pre", "head"), {"variant": mhc.DEEPSEEK_V4}),
        "sinkhorn": {"iterations": 3, "eps": 0.0, "first": "rows"},
        "expand": {"n": 4},
        "contract": {"how": "mean"},
        "rms_norm": {"eps": 1e-5},
        "static_layer": {"eps": 1e-5, "iterations": 3},
        "static_mappings": {"iterations": 3},
        "sinkhorn_knopp": {"max_iterations": 3, "epsilon": 0.0, "log_space": True},
    }
    sizes = SMALL._replace(leading=(DEVICES, 2 * DEVICES))
    calls: dict[str, Any] = {}
    for op in OPS:
        patterns = declaration(op).patterns
        for shared in (False, True) if any(len(p) > 1 for p in patterns.values()) else (False,):
            static = statics.get(op, {})
            case = Case(op, "sharded", sizes, tuple(static.items()), shared=shared)
            arrays = list(data(case, "float32", 0).primals)
            tokens = [k for k, array in enumerate(arrays) if array.shape[:2] == sizes.leading]
            function = _bound(getattr(mhc, op), static)
            calls[f"{op}, shared" if shared else op] = (function, arrays, tokens)
    return calls


def _bound(op: Callable[..., Any], static: dict[str, Any]) -> Callable[..., Any]:
    return lambda *arrays: op(*arrays, **static)


def _loss(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sum whose gradient depends on every number."""
    import jax
    import jax.numpy as jnp

    def loss(*arrays: Any) -> Any:
        with jax.numpy_rank_promotion("allow"):
            return sum(jnp.sum(jnp.sin(out) * out) for out in jax.tree.leaves(function(*arrays)))

    return loss


def _jitted(function: Callable[..., Any], *arrays: Any) -> Any:
    import jax

    return jax.jit(function)(*arrays)


def _main() -> None:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    def apart(wanted: Any, got: Any) -> str:
        worst = 0.0
        for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(got), strict=True):
            if a.shape != b.shape:
                return f"shape {b.shape} for {a.shape}"
            if isinstance(b, jax.ShapeDtypeStruct):
                continue
            a, b = np.asarray(a), np.asarray(b)
            worst = max(worst, float(np.abs(a - b).max() / (1e-6 + np.abs(a).max())))
        return "right" if worst < 2e-5 else f"apart by {worst:.2g}"

    def tried(run: Callable[[], Any], wanted: Any) -> str:
        try:
            return apart(wanted, run())
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"

    results: dict[str, dict[str, str]] = {setting: {} for setting in SETTINGS}
    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    for name, (function, arrays, tokens) in _calls().items():
        loss = _loss(function)
        graded = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))
        wanted = jax.jit(graded)(*arrays)

        def specs(spec: Any, arrays: Any = arrays, tokens: Any = tokens) -> tuple[Any, ...]:
            return tuple(spec if k in tokens else P() for k in range(len(arrays)))

        def mapped(*local: Any, loss: Any = loss) -> Any:
            return jax.lax.psum(loss(*local), "data")

        if tokens:  # what no token has is on every device
            sharded = jax.shard_map(
                mapped, mesh=manual, in_specs=specs(P("data")), out_specs=P()
            )
            both = jax.value_and_grad(sharded, argnums=tuple(range(len(arrays))))
            results["shard_map"][name] = tried(lambda: jax.jit(both)(*arrays), wanted)
        for label, spec in (("batch", P("data")), ("sequence", P(None, "data"))):
            put = [
                jax.device_put(array, NamedSharding(explicit, own))
                for array, own in zip(arrays, specs(spec), strict=True)
            ]
            run = jax.eval_shape if f"explicit, {label}" in TRACED else _jitted
            results[f"explicit, {label}"][name] = tried(lambda: run(graded, *put), wanted)
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            results["strict promotions"][name] = tried(
                lambda: jax.eval_shape(graded, *arrays), wanted
            )
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
