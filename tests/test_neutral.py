"""The neutral maths by itself: its forwards under plain autodiff, its loops and its products."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_backends.jax.ops import dtype_context
from mhc_conformance.cases import SMALL, Case, cases, data
from mhc_core import math
from mhc_core.math import _xp, sinkhorn_knopp
from mhc_core.math._xp import arrays, loops, products

Array = NDArray[Any]
EPS = float(np.finfo(np.float32).eps)
# compiled once and run once: compiling is all that these tests would wait for
QUICKLY = {"xla_llvm_disable_expensive_passes": True}


def _sinkhorn(eps: float, first: str) -> Case:
    static = (("iterations", 5), ("eps", eps), ("first", first))
    return Case("sinkhorn", f"eps={eps}, {first} first", SMALL, static)


SINKHORNS = [_sinkhorn(eps, first) for eps in (0.0, 0.1) for first in ("columns", "rows")]


COMPOSED = (
    "pre",
    "combine_pre",
    "pre_norm",
    "pre_residual",
    "combine_pre_norm",
    "static_layer",
)  # of other ops, which have more cases


def _chosen(op: str) -> Iterator[Case]:
    """Return an op's first cases, and those that differ from them in more than sizes."""
    count = 1 if op in COMPOSED else 2
    yield from SINKHORNS if op == "sinkhorn" else itertools.islice(cases(op), count)
    for case in cases(op):
        plain = not (case.for_all or case.draws)
        if case.sizes == SMALL and case.shared != case.optional and plain:
            yield case


CASES = [case for op in math.OPS for case in _chosen(op)]


def _loss(case: Case, cotangents: Any) -> Callable[..., Any]:
    """Return sum(cotangent * output) of the neutral forward, which any autodiff can follow."""
    forward = math.load(case.op).forward

    def loss(*primals: Any) -> Any:
        outputs = forward(*case.placed(primals), **case.options)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((c * o).sum() for c, o in zip(cotangents, _there(several), strict=True))

    return loss


def _there(arrays: Any) -> tuple[Any, ...]:
    return tuple(array for array in arrays if array is not None)


def _vjp(case: Case, primals: Any, cotangents: Any) -> tuple[Any, ...]:
    """Return the gradients of the arrays that a case has, by the hand-written vjp."""
    module, given = math.load(case.op), iter(cotangents)
    placed = tuple(next(given) if there else None for there in module.OP.kept(case.options))
    return _there(module.vjp(case.placed(primals), placed, **case.options))


