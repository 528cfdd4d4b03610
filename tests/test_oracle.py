"""The oracle itself: its gradients against complex steps, its forwards against plain loops.

``f(x + i h d)`` has ``h`` times the derivative of f along d as its imaginary part, without the
cancellation of a finite difference. So gradients must agree to the last digits.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mhc_conformance import autodiff, oracle
from mhc_conformance.cases import MIXED, SMALL, cases, data

Arrays = tuple[NDArray[Any], ...]
Evaluate = Callable[[Sequence[NDArray[Any]]], Arrays]

STEP = 1e-40
DIGITS = 1e-12


@dataclass(frozen=True)
class Variant:
    """A variant as any object with these attributes: the oracle reads nothing else."""

    norm_eps: float = 1e-6
    norm_root_eps: float = 0.02
    pre_eps: float = 1e-2
    post_scale: float = 1.5
    post_eps: float = 3e-3
    sinkhorn_iterations: int = 4
    sinkhorn_eps: float = 0.0
    sinkhorn_first: str = "columns"
    sinkhorn_start: str = "softmax"
    sinkhorn_clamp: tuple[float, float] | None = None
    res_transposed: bool = False
    mixer: str = "sinkhorn"
    mixer_options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Case:
    """An op, its static arguments, and the shapes of its primals."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    static: dict[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.op, self.name, _dimensions(self.shapes[0])) if part)


