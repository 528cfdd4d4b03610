"""Products over the streams and over the channels, in full float32."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

from mhc_core.math._xp.arrays import keeps_axes, sum_tokens, swap, tokens
from mhc_core.math._xp.devices import devices_of_channels, summed_over_devices
from mhc_core.math._xp.fusion import fused, on_gpu, on_two_cores, spreads, sums_pay, unrolled
from mhc_core.math._xp.libraries import Array, by_platform, is_from

__all__ = [
    "FOLDS",
    "collapse",
    "dot",
    "matmul",
    "mean_square",
    "mix",
    "outer",
]


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """Multiply matrices in full float32, which some libraries do not do by default on a GPU."""
    if is_from(xp, "jax"):
        if options := summed_over_devices(a):
            return xp.einsum("...ik,...kj->...ij", a, b, precision="highest", **options)
        return xp.matmul(a, b, precision="highest")
    if is_from(xp, "mlx") and on_gpu(xp) and os.environ.get("MLX_ENABLE_TF32") != "0":
        return _product_by_halves()(a, b)
    return xp.matmul(a, b)


def _matmul_by_halves(mx: Any, a: Array, b: Array) -> Array:
    """Multiply in float32 precision where the hardware multiplies in TF32, of 11 significant bits.

    a = a_1 + a_2 with a_1 the nearest in TF32; only a_2 @ b_2, of float32's rounding, is left out.
    """
    (a_1, a_2), (b_1, b_2) = _halves(mx, a), _halves(mx, b)
    return mx.matmul(a_1, b_1) + (mx.matmul(a_1, b_2) + mx.matmul(a_2, b_1))


@functools.cache
def _product_by_halves() -> Callable[..., Array]:
    """Return that product with gradients that are such products too, to any order.

    MLX's own derivative would multiply the cotangent in TF32.
    """
    import mlx.core as mx

    product = mx.custom_function(functools.partial(_matmul_by_halves, mx))

    def pullback(primals: Any, cotangent: Array, _: Any) -> tuple[Array, Array]:
        a, b = primals
        da = matmul(mx, cotangent, swap(mx, b))
        db = matmul(mx, swap(mx, a), cotangent)
        return _summed_to(mx, da, a.shape), _summed_to(mx, db, b.shape)

    product.vjp(pullback)
    return product


def _summed_to(mx: Any, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an array of that shape was broadcast."""
    extra = gradient.ndim - len(shape)
    gradient = mx.sum(gradient, axis=tuple(range(extra))) if extra else gradient
    repeated = tuple(k for k, n in enumerate(shape) if n == 1 and gradient.shape[k] != 1)
    return mx.sum(gradient, axis=repeated, keepdims=True) if repeated else gradient


def _halves(mx: Any, a: Array) -> tuple[Array, Array]:
    nearest = mx.view(mx.bitwise_and(mx.view(a, mx.uint32) + 0x1000, 0xFFFFE000), mx.float32)
    upper = a + mx.stop_gradient(nearest - a)  # exact, and its derivative is 1
    return upper, a - upper


def _tree(terms: list[Array]) -> Array:
    """Add in pairs: MLX's fused kernels run 1.5x faster without one long chain of sums."""
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = [one + two for one, two in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


def mix(xp: Any, h: Array, x: Array, plus: Array | None = None) -> Array:
    """sum_j h[..., i, j] x[..., j, C] (+ plus) -> [..., i, C]; h may lack the leading axes."""
    if sums_pay(xp, x.shape[-2]):
        terms = [h[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2])]
        return _tree(terms if plus is None else [*terms, plus])
    if plus is None:
        return matmul(xp, h, x)
    if is_from(xp, "mlx") and not on_gpu(xp):
        return xp.addmm(plus, h, x)  # a pass over the streams less than matmul and +
    return matmul(xp, h, x) + plus


def collapse(xp: Any, h: Array, x: Array) -> Array:
    """sum_i h[..., i] x[..., i, C] -> [..., C]; h may lack the leading axes."""
    if sums_pay(xp, x.shape[-2]):
        terms = [h[..., i, None] * x[..., i, :] for i in range(x.shape[-2])]
        return _tree(terms)
    if is_from(xp, "mlx") and on_gpu(xp):
        return xp.sum(h[..., None] * x, axis=-2)
    return matmul(xp, h[..., None, :], x)[..., 0, :]


def dot(xp: Any, a: Array, b: Array, like: Array | None = None) -> Array:
    """sum_C a[..., C] b[..., C] -> [...], also over the tokens that share ``like``."""
    shared = like is not None and like.ndim < a.ndim - 1
    return (_dot_all if shared else _dot_each)(xp, a, b)


@fused
def _dot_each(xp: Any, a: Array, b: Array) -> Array:
    if b.shape[-2:-1] == (1,) and not is_from(xp, "mlx"):
        return matmul(xp, a, swap(xp, b))[..., 0]  # XLA's sum takes 40 times as long on a CPU
    if not _folds(xp, a.shape[-1]):
        return xp.sum(a * b, axis=-1)
    return _sum_last(xp, _folded(a, b, -1) if unrolled.get() else a * b)


@fused
def _dot_all(xp: Any, a: Array, b: Array) -> Array:
    if keeps_axes(xp):
        return xp.sum(sum_tokens(xp, a * b, 2), axis=-1)
    a, b = tokens(xp, a, 2), tokens(xp, b, 2)
    products = _folded(a, b, 0) if unrolled.get() and a.shape[0] % FOLDS == 0 else a * b
    return xp.sum(xp.sum(products, axis=0), axis=-1)


