"""Bugs of Sinkhorn, forward and backward."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mhc_conformance.bugs.declaration import Array, Op, bug, right, right_vjp


def _axes(first: str) -> tuple[int, int]:
    return (-2, -1) if first == "columns" else (-1, -2)


def _divisions(
    powers: Array, iterations: int, eps: float, first: str
) -> tuple[Array, list[tuple[Array, Array, int]]]:
    """Iterate by division from exp(logits); return each quotient, its divisor and its axis too."""
    a, b = _axes(first)
    matrix, steps = powers, list[tuple[Array, Array, int]]()
    for index, axis in enumerate((a, b) * iterations):
        divisor = matrix.sum(axis=axis, keepdims=True) + np.float32(eps if index else 0)
        quotient = matrix / divisor
        steps.append((quotient, divisor, axis))
        matrix = quotient + np.float32(0 if index else eps)
    return matrix, steps


@bug(
    "exp-for-softmax",
    "exp where softmax + eps belongs",
    op="sinkhorn",
    says="eps",
)
def exp_for_softmax(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Start from exp + eps, shifted, where softmax + eps belongs."""
    if eps == 0:
        return right("sinkhorn")(logits, iterations=iterations, eps=eps, first=first)
    a, b = _axes(first)
    upcast = logits.astype(np.float32)
    matrix = np.exp(upcast - upcast.max(axis=(-1, -2), keepdims=True)) + eps
    for axis in (b, *(a, b) * (iterations - 1)):
        matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + eps)
    return matrix.astype(np.float32)


