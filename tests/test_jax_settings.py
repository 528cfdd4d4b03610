"""JAX at its own defaults and at its strictest: shard_map, Explicit meshes, promotions, rounding.

Calls that need two devices run in one process of their own, since JAX must be told of them before
it starts; the tests here check that process's results, one test for each setting.
"""

from __future__ import annotations

import functools
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
    both = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "XLA_FLAGS": both, "JAX_PLATFORMS": "cpu"},
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


def test_narrowing_is_a_rounding_that_xla_must_keep() -> None:
    """Check x' in combine_pre: it goes to bfloat16 and back, and XLA drops such casts on GPUs."""
    import jax
    import jax.numpy as jnp

    import mhc_core as mhc

    n, C = 2, 4
    x, y = jnp.ones((3, n, C), jnp.bfloat16), jnp.ones((3, C), jnp.bfloat16)
    phi, scale, bias = jnp.ones((8, n * C)), jnp.ones(3), jnp.ones(8)
    lowered = jax.jit(mhc.combine_pre, static_argnums=7).lower(
        x, y, jnp.ones((3, n)), jnp.ones((3, n, n)), phi, scale, bias, mhc.PAPER
    )
    assert "reduce_precision" in lowered.as_text()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_that_rounding_is_the_cast(dtype: str) -> None:
    import jax
    import jax.numpy as jnp
    from array_api_compat import array_namespace

    from mhc_core.math import _xp

    rng = np.random.default_rng(0)
    edges = [0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, 2.0**-14, 2.0**-25, 1.001 * 2.0**-25]
    values = rng.normal(size=4000) * 10.0 ** rng.uniform(-9, 6, 4000)
    numbers = jnp.asarray(np.append(values, edges), jnp.float32)
    like = jnp.zeros(1, dtype)
    xp = array_namespace(like)
    rounded = jax.jit(lambda x: _xp.as_dtype_of(xp, x, like))(numbers)
    np.testing.assert_array_equal(
        np.asarray(rounded).view(np.uint16), np.asarray(numbers.astype(dtype)).view(np.uint16)
    )
    slope = jax.grad(lambda x: jnp.sum(_xp.as_dtype_of(xp, x, like).astype(jnp.float32)))(numbers)
    assert (np.asarray(slope) == 1).all()


def test_forward_mode_is_refused_with_the_way_out() -> None:
    import jax
    import jax.numpy as jnp

    import mhc_core as mhc

    x, h_pre = jnp.ones((3, 2, 4)), jnp.ones(2)

    def run() -> Any:
        return jax.jvp(lambda h: mhc.aggregate(x, h), (h_pre,), (h_pre,))[1]

    with pytest.raises(TypeError, match=r"aggregate: JAX has no forward mode.*no_grad"):
        run()
    with mhc.no_grad():
        np.testing.assert_allclose(run(), np.full((3, 4), 2.0))