def _dimensions(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


VARIANTS = {
    "paper": Variant(norm_eps=1e-20, norm_root_eps=0.0, pre_eps=0.0),
    "v4": Variant(sinkhorn_eps=1e-3, res_transposed=True),
    "rows": Variant(sinkhorn_first="rows", res_transposed=True),
    "rows-eps": Variant(sinkhorn_first="rows", sinkhorn_eps=1e-2, sinkhorn_iterations=1),
    "exp": Variant(sinkhorn_start="exp", sinkhorn_eps=1e-1, sinkhorn_clamp=(-1.0, 0.5)),
}
LEADINGS = ((), (3,), (2, 3), (0,), (2, 0))
C = 5


def _weights(n: int) -> tuple[tuple[int, ...], ...]:
    rows = n * n + 2 * n
    return ((rows, n * C), (3,), (rows,))


def _static_shapes(n: int) -> tuple[tuple[int, ...], ...]:
    return ((n,), (n,), (n, n))


def _cases() -> list[Case]:
    return [
        case
        for n in (1, 2, 3, 4)
        for leading in LEADINGS
        for make in (_sinkhorn_cases, _mapping_cases, _stream_cases, _static_cases)
        for case in make(n, leading)
    ]


def _sinkhorn_cases(n: int, leading: tuple[int, ...]) -> list[Case]:
    shapes = ((*leading, n, n),)
    plain = [
        Case(
            "sinkhorn", shapes, {"first": first, "eps": eps, "iterations": k}, f"{first}-{eps}-{k}"
        )
        for first in ("columns", "rows")
        for eps in (0.0, 1e-2)
        for k in (1, 5)
    ]
    stopping = [
        Case(
            "sinkhorn_knopp",
            shapes,
            {"max_iterations": k, "epsilon": 1e-2, "log_space": log_space},
            f"{'log' if log_space else 'direct'}-{k}",
        )
        for log_space in (True, False)
        for k in (0, 2, 50)
    ]
    return plain + stopping


def _mapping_cases(n: int, leading: tuple[int, ...]) -> list[Case]:
    x, y, h_pre = (*leading, n, C), (*leading, C), (*leading, n)
    weights = _weights(n)
    both = (x, y, h_pre, (*leading, n, n), *weights)
    shared = (x, y, (n,), (n, n), *weights)
    head = (x, (n, n * C), (1,), (n,))
    return [
        Case(op, shapes, {"variant": variant}, f"{kind}{name}")
        for name, variant in VARIANTS.items()
        for op, kind, shapes in (
            ("mappings", "", (x, *weights)),
            ("pre", "", (x, *weights)),
            ("head", "", head),
            ("combine_pre", "", both),
            ("combine_pre", "given-", (*both, h_pre)),
            ("combine_pre", "shared-", (*shared, (n,))),
        )
    ]


def _stream_cases(n: int, leading: tuple[int, ...]) -> list[Case]:
    x, y, h = (*leading, n, C), (*leading, C), (*leading, n)
    wide = (*leading, n * C)
    return [
        Case("aggregate", (x, h)),
        Case("aggregate", (x, (n,)), name="shared"),
        Case("combine", (x, y, h, (*leading, n, n))),
        Case("combine", (x, y, (n,), (n, n)), name="shared"),
        Case("expand", (y,), {"n": n}, f"n{n}"),
        Case("contract", (x,), {"how": "sum"}, "sum"),
        Case("contract", (x,), {"how": "mean"}, "mean"),
        Case("rms_norm", (y, (C,)), {"eps": 1e-5}),
        Case("residual_add_aggregate", (x, x, h)),
        Case("residual_add_aggregate", (x, x, (n,)), name="shared"),
        Case("gated_combine", (wide, wide, h, h, (*leading, n, n))),
        Case("gated_combine", (wide, wide, *_static_shapes(n)), name="shared"),
        Case("pre_scale", (wide, h)),
        Case("pre_scale", (wide, (n,)), name="shared"),
    ]


def _static_cases(n: int, leading: tuple[int, ...]) -> list[Case]:
    shapes = ((*leading, n, C), *_static_shapes(n), (C,))
    layer = Case("static_layer", shapes, {"eps": 1e-2, "iterations": 3})
    if leading:
        return [layer]
    return [layer, Case("static_mappings", _static_shapes(n), {"iterations": 3}, f"n{n}")]


def _mixed_cases(n: int = 4) -> Iterator[Case]:
    """Yield a case of each mixer, and those of streams that are not mixed."""
    x, h, identity = (3, n, C), (3, n), Variant(mixer="identity")
    for name, variant in MIXED.items():
        rows = variant.columns(n)
        shapes = (x, (rows, n * C), (3,), (rows,))
        yield Case("mappings", shapes, {"variant": variant}, name)
    weights = ((2 * n, n * C), (2,), (2 * n,))
    yield Case("pre", (x, *weights), {"variant": identity}, "identity")
    unmixed: dict[str, Any] = {"absent": ("h_res",)}
    yield Case("combine", (x, (3, C), h), unmixed, "identity")
    both = (x, (3, C), h, *weights)
    yield Case("combine_pre", both, {**unmixed, "variant": identity}, "identity")


def _plain(op: str) -> list[Any]:
    """Return the kit's small cases without inputs of their own, whose values this test draws."""
    return [case for case in cases(op) if case.sizes == SMALL and not case.draws]


def _of_the_kit(op: str) -> Iterator[Case]:
    """Yield the kit's small cases of an op, one per value of its static arguments."""
    for case in {case.static: case for case in _plain(op)}.values():
        shapes = tuple(primal.shape for primal in data(case, "float64", 0).primals)
        yield Case(op, shapes, case.asked, case.label)


BY_HAND = _cases()
CASES = [
    *BY_HAND,
    *_mixed_cases(),
    *(case for op in sorted({*oracle.OPS} - {c.op for c in BY_HAND}) for case in _of_the_kit(op)),
]
ONE_LEADING_AXIS = [case for case in CASES if case.shapes[0][0] == 3]


# --- the check --------------------------------------------------------------------------------


def check_gradients(
    evaluate: Evaluate, gradients: Callable[[Arrays, Arrays], Arrays], primals: Arrays
) -> None:
    """Compare the gradients of ``sum(ct * output)`` with steps in random directions."""
    rng = np.random.default_rng(7)
    outputs = evaluate(primals)
    cotangents = tuple(rng.standard_normal(output.shape) for output in outputs)
    found = gradients(primals, cotangents)
    assert [g.shape for g in found] == [p.shape for p in primals]
    for index, gradient in enumerate(found):
        for _ in range(2):
            direction = rng.standard_normal(primals[index].shape)
            moved = list(primals)
            moved[index] = primals[index] + 1j * STEP * direction
            expected = sum(
                float(np.sum(ct * output.imag)) / STEP
                for ct, output in zip(cotangents, evaluate(moved), strict=True)
            )
            scale = float(np.sum(np.abs(gradient * direction)))
            error = abs(float(np.sum(gradient * direction)) - expected)
            assert error <= DIGITS * (scale + abs(expected)), f"primal {index}: off by {error}"


def _check_case(case: Case) -> None:
    rng = np.random.default_rng(0)
    primals = tuple(rng.standard_normal(shape) for shape in case.shapes)
    check_gradients(
        lambda arrays: oracle.forward(case.op, arrays, **case.static),
        lambda arrays, cotangents: oracle.gradients(case.op, arrays, cotangents, **case.static),
        primals,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_derivatives(case: Case) -> None:
    _check_case(case)


def test_every_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(oracle.OPS)


# --- the tape ---------------------------------------------------------------------------------

MASK = np.array([[True], [False], [True]])
PRIMITIVES: dict[str, tuple[Callable[..., autodiff.Value], tuple[tuple[int, ...], ...]]] = {
    "add": (autodiff.add, ((2, 3, 4), (3, 1))),
    "negative": (autodiff.negative, ((3,),)),
    "multiply": (autodiff.multiply, ((2, 3, 4), (4,))),
    "divide": (autodiff.divide, ((3, 1), (2, 1, 4))),
    "power": (lambda a: (2.0 + a * a) ** -0.5, ((3, 4),)),
    "matmul": (autodiff.matmul, ((3, 4), (2, 4, 5))),
    "exp": (autodiff.exp, ((3,),)),
    "inverse": (lambda a: autodiff.inverse(np.eye(4) + 0.2 * a), ((2, 4, 4),)),
    "log": (lambda a: autodiff.log(2.0 + a * a), ((3,),)),
    "sigmoid": (autodiff.sigmoid, ((7,),)),
    "tanh": (autodiff.tanh, ((7,),)),
    "maximum": (lambda a: autodiff.maximum(a, 0.1), ((9,),)),
    "clip": (lambda a: autodiff.clip(a, -0.3, 0.4), ((9,),)),
    "largest": (lambda a: autodiff.largest(a, -2), ((2, 3, 4),)),
    "total": (lambda a: autodiff.total(a, -2), ((2, 3, 4),)),
    "where": (lambda a, b: autodiff.where(MASK, a, b), ((3, 4), (2, 3, 4))),
    "reshape": (lambda a: a.reshape(2, 6), ((3, 4),)),
    "swapaxes": (lambda a: a.swapaxes(0, -1), ((2, 3, 4),)),
    "broadcast_to": (lambda a: autodiff.broadcast_to(a, (2, 3, 4)), ((3, 1),)),
    "take": (lambda a: a[1:, None, ..., -1], ((3, 2, 4),)),
    "concatenate": (lambda a, b: autodiff.concatenate([a, b, a], 1), ((2, 3), (2, 4))),
}


def _check_primitive(name: str) -> None:
    function, shapes = PRIMITIVES[name]
    rng = np.random.default_rng(1)

    def gradients(arrays: Arrays, cotangents: Arrays) -> Arrays:
        inputs = [autodiff.value(array) for array in arrays]
        return autodiff.pull_back([function(*inputs)], cotangents, inputs)

    check_gradients(
        lambda arrays: (function(*map(autodiff.value, arrays)).data,),
        gradients,
        tuple(rng.standard_normal(shape) for shape in shapes),
    )


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives_are_right_by_themselves(name: str) -> None:
    _check_primitive(name)


def _break(monkeypatch: pytest.MonkeyPatch, name: str, parent: int) -> None:
    """Make one derivative of one primitive wrong by a part in a million."""
    right = autodiff.node

    def wrong(
        primitive: str,
        data: autodiff.Array,
        parents: tuple[autodiff.Value, ...],
        pullback: autodiff.Pullback,
    ) -> autodiff.Value:
        def bent(g: autodiff.Array) -> Arrays:
            factors = (1.0 + 1e-6 * (i == parent) for i in range(len(parents)))
            return tuple(f * p for f, p in zip(factors, pullback(g), strict=True))

        return right(primitive, data, parents, bent if primitive == name else pullback)

    monkeypatch.setattr(autodiff, "node", wrong)


@pytest.mark.parametrize(
    ("name", "parent"),
    [(name, i) for name, (_, shapes) in PRIMITIVES.items() for i in range(len(shapes))],
)
def test_a_wrong_derivative_is_noticed(
    name: str, parent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, name, parent)
    with pytest.raises(AssertionError, match="off by"):
        _check_primitive(name)


# The other two serve the golden tests, which chain ops with a layer between them.
USED_BY_OPS = sorted(set(PRIMITIVES) - {"tanh", "concatenate"})


@pytest.mark.parametrize("name", USED_BY_OPS)
def test_a_wrong_derivative_is_noticed_in_some_op(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, name, 0)

    def fails(case: Case) -> bool:
        try:
            _check_case(case)
        except AssertionError:
            return True
        return False

    assert any(fails(case) for case in ONE_LEADING_AXIS)


def test_every_primitive_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()
    right = autodiff.node

    def watching(primitive: str, *rest: Any) -> autodiff.Value:
        seen.add(primitive)
        return right(primitive, *rest)

    monkeypatch.setattr(autodiff, "node", watching)
    for case in ONE_LEADING_AXIS:
        _check_case(case)
    assert seen == set(USED_BY_OPS)


def test_sigmoid_keeps_its_tails() -> None:
    x = autodiff.value(np.array([-800.0, -40.0, 40.0, 800.0]))
    result = autodiff.sigmoid(x)
    (gradient,) = autodiff.pull_back([result], [np.ones(4)], [x])
    tail = math.exp(-40.0)
    np.testing.assert_allclose(result.data, [0.0, tail, 1.0, 1.0], rtol=1e-15)
    np.testing.assert_allclose(gradient, [0.0, tail, tail, 0.0], rtol=1e-15)


def test_a_value_used_twice_collects_both_cotangents() -> None:
    x = autodiff.value(np.array([3.0]))
    square = x * x
    gradient = autodiff.pull_back([square, x], [np.array([1.0]), np.array([10.0])], [x])
    np.testing.assert_array_equal(gradient, [[16.0]])


def test_an_unused_primal_has_a_gradient_of_zeros() -> None:
    x = np.ones((2, 3, C))
    arrays = (x, x[:, 0], np.ones((2, 3)), np.ones((2, 3, 3)), *map(np.ones, _weights(3)))
    zeros = [np.zeros_like(a) for a in oracle.forward("combine_pre", arrays, variant=Variant())]
    zeros[0] += 1.0
    gradients = oracle.gradients("combine_pre", arrays, zeros, variant=Variant())
    assert not np.any(gradients[4])
    assert gradients[4].shape == arrays[4].shape


# --- forwards, against loops over single numbers ----------------------------------------------


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def _loop_sinkhorn(
    logits: NDArray[Any], iterations: int, eps: float, first: str, start: str = "softmax"
) -> NDArray[np.float64]:
    """Return section 3's division form, computed one line at a time; eps may be 0."""
    work = np.array(logits if first == "rows" else logits.T, dtype=np.float64)
    n = len(work)
    for i in range(n):
        top = max(work[i])
        exps = [math.exp(entry - top) for entry in work[i]]
        sums = math.fsum(exps)
        work[i] = [e / sums + eps if start == "softmax" else e / (sums + eps) for e in exps]
    for step in range(iterations):
        for i in range(n if step else 0):
            work[i] /= math.fsum(work[i]) + eps
        for j in range(n):
            work[:, j] /= math.fsum(work[:, j]) + eps
    return work if first == "rows" else work.T


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_sinkhorn_by_hand(first: str, eps: float, iterations: int, n: int) -> None:
    logits = np.random.default_rng(n).standard_normal((n, n)) * 3.0
    (found,) = oracle.forward("sinkhorn", [logits], iterations=iterations, eps=eps, first=first)
    np.testing.assert_allclose(found, _loop_sinkhorn(logits, iterations, eps, first), rtol=1e-13)


def test_sinkhorn_ends_with_the_other_lines() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 4, 4)) * 4.0
    for first, axis in (("columns", -1), ("rows", -2)):
        (found,) = oracle.forward("sinkhorn", [logits], iterations=1, first=first)
        np.testing.assert_allclose(found.sum(axis), 1.0, rtol=1e-14)
        assert np.abs(found.sum(-3 - axis) - 1.0).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_mappings_by_hand(name: str) -> None:
    variant = VARIANTS[name]
    n = 3
    rng = np.random.default_rng(3)
    x = rng.standard_normal((n, C))
    phi, scale, bias = (rng.standard_normal(shape) for shape in _weights(n))
    vec = [x[i, c] for i in range(n) for c in range(C)]
    root = math.sqrt(math.fsum(v * v for v in vec) / (n * C) + variant.norm_eps)
    r = 1 / (root + variant.norm_root_eps)
    z = [math.fsum(w * v for w, v in zip(row, vec, strict=True)) * r for row in phi]
    z = [z[k] * scale[0 if k < n else 1 if k < 2 * n else 2] + bias[k] for k in range(len(z))]
    logits = np.array([z[2 * n + i * n : 2 * n + i * n + n] for i in range(n)])
    logits = logits.T if variant.res_transposed else logits
    low, high = variant.sinkhorn_clamp or (-math.inf, math.inf)
    logits = np.array([[min(max(entry, low), high) for entry in row] for row in logits])
    expected = (
        [_sigmoid(v) + variant.pre_eps for v in z[:n]],
        [variant.post_scale * _sigmoid(v) + variant.post_eps for v in z[n : 2 * n]],
        _loop_sinkhorn(
            logits,
            variant.sinkhorn_iterations,
            variant.sinkhorn_eps,
            variant.sinkhorn_first,
            variant.sinkhorn_start,
        ),
    )
    found = oracle.forward("mappings", (x, phi, scale, bias), variant=variant)
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_combine_and_aggregate_by_hand() -> None:
    rng = np.random.default_rng(4)
    n = 3
    x, y = rng.standard_normal((n, C)), rng.standard_normal(C)
    h, H = rng.standard_normal(n), rng.standard_normal((n, n))
    mixed = [
        [math.fsum(H[i, j] * x[j, c] for j in range(n)) + h[i] * y[c] for c in range(C)]
        for i in range(n)
    ]
    collapsed = [math.fsum(h[i] * x[i, c] for i in range(n)) for c in range(C)]
    np.testing.assert_allclose(oracle.forward("combine", (x, y, h, H))[0], mixed, rtol=1e-13)
    np.testing.assert_allclose(oracle.forward("aggregate", (x, h))[0], collapsed, rtol=1e-13)
    gated = [
        [h[i] * (y[i] + math.fsum(H[i, j] * h[j] * x.T[c, j] for j in range(n))) for i in range(n)]
        for c in range(C)
    ]
    wide = (x.reshape(-1), np.repeat(y[:n], C), h, h, H)
    found = oracle.forward("gated_combine", wide)[0].reshape(n, C)
    np.testing.assert_allclose(found, np.transpose(gated), rtol=1e-13)


