"""What the maths needs beyond the array API standard: the only file that tells libraries apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = [
    "cast",
    "collapse",
    "inner",
    "log_sum_exp",
    "matmul",
    "mix",
    "namespace",
    "outer",
    "project",
    "scan",
    "scan_back",
    "scan_while",
    "sigmoid",
    "sum_to",
    "swap",
    "tokens",
    "up",
]

Array = Any


# ------------------------------------------------------------------------- namespaces and dtypes


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array."""
    from array_api_compat import array_namespace

    return array_namespace(array)


def _is(xp: Any, library: str) -> bool:
    return xp.__name__.partition(".")[0] == library


def up(xp: Any, array: Array) -> Array:
    """Take an array to the dtype of computation: float32, or float64 for float64."""
    wide = str(array.dtype).endswith("float64")
    return xp.astype(array, xp.float64 if wide else xp.float32)


def cast(xp: Any, array: Array, like: Array) -> Array:
    """Take a result to the dtype of ``like``."""
    return xp.astype(array, like.dtype)


# ------------------------------------------------------------------------------ shapes and sums


def swap(xp: Any, array: Array) -> Array:
    """Transpose the last two axes."""
    return xp.matrix_transpose(array)


def tokens(xp: Any, array: Array, last: int) -> Array:
    """Flatten all but the last ``last`` axes into one; unlike -1 it works for zero tokens."""
    split = array.ndim - last
    count = math.prod(array.shape[:split])
    return xp.reshape(array, (count, *array.shape[split:]))


def sum_to(xp: Any, gradient: Array, like: Array) -> Array:
    """Sum a gradient over the tokens that shared ``like``, and cast it to its dtype."""
    if gradient.ndim > like.ndim:
        gradient = xp.sum(tokens(xp, gradient, like.ndim), axis=0)
    return cast(xp, gradient, like)


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), exact far below zero and without overflow, differentiable at 0."""
    small = xp.exp(xp.where(z >= 0, -z, z))
    return xp.where(z >= 0, 1 / (1 + small), small / (1 + small))


def log_sum_exp(xp: Any, logits: Array, axis: int) -> Array:
    """log(sum(exp(logits))) along an axis that is kept, shifted by its largest entry."""
    largest = xp.max(logits, axis=axis, keepdims=True)
    return largest + xp.log(xp.sum(xp.exp(logits - largest), axis=axis, keepdims=True))


# ----------------------------------------------------------------------- products over the streams
# MLX has these as sums of products: inside mx.compile they fuse into one pass over the streams
# (2x faster than its matmul on a CPU), and a float32 matmul is TF32 by default on some GPUs.


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """Multiply matrices in full float32, which JAX on a GPU or TPU has to be asked for."""
    if _is(xp, "jax"):
        return xp.matmul(a, b, precision="highest")
    return xp.matmul(a, b)


def _fuses(xp: Any, terms: int) -> bool:
    return _is(xp, "mlx") and terms <= 8


def mix(xp: Any, h: Array, x: Array) -> Array:
    """sum_j h[..., i, j] x[..., j, C] -> [..., i, C]; h may lack the leading axes."""
    if not _fuses(xp, x.shape[-2]):
        return matmul(xp, h, x)
    terms = [h[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2])]
    return sum(terms[1:], terms[0])


def collapse(xp: Any, h: Array, x: Array) -> Array:
    """sum_i h[..., i] x[..., i, C] -> [..., C]; h may lack the leading axes."""
    if not _fuses(xp, x.shape[-2]):
        return matmul(xp, h[..., None, :], x)[..., 0, :]
    terms = [h[..., i, None] * x[..., i, :] for i in range(x.shape[-2])]
    return sum(terms[1:], terms[0])


def outer(xp: Any, g: Array, x: Array) -> Array:
    """sum_C g[..., i, C] x[..., j, C] -> [..., i, j]."""
    return matmul(xp, g, swap(xp, x))


def inner(xp: Any, g: Array, y: Array) -> Array:
    """sum_C g[..., i, C] y[..., C] -> [..., i]."""
    if _is(xp, "mlx"):
        return xp.sum(g * y[..., None, :], axis=-1)
    return matmul(xp, g, y[..., :, None])[..., 0]


def project(xp: Any, x: Array, phi: Array) -> Array:
    """x[T, K] @ phi[m, K].T -> [T, m] in full float32; phi stays as checkpoints store it."""
    return matmul(xp, x, swap(xp, phi))


# -------------------------------------------------------------------------------------- iterations


def scan(xp: Any, step: Callable[[Any], tuple[Any, Any]], state: Any, length: int):
    """Apply ``state, kept = step(state)`` repeatedly; return the state and all that was kept.

    JAX loops on the device, so that compile time does not grow with ``length``.
    """
    if _is(xp, "jax"):
        from jax import lax

        return lax.scan(lambda state, _: step(state), state, None, length=length)
    kept: list[Any] = []
    for _ in range(length):
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def scan_back(xp: Any, step: Callable[[Any, Any], Any], state: Any, kept: Any) -> Any:
    """Apply ``state = step(state, keep)`` to what :func:`scan` kept, last first."""
    if _is(xp, "jax"):
        from jax import lax

        return lax.scan(lambda s, keep: (step(s, keep), None), state, kept, reverse=True)[0]
    for keep in reversed(kept):
        state = step(state, keep)
    return state


def scan_while(
    xp: Any,
    step: Callable[[Any], tuple[Any, Any]],
    idle: Callable[[Any], tuple[Any, Any]],
    state: Any,
    length: int,
):
    """Scan as long as ``state.active`` holds anywhere.

    ``step`` must leave what is not active as it is, so that stopping early changes no bit. Where
    the values can be looked at, the loop stops; in JAX the remaining steps run ``idle``, which
    costs nothing; inside MLX's transformations nobody can look, so every step is taken.
    """
    if _is(xp, "jax"):
        from jax import lax

        def either(state: Any, _: Any) -> Any:
            return lax.cond(xp.any(state.active), step, idle, state)

        return lax.scan(either, state, None, length=length)
    kept: list[Any] = []
    for _ in range(length):
        if _known_false(xp, state.active):
            break
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def _known_false(xp: Any, active: Array) -> bool:
    try:
        return not bool(xp.any(active))
    except ValueError:  # MLX's word for a value that is being traced
        return False