def _off_by(got: Any, want: Any) -> float:
    """Return the worst error of several arrays, each relative to its largest number."""
    pairs = [(np.asarray(g), np.asarray(w)) for g, w in zip(got, want, strict=True)]
    assert all(g.shape == w.shape for g, w in pairs)
    return max(float(np.abs(g - w).max() / (np.abs(w).max() or 1)) for g, w in pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_vjps_equal_autodiff_of_the_forwards(case: Case) -> None:
    primals, cotangents = data(case, "float64", 0)
    by_hand = _vjp(case, primals, cotangents)
    with dtype_context("float64"):
        own = tuple(jnp.asarray(primal) for primal in primals)
        function = jax.grad(_loss(case, cotangents), argnums=range(len(own)))
        by_jax = jax.jit(function, compiler_options=QUICKLY)(*own)
        assert all(gradient.dtype == np.float64 for gradient in by_jax)
        assert _off_by(by_hand, by_jax) < 1e-12


MLX_CASES = [
    *SINKHORNS,
    *(next(iter(cases(op))) for op in ("mappings", "combine", "static_layer", "rms_norm", "head")),
    *(next(cases(op)) for op in ("combine_pre", "sinkhorn_knopp", "residual_add_aggregate")),
]


@pytest.mark.parametrize("case", MLX_CASES, ids=lambda case: f"{case.op}: {case.label}")
def test_vjps_equal_autodiff_of_the_forwards_in_mlx(case: Case) -> None:
    primals, cotangents = data(case, "float32", 0)
    wide = [[array.astype(np.float64) for array in arrays] for arrays in (primals, cotangents)]
    by_hand = _vjp(case, *wide)
    own = [mx.array(primal) for primal in primals]
    loss = _loss(case, [mx.array(cotangent) for cotangent in cotangents])
    by_mlx = mx.grad(loss, argnums=list(range(len(own))))(*own)
    by_mlx = by_mlx if isinstance(by_mlx, tuple) else (by_mlx,)
    assert _off_by(by_mlx, by_hand) < 1e-4


# --- sinkhorn_knopp's loop --------------------------------------------------------------------

KNOPP = {"max_iterations": 60, "epsilon": 1e-3}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the steps that are taken."""
    taken: list[int] = []
    step = sinkhorn_knopp._step

    def counting(xp: Any, half: Any) -> Any:
        taken.append(1)
        return step(xp, half)

    monkeypatch.setattr(sinkhorn_knopp, "_step", counting)
    return taken


def _logits(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("log_space", [True, False])
@pytest.mark.parametrize("like", [np.asarray, mx.array], ids=["numpy", "mlx"])
def test_stopping_early_changes_no_bit(
    like: Callable[..., Any], log_space: bool, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, cotangent = like(_logits(5, 4, 4)), like(_logits(5, 4, 4)[::-1].copy())
    options = {**KNOPP, "log_space": log_space}

    def run() -> tuple[Array, Array]:
        forward = np.asarray(sinkhorn_knopp.forward(matrix, **options))
        (gradient,) = sinkhorn_knopp.vjp((matrix,), (cotangent,), **options)
        return forward, np.asarray(gradient)

    early = run()
    assert len(steps) < 60  # of 120 in forward and vjp together
    steps.clear()
    monkeypatch.setattr(loops, "_known_false", lambda xp, active: False)
    frozen = run()
    assert len(steps) == 120
    for one, other in zip(early, frozen, strict=True):
        assert one.tobytes() == other.tobytes()


def test_it_stops_after_as_many_steps_as_it_needs(steps: list[int]) -> None:
    sinkhorn_knopp.forward(np.zeros((2, 4, 4)), **KNOPP, log_space=True)
    assert len(steps) == 1


def test_under_mx_compile_every_step_is_taken(steps: list[int]) -> None:
    matrix = mx.array(_logits(2, 3, 3))
    eager = sinkhorn_knopp.forward(matrix, max_iterations=9, epsilon=0.05, log_space=True)
    assert len(steps) < 9
    steps.clear()
    compiled = mx.compile(
        lambda m: sinkhorn_knopp.forward(m, max_iterations=9, epsilon=0.05, log_space=True)
    )
    np.testing.assert_allclose(np.asarray(compiled(matrix)), np.asarray(eager), rtol=1e-5)
    assert len(steps) == 9


@pytest.mark.parametrize("like", [np.asarray, mx.array, jnp.asarray], ids=["numpy", "mlx", "jax"])
def test_each_matrix_is_frozen_by_itself(like: Callable[..., Any]) -> None:
    slow = _logits(1, 4, 4) * 4
    quick = _logits(1, 4, 4) * 0.5
    options = {"max_iterations": 50, "epsilon": 0.05, "log_space": True}
    both = np.asarray(sinkhorn_knopp.forward(like(np.concatenate([slow, quick])), **options))
    for index, alone in enumerate((slow, quick)):
        result = np.asarray(sinkhorn_knopp.forward(like(alone), **options))
        np.testing.assert_allclose(both[index], result[0], rtol=1e-5)
    # if it ran as long as the slow one, the quick one would sum to 1 in both directions
    assert np.abs(both[1].sum(axis=-1) - 1).max() > 1e-4


def _matrix_and_gradient(logits: Any, iterations: int) -> tuple[Any, Any]:
    sinkhorn, options = math.load("sinkhorn"), {"iterations": iterations, "first": "rows"}
    (gradient,) = sinkhorn.vjp((logits,), (logits,), eps=0.0, **options)
    return sinkhorn.forward(logits, eps=0.0, **options), gradient


def test_jax_loops_on_a_cpu_and_unrolls_on_a_gpu() -> None:
    def lowered(platform: str, iterations: int) -> list[str]:
        traced = jax.jit(_matrix_and_gradient, static_argnums=1).trace(
            jnp.zeros((4, 4)), iterations
        )
        return traced.lower(lowering_platforms=(platform,)).as_text().splitlines()

    def whiles(platform: str, iterations: int) -> int:
        return sum("stablehlo.while" in line for line in lowered(platform, iterations))

    assert len(lowered("cpu", 20)) == len(lowered("cpu", 3))
    assert (whiles("cpu", 20), whiles("cuda", 20)) == (3, 0)
    assert (
        whiles("cuda", loops.MOST_UNROLLED + 2) == 3
    )  # as long as this, it would compile for long
    # without barriers in the two scans of the vjp, one token's compile for minutes there
    barriers = "\n".join(lowered("cuda", 20)).count("optimization_barrier")
    assert barriers == 2 * (19 // loops.FUSED_STEPS)


def test_the_forms_for_gpus_give_the_same_in_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run them on the CPU: sinkhorn's steps, and the products over C of combine's vjp."""
    rng = np.random.default_rng(0)
    shapes = ((5, 3, 8), (5, 8), (5, 3), (5, 3, 3), (5, 3, 8))
    *primals, g = (jnp.asarray(rng.normal(size=shape), "float32") for shape in shapes)

    def results() -> list[Any]:
        gradients = math.load("combine").vjp(tuple(primals), (g,))
        return [*_matrix_and_gradient(primals[3], 4), *gradients]

    expected, taken = results(), []

    def on_gpu(form: Callable[..., Any], _: Any, *given: Any) -> Any:
        taken.append(form)
        return form(*given)

    for module in (loops, products):
        monkeypatch.setattr(module, "by_platform", on_gpu)
    for got, want in zip(results(), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert len(taken) == 4  # sinkhorn's forward, its vjp's forward and backward, combine's product


# --- what sinkhorn's vjp keeps ----------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorns_vjp_keeps_two_lines_per_matrix_and_iteration(eps: float) -> None:
    n, tokens = 16, 128
    logits = np.random.default_rng(0).normal(size=(tokens, n, n))
    vjp = math.load("sinkhorn").vjp

    def peak(iterations: int) -> int:
        tracemalloc.start()
        vjp((logits,), (logits,), iterations=iterations, eps=eps, first="columns")
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(2)  # so that no import is counted
    per_iteration = (peak(60) - peak(20)) / 40
    lines = 2 * n * tokens * 8
    assert per_iteration < 1.1 * lines


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_sinkhorns_vjp_keeps_as_little_in_jax(eps: float) -> None:
    n, tokens = 8, 64
    vjp = math.load("sinkhorn").vjp
    logits = jnp.zeros((tokens, n, n))

    def temporary(iterations: int) -> int:
        function = jax.jit(
            lambda m: vjp((m,), (m,), iterations=iterations, eps=eps, first="columns")
        )
        return function.lower(logits).compile().memory_analysis().temp_size_in_bytes

    per_iteration = (temporary(60) - temporary(20)) / 40
    assert per_iteration < 1.1 * 2 * n * tokens * 4


# --- products by halves, for hardware that multiplies in TF32 ---------------------------------


def _bits(array: Array) -> int:
    """Return how many significant bits the numbers need at most."""
    mantissas = np.abs(np.frexp(array.astype(np.float64))[0])
    return next(bits for bits in range(60) if not np.any(np.modf(np.ldexp(mantissas, bits))[0]))


def test_halves_are_exact() -> None:
    rng = np.random.default_rng(0)
    a = (rng.normal(size=4096) * 10.0 ** rng.integers(-20, 20, 4096)).astype(np.float32)
    upper, lower = (np.asarray(half) for half in products._halves(mx, mx.array(a)))
    assert _bits(a) == 24
    assert _bits(upper) == 11
    np.testing.assert_array_equal(upper.astype(np.float64) + lower, a.astype(np.float64))
    assert np.all(np.abs(lower) <= np.abs(upper) * 2.0**-10)


def _tf32(array: mx.array) -> Array:
    """Round to 11 significant bits."""
    mantissa, exponent = np.frexp(np.asarray(array).astype(np.float64))
    return np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent)


def _tf32_hardware() -> Any:
    """Return MLX with a matmul that rounds its inputs to TF32 and sums in float32."""

    def multiply(a: mx.array, b: mx.array) -> mx.array:
        return mx.array((_tf32(a) @ _tf32(b)).astype(np.float32))

    return SimpleNamespace(**{**vars(mx), "matmul": multiply})


@pytest.mark.parametrize("mean", [0.0, 1.05])
def test_products_by_halves_are_float32_products(mean: float) -> None:
    rng = np.random.default_rng(0)
    sizes = ((33, 64), (64, 24))
    a, b = (rng.uniform(mean - 0.05, mean + 0.05, size).astype(np.float32) for size in sizes)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    hardware = _tf32_hardware()
    halves = products._matmul_by_halves(hardware, mx.array(a), mx.array(b))
    assert _off_by([halves], [exact]) < 4 * EPS
    if mean == 0:
        plain = hardware.matmul(mx.array(a), mx.array(b))
        assert _off_by([plain], [exact]) > 500 * EPS  # what it is there to prevent


def test_gradients_of_products_by_halves_are_such_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check gradients of gradients too: MLX's own derivative would take TF32 for them."""
    made: list[Any] = []

    def counted(*arrays: Any) -> Any:
        made.append(arrays)
        return plain_by_halves(*arrays)

    plain_by_halves = products._matmul_by_halves
    monkeypatch.setattr(products, "_matmul_by_halves", counted)
    monkeypatch.setattr(products, "on_gpu", lambda _: True)
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    products._product_by_halves.cache_clear()
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.normal(size=size).astype(np.float32)) for size in ((3, 2), (5, 2, 4)))

    def gradients(product: Any) -> list[Any]:
        def loss(a: Any, b: Any) -> Any:
            return mx.sum(mx.sin(product(a, b)))

        def steep(a: Any, b: Any) -> Any:
            return sum(mx.sum(g * g) for g in mx.grad(loss, argnums=(0, 1))(a, b))

        return [*mx.grad(loss, argnums=(0, 1))(a, b), *mx.grad(steep, argnums=(0, 1))(a, b)]

    try:
        got = gradients(lambda a, b: _xp.matmul(mx, a, b))
    finally:
        products._product_by_halves.cache_clear()
    assert len(made) >= 3 + 9  # a product, its two gradients, and those of all three
    for one, other in zip(got, gradients(mx.matmul), strict=True):
        assert one.shape == other.shape
        assert _off_by([one], [np.array(other)]) < 1e-5


