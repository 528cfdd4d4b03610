"""The libraries' own transformations of ops, two and three deep, against the oracle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_conformance import Subject, oracle
from mhc_conformance.cases import Case, Sizes, cases, data
from mhc_core import math

Array = NDArray[Any]
Function = Callable[..., Any]
LIBRARIES = ("jax", "mlx-compiled")

TOKENS = Sizes((3,), 2, 4, "one leading axis, to map over")
VARIANT = replace(mhc.DEEPSEEK_V4, sinkhorn_iterations=3, sinkhorn_eps=0.01)
CASES = {
    "combine": Case("combine", "per token", TOKENS),
    "combine, shared": Case("combine", "one for all", TOKENS, shared=True),
    "mappings": Case("mappings", "eps", TOKENS, (("variant", VARIANT),)),
    "static_layer": Case("static_layer", "raw", TOKENS, (("eps", 0.1), ("iterations", 2))),
}


def _tuple(arrays: Any) -> tuple[Any, ...]:
    return tuple(arrays) if isinstance(arrays, (tuple, list)) else (arrays,)


class _Trial:
    """One case in one library, with the transformations that its backend declares."""

    def __init__(self, library: str, case: Case) -> None:
        self.subject = Subject(library)
        self.case = case
        self.primals, self.cotangents = data(case, "float32", 0)
        self.own = self.subject.take(self.primals)
        self.function = self.subject.function(case.op, case.options)
        patterns = math.load(case.op).OP.patterns
        ranks = [len(words[-1 if case.shared else 0]) for words in patterns.values()]
        ahead = [words[-1 if case.shared else 0][0] == "..." for words in patterns.values()]
        leading = [a.ndim == rank for a, rank in zip(self.primals, ranks, strict=False)]
        self.axes = [0 if both else None for both in map(all, zip(ahead, leading, strict=False))]

    def loss(self, function: Function, cotangents: Sequence[Any] | None = None) -> Function:
        given = self.subject.take(self.cotangents) if cotangents is None else cotangents

        def loss(*primals: Any) -> Any:
            outputs = _tuple(function(*primals))
            return sum((c * o).sum() for c, o in zip(given, outputs, strict=True))

        return loss

    def grad(self, loss: Function) -> Function:
        return self.subject.transform("grad")(loss, range(len(self.own)))

    def compile(self, function: Function) -> Function:
        return self.subject.transform("compile")(function)

    def checkpoint(self, function: Function) -> Function:
        return self.subject.transform("checkpoint")(function)

    def vmap(self, function: Function, axes: Sequence[int | None]) -> Function:
        return self.subject.transform("vmap")(function, axes)

    def check(self, got: Any) -> None:
        """Hold gradients against the oracle's, none of which is zero."""
        want = oracle.gradients(self.case.op, self.primals, self.cotangents, **self.case.options)
        for one, other in zip(self.subject.give(got), want, strict=True):
            scale = np.abs(other).max()
            assert scale > 1e-3
            assert one.shape == other.shape
            assert np.abs(one - other).max() < 1e-4 * scale


def _vmap_of_grad(trial: _Trial) -> Any:
    count = len(trial.own)

    def one_token(*both: Any) -> Any:
        return trial.grad(trial.loss(trial.function, both[count:]))(*both[:count])

    cotangents = trial.subject.take(trial.cotangents)
    axes = [*trial.axes, *[0] * len(cotangents)]
    each = trial.vmap(one_token, axes)(*trial.own, *cotangents)
    pairs = zip(_tuple(each), trial.axes, strict=True)
    return tuple(d if axis == 0 else d.sum(0) for d, axis in pairs)


COMPOSITIONS: dict[str, Callable[[_Trial], Any]] = {
    "vmap of grad": _vmap_of_grad,
    "grad of vmap": lambda t: t.grad(t.loss(t.vmap(t.function, t.axes)))(*t.own),
    "grad of compile": lambda t: t.grad(t.loss(t.compile(t.function)))(*t.own),
    "compile of grad of checkpoint": lambda t: t.compile(t.grad(t.loss(t.checkpoint(t.function))))(
        *t.own
    ),
    "grad of checkpoint of vmap": lambda t: t.grad(
        t.loss(t.checkpoint(t.vmap(t.function, t.axes)))
    )(*t.own),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_transformations_compose(library: str, case: str, name: str) -> None:
    trial = _Trial(library, CASES[case])
    trial.check(COMPOSITIONS[name](trial))


@pytest.mark.parametrize("op", math.OPS)
def test_mlx_gives_a_gradient_to_every_argument(op: str) -> None:
    trial = _Trial("mlx-compiled", next(cases(op)))
    trial.check(trial.grad(trial.loss(trial.function))(*trial.own))


# --- second derivatives -----------------------------------------------------------------------

TWICE = {
    "sinkhorn, eps 0": Case(
        "sinkhorn", "log", TOKENS, (("iterations", 3), ("eps", 0.0), ("first", "rows"))
    ),
    "sinkhorn, eps": Case(
        "sinkhorn", "eps", TOKENS, (("iterations", 3), ("eps", 0.1), ("first", "columns"))
    ),
    "rms_norm": Case("rms_norm", "eps", TOKENS, (("eps", 0.1),)),
    "mappings": CASES["mappings"],
}


@pytest.mark.parametrize("name", TWICE)
def test_grad_of_grad_in_jax(name: str) -> None:
    """A product with the Hessian, against a difference of the oracle's gradients."""
    case = TWICE[name]
    primals, cotangents = data(case, "float64", 0)
    rng = np.random.default_rng(1)
    direction = [rng.normal(size=primal.shape) for primal in primals]

    def gradients(step: float) -> tuple[Array, ...]:
        moved = [p + step * d for p, d in zip(primals, direction, strict=True)]
        return oracle.gradients(case.op, moved, cotangents, **case.options)

    step = 1e-5
    want = [(a - b) / (2 * step) for a, b in zip(gradients(step), gradients(-step), strict=True)]
    function = Subject("jax").function(case.op, case.options)

    def loss(*arrays: Any) -> Any:
        outputs = _tuple(function(*arrays))
        return sum((c * o).sum() for c, o in zip(cotangents, outputs, strict=True))

    argnums = tuple(range(len(primals)))

    def along(*arrays: Any) -> Any:
        first = jax.grad(loss, argnums)(*arrays)
        return sum((d * g).sum() for d, g in zip(direction, first, strict=True))

    with jax.enable_x64(True):
        got = jax.jit(jax.grad(along, argnums))(*map(jnp.asarray, primals))
        for one, other in zip(got, want, strict=True):
            assert np.abs(np.asarray(one) - other).max() < 1e-6 * np.abs(other).max()


# --- ops inside a user's own compiled function ------------------------------------------------

X = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)


