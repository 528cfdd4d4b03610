"""Shapes, sums over tokens, and functions of numbers that hold at their extremes."""

from __future__ import annotations

import math
from typing import Any

from mhc_core.math._xp.libraries import Array, as_dtype_of, is_from, lax

__all__ = [
    "clamped",
    "constant",
    "doubled",
    "keeps_axes",
    "largest",
    "log_sum_exp",
    "share_of_largest",
    "shift",
    "sigmoid",
    "stopped",
    "sum_to",
    "sum_tokens",
    "swap",
    "tokens",
    "within",
]


def swap(xp: Any, array: Array) -> Array:
    """Transpose the last two axes."""
    return xp.matrix_transpose(array)


def keeps_axes(xp: Any) -> bool:
    """Return whether leading axes must not be merged.

    JAX may have sharded any axis over devices. Separately sharded axes cannot be merged without a
    gather, which Explicit meshes refuse.
    """
    return is_from(xp, "jax")


def tokens(xp: Any, array: Array, last: int) -> Array:
    """Flatten all but the last ``last`` axes into one; unlike -1 it works for zero tokens."""
    split = array.ndim - last
    count = math.prod(array.shape[:split])
    return xp.reshape(array, (count, *array.shape[split:]))


def sum_tokens(xp: Any, array: Array, last: int) -> Array:
    """Sum over all but the last ``last`` axes."""
    if keeps_axes(xp):
        return xp.sum(array, axis=tuple(range(array.ndim - last)))
    return xp.sum(tokens(xp, array, last), axis=0)


def sum_to(xp: Any, gradient: Array, like: Array) -> Array:
    """Sum a gradient over the tokens that shared ``like``, and cast it to its dtype."""
    if gradient.ndim > like.ndim:
        gradient = sum_tokens(xp, gradient, like.ndim)
    return as_dtype_of(xp, gradient, like)


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), exact far below zero and without overflow, differentiable at 0."""
    small = xp.exp(xp.where(z >= 0, -z, z))
    return xp.where(z >= 0, 1 / (1 + small), small / (1 + small))


def shift(xp: Any, logits: Array, axis: int) -> Array:
    """Return the largest entry along an axis, which stays with size 1, as a constant to autodiff.

    The shift cancels out of the result, but with a library's gradient of max it might not cancel
    exactly.
    """
    return stopped(xp, xp.max(logits, axis=axis, keepdims=True))


def largest(xp: Any, logits: Array, axis: int) -> Array:
    """Return the largest entry along an axis, which stays with size 1, with its derivative."""
    constant = shift(xp, logits, axis)
    # adds 0; the difference keeps the gradient alone, that of the library's own max cancels
    return constant + xp.sum(
        share_of_largest(xp, logits, axis)
        * xp.where(_ties(xp, logits, axis), logits - constant, 0),
        axis=axis,
        keepdims=True,
    )


def share_of_largest(xp: Any, logits: Array, axis: int) -> Array:
    """Return the derivative of the largest entry along an axis: 1, shared among equal entries."""
    ties = xp.astype(_ties(xp, logits, axis), logits.dtype)
    return ties / xp.sum(ties, axis=axis, keepdims=True)


def _ties(xp: Any, logits: Array, axis: int) -> Array:
    """Return which entries are the largest: at least one of a line, and NaN.

    A compiler may compute the entries twice, in two kernels that round differently (XLA does: a
    product and a sum may be rounded as one), and then none equals the largest. So one is found by
    its place too.
    """
    equal = xp.logical_not(logits < shift(xp, logits, axis))
    shape = [1] * logits.ndim
    shape[axis] = size = logits.shape[axis]
    places = xp.reshape(constant(xp, [float(k) for k in range(size)], logits), tuple(shape))
    place = xp.argmax(stopped(xp, logits), axis=axis, keepdims=True)
    return xp.logical_or(equal, places == xp.astype(place, logits.dtype))


def clamped(xp: Any, array: Array, bounds: tuple[float, float] | None) -> Array:
    """Return an array within bounds, NaN for NaN; entries beyond them have no derivative."""
    if bounds is None:
        return array
    low, high = bounds
    array = xp.where(array < low, low, array)
    return xp.where(array > high, high, array)


def within(xp: Any, gradient: Array, array: Array, bounds: tuple[float, float] | None) -> Array:
    """Return the gradient before :func:`clamped` from the one after it."""
    if bounds is None:
        return gradient
    low, high = bounds
    return xp.where(xp.logical_or(array < low, array > high), 0, gradient)


def doubled(xp: Any, half: Array) -> Array:
    """2 half, or -inf where that overflows the dtype: callers need only its exponential, 0."""
    if "numpy" in xp.__name__ and not is_from(xp, "jax"):
        with xp.errstate(over="ignore"):  # NumPy warns
            return 2 * half
    return 2 * half


def log_sum_exp(xp: Any, logits: Array, axis: int) -> Array:
    """log(sum(exp(logits))) along an axis, which stays with size 1; the largest entry shifts it."""
    largest = shift(xp, logits, axis)
    return largest + xp.log(xp.sum(xp.exp(logits - largest), axis=axis, keepdims=True))


def stopped(xp: Any, array: Array) -> Array:
    """Return the array as a constant to autodiff."""
    if is_from(xp, "jax"):
        return lax().stop_gradient(array)
    if is_from(xp, "mlx"):
        return xp.stop_gradient(array)
    return array.detach() if hasattr(array, "detach") else array


def constant(xp: Any, values: Any, like: Array) -> Array:
    """Return nested sequences of numbers as an array of the dtype of ``like``, on its device."""
    if is_from(xp, "mlx"):
        return xp.array(values, dtype=like.dtype)
    if is_from(xp, "jax"):
        return xp.asarray(values, dtype=like.dtype)
    device = getattr(like, "device", None)  # NumPy's arrays have one from 2.0 on
    return xp.asarray(values, dtype=like.dtype, **({} if device is None else {"device": device}))