@bug(
    "no-max-shift",
    "no max shift: overflow above 88",
    op="sinkhorn",
    says="beyond exp's range",
)
def unshifted(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Take exp of the logits as they are: above 88 it is inf, and inf / inf is NaN."""
    return _divisions(np.exp(logits.astype(np.float32)), iterations, eps, first)[0]


def sinkhorn_in(dtype: Any) -> Op:
    """Keep the matrix of Sinkhorn's iterations in a narrow dtype."""

    def wrong(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
        a, b = _axes(first)
        upcast = logits.astype(np.float32)
        powers = np.exp(upcast - upcast.max(axis=a, keepdims=True))
        start = powers / powers.sum(axis=a, keepdims=True) + np.float32(eps)
        matrix = start.astype(dtype)
        matrix = matrix / (matrix.sum(axis=b, keepdims=True) + dtype(eps))
        for axis in (a, b) * (iterations - 1):
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + dtype(eps))
        return matrix.astype(np.float32)

    return wrong


bug(
    "sinkhorn-in-bfloat16",
    "Sinkhorn run in bfloat16",
    op="sinkhorn",
    says="h_res",
)(sinkhorn_in(ml_dtypes.bfloat16))


bug(
    "sinkhorn-in-float16",
    "Sinkhorn run in float16",
    op="sinkhorn",
    says="h_res",
)(sinkhorn_in(np.float16))


bug(
    "narrow-logits",
    "Sinkhorn of bfloat16 logits in bfloat16",
    op="sinkhorn",
    says="h_res",
    dtype="bfloat16",
    shipped=False,
)(sinkhorn_in(ml_dtypes.bfloat16))


@bug(
    "extra-pass",
    "an extra normalising pass",
    op="sinkhorn",
    says="h_res",
)
def extra_pass(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise once more at the end, so that the other axis sums to 1."""
    matrix = right("sinkhorn")(logits, iterations=iterations, eps=eps, first=first)
    return matrix / (matrix.sum(axis=_axes(first)[0], keepdims=True) + eps)


@bug(
    "wrong-axes",
    "batched matrices normalised on the wrong axes",
    op="sinkhorn",
    says="h_res",
)
def on_leading_axes(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise the first two axes, which are the matrix only if there is no batch."""
    options: dict[str, Any] = {"iterations": iterations, "eps": eps, "first": first}
    if logits.ndim == 2 or not logits.size:
        return right("sinkhorn")(logits, **options)
    matrices = np.moveaxis(logits, (0, 1), (-2, -1))
    return np.moveaxis(right("sinkhorn")(matrices, **options), (-2, -1), (0, 1))


@bug(
    "rows-first",
    "rows before columns",
    op="sinkhorn",
    says="h_res of",
    shipped=False,
)
def rows_first(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise rows first, also if first="columns"."""
    return right("sinkhorn")(logits, iterations=iterations, eps=eps, first="rows")


@bug(
    "knopp-transposed",
    "columns before rows in sinkhorn_knopp",
    op="sinkhorn_knopp",
    says="h_res",
    shipped=False,
)
def knopp_of_transpose(matrix: Array, **static: Any) -> Array:
    """Normalise columns before rows; sinkhorn_knopp normalises rows first."""
    return right("sinkhorn_knopp")(matrix.swapaxes(-1, -2), **static).swapaxes(-1, -2)


@bug(
    "other-eps-backward",
    "eps differing between forward and backward",
    op="sinkhorn",
    half="vjp",
    says="eps=0.1",
)
def other_eps(op: str, primals: Any, cotangents: Any, *, eps: float, **static: Any) -> Any:
    """Use another eps in the backward: at most 1e-3."""
    return right_vjp(op, primals, cotangents, eps=min(eps, 1e-3), **static)


@bug(
    "iteration-less-backward",
    "one iteration less in the backward",
    op="sinkhorn",
    half="vjp",
    says="d logits of",
    shipped=False,
)
def iteration_less(op: str, primals: Any, cotangents: Any, *, iterations: int, **rest: Any) -> Any:
    """Run one iteration less in the backward."""
    return right_vjp(op, primals, cotangents, iterations=max(1, iterations - 1), **rest)


@bug(
    "zero-gradient-at-init",
    "zero gradient of H_res at a common init",
    op="sinkhorn",
    half="vjp",
    says="d logits of all logits equal",
)
def masked_where_zero(op: str, primals: Any, cotangents: Any, **static: Any) -> tuple[Array]:
    """Treat a logit of 0 as padding without a gradient: at a common init all logits are 0."""
    (gradient,) = right_vjp(op, primals, cotangents, **static)
    return ((gradient * (primals[0] != 0)).astype(gradient.dtype),)


@bug(
    "final-matrix-backward",
    "a Sinkhorn backward that uses the final matrix for every iteration",
    op="sinkhorn",
    half="vjp",
    says="d logits of",
)
def final_matrix_backward(
    op: str, primals: Any, cotangents: Any, *, iterations: int, eps: float, first: str
) -> tuple[Array]:
    """Differentiate every iteration with the matrix of the last one."""
    (logits,), (g,) = primals, cotangents
    options: dict[str, Any] = {"iterations": iterations, "eps": eps, "first": first}
    matrix = right("sinkhorn")(logits, **options)
    a, b = _axes(first)
    carried = matrix * g
    for axis in (b, a) * iterations:
        carried = carried - matrix * carried.sum(axis=axis, keepdims=True)
    return (carried.astype(logits.dtype),)


@bug(
    "unshifted-exp-backward",
    "division gradients overflowing on unshifted exp",
    op="sinkhorn",
    half="vjp",
    says="beyond exp's range",
)
def unshifted_backward(
    op: str, primals: Any, cotangents: Any, *, iterations: int, eps: float, first: str
) -> tuple[Array]:
    """Go back through the divisions from exp(logits), whose overflow no shift prevents."""
    (logits,), (g,) = primals, cotangents
    powers = np.exp(logits.astype(np.float32))
    _, steps = _divisions(powers, iterations, eps, first)
    carried = g.astype(np.float32)
    for quotient, divisor, axis in reversed(steps):
        inner = (carried * quotient).sum(axis=axis, keepdims=True)
        carried = (carried - inner) / divisor
    return ((carried * powers).astype(logits.dtype),)
