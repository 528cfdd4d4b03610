"""Bugs of Sinkhorn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mhc_conformance import oracle
from mhc_conformance.autodiff import Value, exp, largest, maximum, node, total, value, where
from mhc_conformance.cases import NARROW
from mhc_conformance.patches.declaration import Array, Replaced, axes, patch, rounded, stopped


@patch("extra-pass", "an extra normalising pass at the end", "sinkhorn")
def _extra_pass(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = right(logits, iterations, eps, first)
        return matrix / (total(matrix, axes(first)[0]) + eps)

    return sinkhorn


@patch("missing-pass", "the last normalising pass is missing", "sinkhorn")
def _missing_pass(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a) + eps
        for axis in (b, a) * (iterations - 1):
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("exp-for-softmax", "exp where softmax + eps belongs", "sinkhorn")
def _exp_start(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = axes(first)
        matrix = exp(logits - largest(logits, a))
        for axis in (a, b) * iterations:
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("no-start-eps", "no eps is added to the softmax that starts Sinkhorn", "sinkhorn")
def _plain_start(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a)
        for axis in (b, *(a, b) * (iterations - 1)):
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("no-divisor-eps", "eps is added to the softmax alone, not to the divisors", "sinkhorn")
def _start_alone(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a) + eps
        for axis in (b, *(a, b) * (iterations - 1)):
            matrix = matrix / total(matrix, axis)
        return matrix

    return sinkhorn


def _floored(floor: float) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            matrix = exp(logits - largest(logits, axes(first)[0]))
            for axis in axes(first) * iterations:
                matrix = matrix / maximum(total(matrix, axis), floor)
            return matrix

        return sinkhorn

    return replacement


for _floor in (1e-12, 1e-10, 1e-8, 1e-6, 1e-5):
    patch(
        "sums-floored",
        f"a line's sum is raised to {_floor:g}, where the log domain has no floor",
        "sinkhorn",
    )(_floored(_floor))


def masked(floor: float, careful: bool) -> Replaced:
    """Return Sinkhorn that leaves faint first lines as they are, and makes faint second ones 0.

    ``where(sum > floor, 1 / sum, ...)`` that is not careful has 0 * inf in its gradient once the
    square of a sum is 0 in float32, as it is of a line that an iteration before made 0.
    """

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            a, b = axes(first)
            matrix = exp(logits - largest(logits, a))
            lost: Any = np.zeros((*matrix.shape[:-2], 1, 1), np.bool_)
            for _ in range(iterations):
                for axis, otherwise in ((a, 1.0), (b, 0.0)):
                    sums = total(matrix, axis)
                    squares: Any = np.asarray(sums.data, np.float32) ** 2
                    lost |= (squares == 0).any(axis=(-1, -2), keepdims=True)
                    there = sums.data > floor
                    safe = where(there, sums, value(np.ones_like(sums.data)))
                    matrix = matrix * where(there, 1.0 / safe, value(otherwise + 0 * sums.data))
            if careful:
                return matrix
            nan = np.where(lost, np.nan, 1.0)
            return node("where", matrix.data, (matrix,), lambda g: (np.asarray(g) * nan,))

        return sinkhorn

    return replacement


FAINT = (1e-5, 1e-6, 0.1)
for _floor in FAINT:
    patch(
        "faint-lines-masked",
        f"first lines that sum to {_floor:g} or less stay as they are, and second ones become 0",
        "sinkhorn",
    )(masked(_floor, careful=True))
    patch(
        "nan-where-masked",
        f"where(sum > {_floor:g}, 1 / sum, ...) has a NaN gradient where a line is 0",
        "sinkhorn",
    )(masked(_floor, careful=False))


@patch("stops-early", "Sinkhorn stops once both errors are under 1e-6", "sinkhorn")
def _stops(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        turned = logits if first == "rows" else logits.swapaxes(-1, -2)
        matrix = oracle.sinkhorn_knopp(turned, iterations, 1e-6)
        return matrix if first == "rows" else matrix.swapaxes(-1, -2)

    return sinkhorn


@patch(
    "potentials-in-float32",
    "Sinkhorn by potentials, f = -log sum exp(L + g) in float32: where logits are large, f and g "
    "cancel them and leave their roundings",
    "sinkhorn",
)
def _potentials(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        (a, b), x = axes(first), _single(logits.data)
        f = g = np.zeros_like(x)
        past = [(f, g)]
        for _ in range(iterations):
            f = _potential(_single(x + g), a)
            g = _potential(_single(x + f), b)
            past.append((f, g))

        def pull(cotangent: Array) -> tuple[Array]:
            carried = made = cotangent * _exp_sum(*past[-1], x)
            gathered = carried.sum(b, keepdims=True)
            for at in range(iterations, 0, -1):
                f, g = past[at]
                through_g = -gathered * _exp_sum(f, g, x)
                through_f = -(through_g + carried).sum(a, keepdims=True)
                through_f = through_f * _exp_sum(f, past[at - 1][1], x)
                gathered, carried = through_f.sum(b, keepdims=True), np.zeros_like(x)
                made = made + through_f + through_g
            return (made,)

        return node("sinkhorn", _exp_sum(f, g, x), (logits,), pull)

    return sinkhorn


def _single(data: Array) -> Array:
    return data.astype(np.float32).astype(np.float64)


def _potential(shifted: Array, axis: int) -> Array:
    top = shifted.max(axis, keepdims=True)
    sums = _single(np.exp(_single(shifted - top)).sum(axis, keepdims=True))
    return _single(-_single(np.log(sums)) - top)


def _exp_sum(f: Array, g: Array, x: Array) -> Array:
    return np.exp(_single(_single(f + x) + g))


def _iterated_in(dtype: str) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            a, b = axes(first)
            matrix = exp(logits - largest(logits, a))
            matrix = rounded(dtype, matrix / total(matrix, a) + eps)
            for axis in (b, *(a, b) * (iterations - 1)):
                matrix = rounded(dtype, matrix / rounded(dtype, total(matrix, axis) + eps))
            return matrix

        return sinkhorn

    return replacement


for _dtype in NARROW:
    patch(f"sinkhorn-in-{_dtype}", f"Sinkhorn run in {_dtype}", "sinkhorn")(_iterated_in(_dtype))


@patch("h-res-transposed", "H_res comes out transposed", "sinkhorn")
def _turned(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        return right(logits, iterations, eps, first).swapaxes(-1, -2)

    return sinkhorn


@patch("softmax-for-sinkhorn", "one softmax in place of Sinkhorn", "sinkhorn")
def _softmax(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = exp(logits - largest(logits, -1))
        return matrix / total(matrix, -1)

    return sinkhorn


@patch(
    "final-matrix-backward",
    "a Sinkhorn backward that uses the final matrix for every iteration",
    "sinkhorn",
    which="backward",
)
def _final_matrix(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = right(logits, iterations, eps, first).data
        a, b = axes(first)

        def pull(g: Array) -> tuple[Array]:
            carried = matrix * g
            for axis in (b, a) * iterations:
                carried = carried - matrix * carried.sum(axis=axis, keepdims=True)
            return (carried,)

        return node("sinkhorn", matrix, (logits,), pull)

    return sinkhorn


@patch("no-gradient-of-h-res", "no gradient passes through H_res", "sinkhorn", which="backward")
def _constant_h_res(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        return stopped(right(logits, iterations, eps, first))

    return sinkhorn