def test_rms_norm_and_static_layer_by_hand() -> None:
    rng = np.random.default_rng(5)
    n = 3
    x, weight = rng.standard_normal((n, C)), rng.standard_normal(C)
    a, b, H = (rng.standard_normal(shape) for shape in _static_shapes(n))
    collapsed = sum(_sigmoid(a[i]) * x[i] for i in range(n))
    y = collapsed / math.sqrt(np.mean(collapsed**2) + 1e-3) * weight
    mixed = _loop_sinkhorn(H, 7, 0.0, "rows") @ x
    expected = [mixed[i] + 2.0 * _sigmoid(b[i]) * y for i in range(n)]
    (found,) = oracle.forward("static_layer", (x, a, b, H, weight), eps=1e-3, iterations=7)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_combine_pre_is_combine_then_pre() -> None:
    rng = np.random.default_rng(6)
    shapes = next(case for case in CASES if str(case) == "combine_pre-given-v4-2x3x4x5").shapes
    arrays = [rng.standard_normal(shape) for shape in shapes]
    (x,) = oracle.forward("combine", arrays[:4])
    variant = VARIANTS["v4"]
    h, H_post, H_res = oracle.forward("pre", (x, *arrays[4:7]), variant=variant)
    found = oracle.forward("combine_pre", arrays[:7], variant=variant)
    for got, wanted in zip((*found[:2], *found[3:]), (x, h, H_post, H_res), strict=True):
        np.testing.assert_array_equal(got, wanted)
    given = oracle.forward("combine_pre", arrays, variant=variant)
    np.testing.assert_array_equal(given[1], oracle.forward("aggregate", (x, arrays[7]))[0])
    np.testing.assert_array_equal(given[2], found[2])