class _Parameter:
    """An object like flax.nnx.Param: no array, but JAX gets one through a method."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __jax_array__(self) -> Any:
        return self.value


def test_parameters_that_become_arrays_are_taken() -> None:
    import jax
    import jax.numpy as jnp

    import mhc_core as mhc

    x = jnp.ones((3, 2, 4))
    right = np.full((3, 4), 2.0)
    np.testing.assert_array_equal(mhc.aggregate(x, _Parameter(jnp.ones(2))), right)
    np.testing.assert_array_equal(
        mhc.aggregate(_Parameter(x), _Parameter(jnp.ones(2)), backend="jax"), right
    )
    jitted = jax.jit(lambda h: mhc.aggregate(x, _Parameter(h)))
    np.testing.assert_array_equal(jitted(jnp.ones(2)), right)
    gradients = mhc.vjp("aggregate", (x, _Parameter(jnp.ones(2))), _Parameter(jnp.ones((3, 4))))
    np.testing.assert_array_equal(gradients[1], np.full(2, 12.0))
    with pytest.raises(TypeError, match="h_pre is a object; needs an array"):
        mhc.aggregate(x, object())


# ---- inside the process with several devices -----------------------------------------------------


def _calls() -> dict[str, tuple[str, dict[str, Any], list[np.ndarray[Any, Any]], list[int]]]:
    """Return, by name, an op, its static arguments, arrays, and which of those have tokens."""
    from mhc_conformance.cases import SMALL, Case, data, declaration
    from mhc_conformance.telling import SECOND
    from mhc_core.math import OPS

    statics = {case.op: case.options for case in SECOND}  # short loops
    sizes = SMALL._replace(leading=(DEVICES, 2 * DEVICES))
    calls: dict[str, Any] = {}
    for op in OPS:
        patterns = declaration(op).patterns
        for shared in (False, True) if any(len(p) > 1 for p in patterns.values()) else (False,):
            static = statics[op]
            case = Case(op, "sharded", sizes, tuple(static.items()), shared=shared)
            arrays = list(data(case, "float32", 0).primals)
            tokens = [k for k, array in enumerate(arrays) if array.shape[:2] == sizes.leading]
            calls[f"{op}, shared" if shared else op] = (op, static, arrays, tokens)
    return calls


def _by_numpy(op: str, static: dict[str, Any], arrays: list[Any]) -> Any:
    """Return the loss and its gradients by the NumPy backend."""
    import mhc_core as mhc

    outputs = getattr(mhc, op)(*arrays, **static)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    slopes = tuple(np.cos(out) * out + np.sin(out) for out in outputs)
    loss = np.float32(sum(np.sum(np.sin(out) * out) for out in outputs))
    return loss, mhc.vjp(op, tuple(arrays), slopes, **static)


def _loss(op: str, static: dict[str, Any]) -> Callable[..., Any]:
    """Return a sum of an op's outputs whose gradient depends on every number."""
    import jax
    import jax.numpy as jnp

    import mhc_core as mhc

    def loss(*arrays: Any) -> Any:
        outputs = jax.tree.leaves(getattr(mhc, op)(*arrays, **static, backend="jax"))
        return sum(jnp.sum(jnp.sin(out) * out) for out in outputs)

    return loss


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

    def tried(wanted: Any, run: Callable[..., Any], *arrays: Any) -> str:
        try:
            return apart(wanted, run(*arrays))
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"

    results: dict[str, dict[str, str]] = {setting: {} for setting in SETTINGS}
    manual = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    explicit = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    for name, (op, static, arrays, tokens) in _calls().items():
        loss = _loss(op, static)
        graded = jax.value_and_grad(loss, argnums=tuple(range(len(arrays))))
        traced = functools.partial(jax.eval_shape, graded)
        wanted = _by_numpy(op, static, arrays)

        def specs(spec: Any, arrays: Any = arrays, tokens: Any = tokens) -> tuple[Any, ...]:
            return tuple(spec if k in tokens else P() for k in range(len(arrays)))

        def mapped(*local: Any, loss: Any = loss) -> Any:
            return jax.lax.psum(loss(*local), "data")

        if tokens:  # what no token has is on every device
            sharded = jax.shard_map(mapped, mesh=manual, in_specs=specs(P("data")), out_specs=P())
            both = jax.value_and_grad(sharded, argnums=tuple(range(len(arrays))))
            results["shard_map"][name] = tried(wanted, jax.jit(both), *arrays)
        for label, spec in (("batch", P("data")), ("sequence", P(None, "data"))):
            put = [
                jax.device_put(array, NamedSharding(explicit, own))
                for array, own in zip(arrays, specs(spec), strict=True)
            ]
            run = traced if f"explicit, {label}" in TRACED else jax.jit(graded)
            results[f"explicit, {label}"][name] = tried(wanted, run, *put)
        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            results["strict promotions"][name] = tried(wanted, traced, *arrays)
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