def mean_square(xp: Any, x: Array, axes: int = 1) -> Array:
    """mean(x^2) over the last axis, or the last two, which become one axis of size 1.

    Streams of 1e18 have squares of 1e36, and float32 cannot hold the sum of 341 such squares. So
    the division by their number comes before the sum where that fuses, else after partial sums of
    at most 256 squares. Where the channels are on several devices, this is one device's part of the
    mean, for :func:`over_channels` to sum.
    """
    count = math.prod(x.shape[x.ndim - axes :])
    if keeps_axes(xp):
        last, count = tuple(range(-axes, 0)), count * devices_of_channels(xp)
        return xp.sum(x * (1 / max(count, 1)) * x, axis=last)[..., None]
    mean = _mean_square(xp, xp.reshape(x, (*x.shape[: x.ndim - axes], count)))[..., None]
    devices = devices_of_channels(xp)
    return mean if devices == 1 else mean / devices


@fused
def _mean_square(xp: Any, x: Array) -> Array:
    *ahead, size = x.shape
    each = 1 / max(size, 1)
    if is_from(xp, "mlx") and (unrolled.get() or on_gpu(xp)):
        if _folds(xp, size):
            return _sum_last(xp, _folded(x, x, -1, each))
        return xp.sum(x * each * x, axis=-1)
    across = 16 if _folds(xp, size) else 1  # as _sum_last: MLX's CPU adds one number at a time
    along = math.gcd(size // across, 256 // across)
    if along == 1:
        return xp.sum(x * each * x, axis=-1)
    some = xp.reshape(x * x, (*ahead, size // (along * across), along, across))
    return xp.sum(xp.sum(xp.sum(some, axis=-2) * each, axis=-1), axis=-1)


def outer(xp: Any, g: Array, x: Array, like: Array) -> Array:
    """sum_C g[..., i, C] x[..., j, C] -> [..., i, j], also over the tokens that share ``like``."""
    return (_outer_all if like.ndim < g.ndim else _outer_each)(xp, g, x)


@fused
def _outer_each(xp: Any, g: Array, x: Array) -> Array:
    if unrolled.get() and x.shape[-2] <= 8 and _folds(xp, x.shape[-1]):
        return _sum_last(xp, _folded(g[..., :, None, :], x[..., None, :, :], -1))
    return _times_transposed(xp, g, x)


@fused
def _outer_all(xp: Any, g: Array, x: Array) -> Array:
    if keeps_axes(xp):
        return sum_tokens(xp, _times_transposed(xp, g, x), 2)
    g, x = tokens(xp, g, 2), tokens(xp, x, 2)
    if unrolled.get() and x.shape[-2] <= 8 and x.shape[0] % FOLDS == 0:
        products = _folded(g[:, :, None, :], x[:, None, :, :], 0)
        return xp.sum(xp.sum(products, axis=0), axis=-1)
    return xp.sum(_times_transposed(xp, g, x), axis=0)


def _matmul_transposed(mx: Any, g: Array, x: Array) -> Array:
    return mx.matmul(g, swap(mx, x))


def _times_transposed(xp: Any, g: Array, x: Array) -> Array:
    if is_from(xp, "jax"):
        product = functools.partial(_einsum_transposed, xp)
        if x.shape[-2] > 8:
            return product(g, x)
        return by_platform(functools.partial(_sums_of_products, xp), product, g, x)
    if g.ndim == 3 and spreads(xp, g.shape[0]):
        halves = on_two_cores(xp, _matmul_transposed, g, x)
        return xp.concat(halves, axis=0)
    return matmul(xp, g, swap(xp, x))


def _einsum_transposed(xp: Any, g: Array, x: Array) -> Array:
    """Multiply in JAX: on a CPU twice as fast as with a transposed array."""
    options = summed_over_devices(g)
    return xp.einsum("...ic,...jc->...ij", g, x, precision="highest", **options)


def _sums_of_products(xp: Any, g: Array, x: Array) -> Array:
    """Multiply by sums over C, which XLA fuses on GPUs: a product first makes both float32.

    On an H200 (T = C = 4096, n = 4, bfloat16) the product and the conversions take 390 us.
    """
    columns = [xp.sum(g * x[..., j, None, :], axis=-1) for j in range(x.shape[-2])]
    return xp.stack(columns, axis=-1)


def _folds(xp: Any, size: int) -> bool:
    """Return whether a sum over C is better taken in steps: MLX's CPU adds one number at a time."""
    return is_from(xp, "mlx") and size % (16 * FOLDS) == 0 and not on_gpu(xp)


FOLDS = 4  # with twice as many blocks, what g++ makes of it runs out of registers


def _folded(a: Array, b: Array, axis: int, factor: float | None = None) -> Array:
    """Multiply, and add the blocks of an axis onto each other: one pass if it fuses.

    ``factor`` multiplies every block of ``a``: all of ``a`` at once would be kept in memory.
    """
    size = a.shape[axis] // FOLDS
    ahead = () if axis == 0 else (...,)
    parts = [(*ahead, slice(k * size, (k + 1) * size)) for k in range(FOLDS)]
    if factor is None:
        return _tree([a[part] * b[part] for part in parts])
    return _tree([a[part] * factor * b[part] for part in parts])


def _sum_last(mx: Any, a: Array) -> Array:
    """Sum the last axis in two steps, the first of which runs along contiguous numbers."""
    *ahead, size = a.shape  # named, as MLX infers no axis of an array without elements
    return mx.sum(mx.sum(mx.reshape(a, (*ahead, size // 16, 16)), axis=-2), axis=-1)