# --- float32's range ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["pre", "head", "rms_norm"])
@pytest.mark.parametrize("size", [1e15, 1e18])
def test_streams_as_large_as_float32_nearly_holds(op: str, size: float) -> None:
    """Check numbers of 1e18: 4096 of their squares overflow, and so does the inverse's cube."""
    rng, n, C = np.random.default_rng(1), 4, 1024
    x = (size * rng.uniform(-1, 1, size=(3, n, C))).astype(np.float32)
    phi = (rng.normal(size=(24, n * C)) / 64).astype(np.float32)
    scale, bias = np.ones(3, np.float32), rng.normal(size=24).astype(np.float32)
    variant: dict[str, Any] = {"variant": mhc.PAPER}
    primals, static = {
        "pre": ((x, phi, scale, bias), variant),
        "head": ((x, phi[:n], scale[:1], bias[:n]), variant),
        "rms_norm": ((x, phi[0, :C]), {"eps": 1e-20}),
    }[op]
    module = math.load(op)
    wide = tuple(p.astype(np.float64) for p in primals)
    exact = module.forward(*wide, **static)
    exact = exact if isinstance(exact, tuple) else (exact,)
    given = tuple(rng.normal(size=o.shape) / np.abs(o).max() for o in exact)
    want = (*exact, *module.vjp(wide, given, **static))
    for library in (np.asarray, mx.array, jnp.asarray):
        own = tuple(map(library, primals))
        outputs = module.forward(*own, **static)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = tuple(library(g.astype(np.float32)) for g in given)
        got = (*outputs, *module.vjp(own, cotangents, **static))
        for one, other in zip(got, want, strict=True):
            assert np.abs(np.array(one) - other).max() < 1e-4 * np.abs(other).max()


