"""The libraries' own transformations of ops, two and three deep, compared with the oracle."""

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
from mhc_backends.jax.ops import dtype_context
from mhc_backends.mlx_compiled import _vmap
from mhc_conformance import Subject, oracle
from mhc_conformance.cases import Case, Sizes, cases, data, with_variant
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
        self.function = self.subject.function(case)
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
        """Compare gradients with the oracle's, and check that none is zero."""
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


# --- mx.vmap of every op ----------------------------------------------------------------------

MAPPED = 3  # calls that vmap makes one of


def _is_parameter(op: str, name: str) -> bool:
    return math.load(op).OP.patterns[name][0][0] != "..."


def _in_axes(op: str, count: int) -> dict[str, list[int | None]]:
    """Return ways to map an op: what per token, at which axis; the parameters; all arrays."""
    names = list(math.load(op).OP.arrays)[:count]
    parameter = [_is_parameter(op, name) for name in names]
    ways: dict[str, list[int | None]] = {
        "tokens": [None if p else 0 for p in parameter],
        "odd axes": [None if p else (1, 0, -1)[k % 3] for k, p in enumerate(parameter)],
        "first": [0, *[None] * (count - 1)],
        "not the first": [None, *[None if p else 0 for p in parameter[1:]]],
        "parameters": [0 if p else None for p in parameter],
        "all": [0] * count,
    }
    return {name: way for name, way in ways.items() if any(axis is not None for axis in way)}


class _Mapped:
    """One case, once by vmap and once by a loop over the same calls."""

    def __init__(self, case: Case, axes: Sequence[int | None]) -> None:
        subject = Subject("mlx-compiled")
        primals, cotangents = data(case, "float32", 0)
        self.axes = list(axes)
        factors = 1 + 0.25 * np.arange(MAPPED)
        self.primals = [
            mx.array(p if axis is None else np.stack([p * f for f in factors], axis))
            for p, axis in zip(primals, axes, strict=True)
        ]
        self.cotangents = [mx.array(np.stack([c * f for f in factors])) for c in cotangents]
        function = subject.function(case)
        self.function: Function = lambda *arrays: _tuple(function(*arrays))

    def loss(self, function: Function) -> Function:
        def loss(*both: Any) -> Any:
            outputs = function(*both[: len(self.axes)])
            return sum((c * o).sum() for c, o in zip(both[len(self.axes) :], outputs, strict=True))

        return loss

    def grad(self, function: Function) -> Function:
        own = mx.grad(self.loss(function), argnums=list(range(len(self.axes))))
        return lambda *both: _tuple(own(*both))

    def loop(self, function: Function) -> list[Any]:
        """Call the function on every slice; every call gets what has no mapped axis."""
        both = list(zip([*self.primals, *self.cotangents], self.every_axis, strict=True))
        return [
            _tuple(function(*[a if axis is None else mx.take(a, k, axis) for a, axis in both]))
            for k in range(MAPPED)
        ]

    @property
    def every_axis(self) -> list[int | None]:
        return [*self.axes, *[0] * len(self.cotangents)]

    def gradients(self) -> list[Any]:
        """Return the loop's gradients; those of arrays given to every slice are sums."""
        each = zip(*self.loop(self.grad(self.function)), strict=True)
        return [
            mx.stack(list(ds), axis) if axis is not None else sum(ds)
            for ds, axis in zip(each, self.axes, strict=True)
        ]

    def vmapped(self) -> Function:
        return mx.vmap(self.function, in_axes=tuple(self.axes))

    def vmap_of_grad(self) -> list[Any]:
        in_axes = tuple(self.every_axis)
        each = mx.vmap(self.grad(self.function), in_axes=in_axes)(*self.primals, *self.cotangents)
        pairs = zip(_tuple(each), self.axes, strict=True)
        return [d.sum(0) if axis is None else mx.moveaxis(d, 0, axis) for d, axis in pairs]