def _sublayers(x: Any, logits: Any, tanh: Function) -> Any:
    """Two sublayers of an own model, with ops of several kinds between own lines."""
    for _ in range(2):
        h_res = mhc.sinkhorn(logits * 2, iterations=4)
        y = tanh(mhc.aggregate(x, h_res[0]))
        x = mhc.combine(x, y, h_res[:, 1], h_res)
    return mhc.contract(x, "mean")


def test_ops_inside_an_own_compiled_function() -> None:
    logits = X[0, :, :2]
    want = _sublayers(X, logits, np.tanh)
    by_jax = jax.jit(lambda x, m: _sublayers(x, m, jnp.tanh))(jnp.asarray(X), jnp.asarray(logits))
    by_mlx = mx.compile(lambda x, m: _sublayers(x, m, mx.tanh))(mx.array(X), mx.array(logits))
    for result in (by_jax, by_mlx):
        np.testing.assert_allclose(np.asarray(result), want, rtol=1e-5, atol=1e-6)


def test_a_training_step_compiled_by_its_user() -> None:
    """Gradients with respect to parameters that are used in several ops, and their update."""
    x, logits = X, X[0, :, :2]

    def run(library: Any, compile: Function, value_and_grad: Function) -> tuple[Array, float]:
        def loss(m: Any, x: Any) -> Any:
            return (_sublayers(x, m, library.tanh) ** 2).sum()

        def step(m: Any, x: Any) -> tuple[Any, Any]:
            value, gradient = value_and_grad(loss)(m, x)
            return m - 0.01 * gradient, value

        step = compile(step)
        m, own = library.array(logits), library.array(x)
        values: list[float] = []
        for _ in range(4):
            m, value = step(m, own)
            values.append(float(value))
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 1e-3
        return np.asarray(m), values[-1]

    by_jax = run(jnp, jax.jit, jax.value_and_grad)
    by_mlx = run(mx, mx.compile, mx.value_and_grad)
    np.testing.assert_allclose(by_jax[0], by_mlx[0], rtol=1e-4)
    np.testing.assert_allclose(by_jax[1], by_mlx[1], rtol=1e-4)


# --- compiled once ----------------------------------------------------------------------------


def _calls(like: Function, variant: mhc.Variant, iterations: Any, eps: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = [(3, 2, 4), (8, 8), (3,), (8,)]
    x, phi, scale, bias = (like(rng.normal(size=s).astype(np.float32)) for s in arrays)
    mhc.pre(x, phi, scale, bias, variant)
    logits = like(rng.normal(size=(3, 2, 2)).astype(np.float32))
    mhc.sinkhorn(logits, iterations, eps)
    mhc.vjp("sinkhorn", (logits,), logits, iterations=iterations, eps=eps)


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """Count what JAX compiled since the last time."""

    def count() -> int:
        found = sum("Finished XLA compilation" in record.message for record in caplog.records)
        caplog.clear()
        return found

    return count


def test_jax_compiles_once_for_the_same_shapes(
    compilations: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        _calls(jnp.asarray, VARIANT, 7, 0.25, seed=0)
        assert compilations() >= 3
        _calls(jnp.asarray, VARIANT, 7, 0.25, seed=1)
        same = replace(VARIANT)
        _calls(jnp.asarray, same, np.int64(7), np.float32(0.25), seed=2)  # plain numbers inside
        assert compilations() == 0
        _calls(jnp.asarray, VARIANT, 8, 0.25, seed=3)
        assert compilations() == 2  # sinkhorn and its vjp, not pre


def test_mlx_compiles_once_for_each_static_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Function] = []
    compile = mx.compile

    def counting(function: Function, *rest: Any, **options: Any) -> Function:
        made.append(function)
        return compile(function, *rest, **options)

    monkeypatch.setattr(mx, "compile", counting)
    _calls(mx.array, VARIANT, 7, 0.25, seed=0)
    made.clear()
    _calls(mx.array, VARIANT, 7, 0.25, seed=1)
    _calls(mx.array, replace(VARIANT), np.int64(7), np.float32(0.25), seed=2)
    assert not made
    _calls(mx.array, VARIANT, 9, 0.25, seed=3)
    assert len(made) <= 2  # on a CPU, where ops are not compiled as a whole, none


def test_mlx_traces_an_own_compiled_function_once() -> None:
    traces: list[int] = []

    def function(x: mx.array, m: mx.array) -> mx.array:
        traces.append(1)
        return _sublayers(x, m, mx.tanh)

    compiled = mx.compile(function)
    for scale in (1, 2, 3):
        mx.eval(compiled(mx.array(X) * scale, mx.array(X[0, :, :2])))
    assert len(traces) == 1