EDGE = 3e38 * np.array([[[1, 1], [-1, -1]], [[1, -1], [-1, 1]], [[1, -1], [1, -1]]])


@pytest.mark.parametrize(
    ("op", "static"),
    [
        ("sinkhorn", {"iterations": 5, "eps": 0.0, "first": "columns"}),
        ("sinkhorn", {"iterations": 5, "eps": 1e-6, "first": "rows"}),
        ("sinkhorn_knopp", {"max_iterations": 9, "epsilon": 1e-6, "log_space": True}),
        ("sinkhorn_knopp", {"max_iterations": 9, "epsilon": 1e-6, "log_space": False}),
    ],
)
def test_any_finite_logits_have_a_matrix_and_a_gradient(op: str, static: dict[str, Any]) -> None:
    module, g = math.load(op), np.arange(12.0).reshape(3, 2, 2)
    want = module.forward(EDGE, **static), *module.vjp((EDGE,), (g,), **static)
    for library in (np.asarray, mx.array, jnp.asarray):
        logits = library(EDGE.astype(np.float32))
        pulled = module.vjp((logits,), (library(g.astype(np.float32)),), **static)
        for one, other in zip((module.forward(logits, **static), *pulled), want, strict=True):
            assert np.abs(np.array(one) - other).max() < 1e-5


def test_a_line_has_a_largest_entry_though_it_is_computed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check shares where a compiler rounded the entries of a maximum in another way."""
    logits = np.array([[1.0, 3.0, 3.0], [2.0, -1.0, 0.5]]).T
    expected = [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    assert _xp.share_of_largest(np, logits, 0).T.tolist() == expected
    assert _xp.largest(np, logits, 0).tolist() == [[3.0, 2.0]]
    exact = _xp.shift
    monkeypatch.setattr(arrays, "shift", lambda *given: np.nextafter(exact(*given), np.inf))
    assert _xp.share_of_largest(np, logits, 0).T.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    np.testing.assert_allclose(_xp.largest(np, logits, 0), [[3.0, 2.0]], rtol=1e-15)