def _close(got: Sequence[Any], want: Sequence[Any]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        scale = float(mx.abs(other).max())
        assert scale > 1e-4
        assert float(mx.abs(one - other).max()) < 2e-5 * scale


_VMAPS = [(op, way) for op in math.OPS for way in _in_axes(op, len(math.load(op).OP.arrays))]
_EVERY = Sizes((2,), 2, 4, "one leading axis, beside the mapped one")


def _case(op: str, way: str, **changes: Any) -> tuple[Case, list[int | None]]:
    """Return an op's first case with all of its arrays, small, and the axes to map."""
    declared = math.load(op).OP
    optional = "h_pre" in declared.optional
    case = next(c for c in cases(op) if c.optional == optional)
    static = tuple((k, min(v, 3) if k == "iterations" else v) for k, v in case.static)
    if "variant" in case.options:
        static = with_variant(op, VARIANT, h_norm_eps=1e-3, h_raw=True)
    return replace(case, sizes=_EVERY, static=static, **changes), _in_axes(
        op, len(declared.arrays)
    )[way]


@pytest.mark.parametrize(("op", "way"), _VMAPS)
def test_mlx_vmap_is_a_loop(op: str, way: str) -> None:
    trial = _Mapped(*_case(op, way))
    values = trial.vmapped()(*trial.primals)
    each = trial.loop(lambda *both: trial.function(*both[: len(trial.axes)]))
    _close(values, [mx.stack(list(o)) for o in zip(*each, strict=True)])
    want = trial.gradients()
    _close(trial.grad(trial.vmapped())(*trial.primals, *trial.cotangents), want)
    _close(trial.vmap_of_grad(), want)


@pytest.mark.parametrize(
    "op", [op for op in math.OPS if any("|" in p for p in math.load(op).OP.arrays.values())]
)
@pytest.mark.parametrize("way", ["tokens", "first", "not the first"])
def test_mlx_vmap_of_mappings_for_all_tokens(op: str, way: str) -> None:
    trial = _Mapped(*_case(op, way, shared=True))
    _close(trial.grad(trial.vmapped())(*trial.primals, *trial.cotangents), trial.gradients())


@pytest.mark.parametrize(("op", "way"), _VMAPS)
def test_grad_of_mlx_vmap_takes_the_written_vjp(
    monkeypatch: pytest.MonkeyPatch, op: str, way: str
) -> None:
    """Check with a vjp that returns twice the gradients: autodiff of the body would not know it."""
    trial = _Mapped(*_case(op, way))
    want = trial.gradients()
    module = math.load(op)
    if way not in ("parameters", "all"):  # one call with one more leading axis
        monkeypatch.delattr(_vmap, "_by_the_body")
    written = module.vjp

    def twice(*arguments: Any, **static: Any) -> tuple[Any, ...]:
        return tuple(2 * d for d in written(*arguments, **static))

    monkeypatch.setattr(module, "vjp", twice)
    doubled = [2 * d for d in want]
    _close(trial.grad(trial.vmapped())(*trial.primals, *trial.cotangents), doubled)
    compiled = mx.compile(trial.grad(trial.vmapped()))
    _close(compiled(*trial.primals, *trial.cotangents), doubled)
    _close(trial.vmap_of_grad(), doubled)


@pytest.mark.parametrize("inner", [(0, None, None, None), (0, 0, 0, 0), (None, 0, None, None)])
@pytest.mark.parametrize("outer", [(1, None, None, None), (0, 0, None, None)])
def test_nested_mlx_vmap_takes_the_written_vjp(
    monkeypatch: pytest.MonkeyPatch, outer: tuple[int | None, ...], inner: tuple[int | None, ...]
) -> None:
    """Check mappings: what is mapped twice, or once outside or inside, tokens or parameters."""
    rng = np.random.default_rng(0)
    shapes = [(2, 2, 4), (8, 8), (3,), (8,)]
    arrays: list[mx.array] = []
    for shape, i, o in zip(shapes, inner, outer, strict=True):
        inside = shape if i is None else (*shape[:i], 5, *shape[i:])
        outside = inside if o is None else (*inside[:o], MAPPED, *inside[o:])
        arrays.append(mx.array(rng.normal(size=outside).astype(np.float32)))

    def loss(*arrays: mx.array) -> mx.array:
        return sum((o**2).sum() for o in mhc.mappings(*arrays, VARIANT))  # pyright: ignore

    def by_vmap(*arrays: mx.array) -> mx.array:
        return mx.vmap(mx.vmap(loss, in_axes=inner), in_axes=outer)(*arrays).sum()

    def by_loops(*arrays: mx.array) -> Any:
        def part(arrays: Any, axes: Any, k: int) -> list[mx.array]:
            pairs = zip(arrays, axes, strict=True)
            return [a if axis is None else mx.take(a, k, axis) for a, axis in pairs]

        outside = [part(arrays, outer, k) for k in range(MAPPED)]
        return sum(loss(*part(one, inner, k)) for one in outside for k in range(5))

    every = list(range(4))
    want = mx.grad(by_loops, argnums=every)(*arrays)
    module = math.load("mappings")
    written = module.vjp
    monkeypatch.setattr(
        module, "vjp", lambda *a, **static: tuple(2 * d for d in written(*a, **static))
    )
    _close(mx.grad(by_vmap, argnums=every)(*arrays), [2 * d for d in want])


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
    """Compare a product with the Hessian with a difference of the oracle's gradients."""
    case = TWICE[name]
    primals, cotangents = data(case, "float64", 0)
    rng = np.random.default_rng(1)
    direction = [rng.normal(size=primal.shape) for primal in primals]

    def gradients(step: float) -> tuple[Array, ...]:
        moved = [p + step * d for p, d in zip(primals, direction, strict=True)]
        return oracle.gradients(case.op, moved, cotangents, **case.options)

    step = 1e-5
    want = [(a - b) / (2 * step) for a, b in zip(gradients(step), gradients(-step), strict=True)]
    function = Subject("jax").function(case)

    def loss(*arrays: Any) -> Any:
        outputs = _tuple(function(*arrays))
        return sum((c * o).sum() for c, o in zip(cotangents, outputs, strict=True))

    argnums = tuple(range(len(primals)))

    def along(*arrays: Any) -> Any:
        first = jax.grad(loss, argnums)(*arrays)
        return sum((d * g).sum() for d, g in zip(direction, first, strict=True))

    with dtype_context("float64"):
        got = jax.jit(jax.grad(along, argnums))(*map(jnp.asarray, primals))
        for one, other in zip(got, want, strict=True):
            assert np.abs(np.asarray(one) - other).max() < 1e-6 * np.abs(other).max()


# --- ops inside a user's own compiled function ------------------------------------------------

X = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)


def _sublayers(x: Any, logits: Any, tanh: Function) -> Any:
    """Return two sublayers of a user's model, with ops of several kinds between other lines."""
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
    """Check gradients of parameters that are used in several ops, and their update."""
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
    """Return how many compilations JAX made since the last time."""

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


def test_mlx_keeps_little_more_under_a_plain_grad_than_in_a_compiled_step() -> None:
    """Check memory: what is evaluated while mx.grad traces would keep all that it was made of."""
    T, n, C = 128, 4, 256
    m = n * n + 2 * n
    arrays = [
        mx.random.normal(s, key=mx.random.key(1)) for s in ((T, n, C), (m, n * C), (3,), (m,))
    ]

    def loss(x: mx.array, phi: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        for _ in range(8):
            h, h_post, h_res = mhc.pre(x, phi / 32, scale, bias, VARIANT, backend="mlx-compiled")
            x = mhc.combine(x, mx.tanh(h), h_post, h_res, backend="mlx-compiled")
        return x.sum()

    def peak(step: Function) -> int:
        mx.eval(step(*arrays))
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(*arrays))
        return mx.get_peak_memory() - before

    step = mx.grad(loss, argnums=(0, 1, 2, 3))
    assert peak(step) < 3 * peak(mx.compile(step))