def test_combine_pre_reads_the_rounded_streams() -> None:
    rng = np.random.default_rng(6)
    shapes = next(case for case in CASES if str(case) == "combine_pre-v4-2x3x4x5").shapes
    arrays = [rng.standard_normal(shape) for shape in shapes]
    variant = VARIANTS["v4"]
    exact = oracle.forward("combine_pre", arrays, variant=variant)
    rounded = exact[0].astype(ml_dtypes.bfloat16)
    found = oracle.forward("combine_pre", arrays, variant=variant, x_rounded=rounded)
    np.testing.assert_array_equal(found[0], exact[0])
    h, H_post, H_res = oracle.forward("pre", (rounded, *arrays[4:]), variant=variant)
    for got, wanted in zip((found[1], *found[3:]), (h, H_post, H_res), strict=True):
        np.testing.assert_array_equal(got, wanted)
    # Only the second half is linearised elsewhere; the way back into combine is unchanged.
    cotangents = [rng.standard_normal(output.shape) for output in found]
    cotangents[2][:] = 0.0
    gradients = oracle.gradients(
        "combine_pre", arrays, cotangents, variant=variant, x_rounded=rounded
    )
    (from_pre, *_) = oracle.gradients(
        "pre", (rounded, *arrays[4:]), (cotangents[1], *cotangents[3:]), variant=variant
    )
    expected = oracle.gradients("combine", arrays[:4], (cotangents[0] + from_pre,))
    for got, wanted in zip(gradients[:4], expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


# --- edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_minus_infinity_is_an_entry_of_zero(first: str, eps: float) -> None:
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((3, 4, 4))
    logits[0, 1, 2] = logits[1][~np.eye(4, dtype=bool)] = -np.inf
    static = {"first": first, "eps": eps}
    (found,) = oracle.forward("sinkhorn", [logits], **static)
    (gradient,) = oracle.gradients("sinkhorn", [logits], [rng.standard_normal((3, 4, 4))], **static)
    nothing = np.isneginf(logits)
    if eps == 0:
        np.testing.assert_array_equal(found[nothing], 0.0)
    np.testing.assert_array_equal(gradient[nothing], 0.0)
    assert np.isfinite(found).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("first", ["columns", "rows"])
def test_log_domain_survives_lines_that_underflow(first: str, axis: int) -> None:
    logits = np.zeros((4, 4))
    np.moveaxis(logits, axis, 0)[1] = -5000.0
    (found,) = oracle.forward("sinkhorn", [logits], first=first)
    (gradient,) = oracle.gradients("sinkhorn", [logits], [np.eye(4)], first=first)
    np.testing.assert_allclose(found, 0.25, rtol=1e-12)
    np.testing.assert_allclose(gradient, np.eye(4) * 0.25 - 0.0625, atol=1e-15)


@pytest.mark.parametrize("log_space", [True, False])
def test_each_matrix_stops_by_itself(log_space: bool) -> None:
    rng = np.random.default_rng(9)
    scales = np.array([0.0, 0.1, 1.0, 4.0])[:, None, None]
    batch = rng.standard_normal((4, 3, 3)) * scales
    cotangent = rng.standard_normal(batch.shape)
    static = {"max_iterations": 30, "epsilon": 1e-4, "log_space": log_space}
    (found,) = oracle.forward("sinkhorn_knopp", [batch], **static)
    (gradient,) = oracle.gradients("sinkhorn_knopp", [batch], [cotangent], **static)
    for k, matrix in enumerate(batch):
        (alone,) = oracle.forward("sinkhorn_knopp", [matrix], **static)
        (slope,) = oracle.gradients("sinkhorn_knopp", [matrix], [cotangent[k]], **static)
        np.testing.assert_array_equal(found[k], alone)
        np.testing.assert_array_equal(gradient[k], slope)
        np.testing.assert_allclose(alone, _loop_knopp(matrix, 30, 1e-4), rtol=1e-12)


def _loop_knopp(matrix: NDArray[Any], max_iterations: int, epsilon: float) -> NDArray[Any]:
    P = np.exp(matrix)
    for _ in range(max_iterations):
        P = P / P.sum(-1, keepdims=True)
        P = P / P.sum(-2, keepdims=True)
        if abs(P.sum(-1) - 1).max() < epsilon and abs(P.sum(-2) - 1).max() < epsilon:
            break
    return P


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_narrow_floats_are_raised_exactly(dtype: Any) -> None:
    rng = np.random.default_rng(10)
    narrow = [rng.standard_normal(shape).astype(dtype) for shape in ((3, 4, C), (3, 4))]
    wide = [array.astype(np.float64) for array in narrow]
    (found,) = oracle.forward("aggregate", narrow)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, oracle.forward("aggregate", wide)[0])
    cotangent = rng.standard_normal((3, C)).astype(dtype)
    for gradient in oracle.gradients("aggregate", narrow, [cotangent]):
        assert gradient.dtype == np.float64


def test_one_stream_is_an_ordinary_residual() -> None:
    (found,) = oracle.forward("sinkhorn", [np.full((2, 1, 1), 300.0)])
    np.testing.assert_array_equal(found, 1.0)


def test_mistakes_are_named() -> None:
    square = np.ones((2, 2))
    with pytest.raises(KeyError, match="no op 'sinkhron'; it has aggregate, "):
        oracle.forward("sinkhron", [square])
    with pytest.raises(ValueError, match="needs 'columns' or 'rows'"):
        oracle.forward("sinkhorn", [square], first="row")
    with pytest.raises(ValueError, match="needs 'sum' or 'mean'"):
        oracle.forward("contract", [square], how="max")
    with pytest.raises(ValueError, match=r"cotangent has shape \(2,\), its output \(2, 2\)"):
        oracle.gradients("sinkhorn", [square], [np.ones(2)])


@pytest.mark.parametrize("module", [autodiff, oracle])
def test_the_oracle_shares_no_code_with_the_library(module: ModuleType) -> None:
    tree = ast.parse(inspect.getsource(module))
    named = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    named |= {n.module or "." for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    outside = {name for name in named if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside <= {"numpy", "numpy.typing", "mhc_conformance.autodiff"}
