"""The projection of the streams, vec(x) @ phi.T, and its two gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mhc_core.math._xp.arrays import keeps_axes, swap, tokens
from mhc_core.math._xp.devices import (
    explicit_sharding,
    placed,
    resharded,
    split_last,
    summed_over_devices,
)
from mhc_core.math._xp.fusion import on_gpu, on_two_cores, spreads
from mhc_core.math._xp.libraries import Array, is_from, lax
from mhc_core.math._xp.products import matmul

__all__ = [
    "gram",
    "merged",
    "project",
    "unproject",
]


def project(xp: Any, x: Array, phi: Array) -> Array:
    """vec(x)[..., n C] @ phi[m, n C].T -> [..., m] in full float32.

    phi stays as checkpoints store it, and x[..., n, C] as it is.
    """
    if keeps_axes(xp):
        both = ((x.ndim - 2, x.ndim - 1), (1, 2))
        return _dot_general(x, _by_stream(xp, phi, x), both, **summed_over_devices(x, 2))
    columns = swap(xp, phi)
    flat = xp.reshape(x, (math.prod(x.shape[:-2]), phi.shape[1]))
    if is_from(xp, "mlx") and flat.shape[0] > 2 and not on_gpu(xp):
        columns = xp.contiguous(columns)  # MLX's CPU matmul is 1.5x slower along a strided phi
    return xp.reshape(_rows(xp, flat, columns), (*x.shape[:-2], phi.shape[0]))


def unproject(xp: Any, du: Array, phi: Array, x: Array) -> Array:
    """du[..., m] @ phi[m, n C] -> [..., n, C], the shape of x."""
    if keeps_axes(xp):
        return _dot_general(du, _by_stream(xp, phi, x), ((du.ndim - 1,), (0,)))
    return xp.reshape(_rows(xp, tokens(xp, du, 1), phi), x.shape)


def gram(xp: Any, du: Array, x: Array, like: Array) -> Array:
    """Sum du[..., m] (outer) vec(x)[..., n C] over all tokens -> [m, n C], the shape of phi."""
    if keeps_axes(xp):
        leading = tuple(range(x.ndim - 2))
        contracted = (leading, leading)
        return xp.reshape(_on_devices_of(like, x, _dot_general, du, x, contracted), like.shape)
    du = tokens(xp, du, 1)
    x = xp.reshape(x, (du.shape[0], like.shape[1]))
    if not spreads(xp, x.shape[0]):
        return matmul(xp, swap(xp, du), x)
    first, second = on_two_cores(xp, _gram_in_blocks, du, x)
    return first + second


def merged(xp: Any, gradient: Array, like: Array) -> Array:
    """Return the gradient [n, C] of a weight for every stream as [n C], on its devices.

    Where Explicit axes shard the channels, JAX does not merge the axes by itself.
    """
    sharding = explicit_sharding(gradient) if keeps_axes(xp) else None
    if sharding is not None:
        gradient = resharded(gradient, sharding, (None, None))
    return xp.reshape(gradient, like.shape)


def _by_stream(xp: Any, phi: Array, x: Array) -> Array:
    """phi[m, n C] -> [m, n, C]: neither x's axes nor their sharding are merged.

    Where Explicit axes shard x's channels, each device takes its part of phi: with a whole phi, JAX
    would gather the streams.
    """
    phi = xp.reshape(phi, (phi.shape[0], *x.shape[-2:]))
    sharding = explicit_sharding(x)
    if sharding is None or sharding.spec[-1] is None:
        return phi
    return resharded(phi, sharding, (None, None, sharding.spec[-1]))


def _dot_general(a: Array, b: Array, contracted: Any, **options: Any) -> Array:
    """Contract axes of JAX arrays in full float32."""
    dimensions = (contracted, ((), ()))
    return lax().dot_general(a, b, dimensions, precision="highest", **options)


def _on_devices_of(like: Array, x: Array, product: Callable[..., Array], *given: Any) -> Array:
    """Return a product [m, n, C], a sum over tokens, on every device of ``like`` [m, n C].

    Where Explicit axes shard x's channels, each device sums its own before they are gathered.
    """
    sharding, of_x = explicit_sharding(like), explicit_sharding(x)
    if sharding is None:
        return product(*given)
    whole = split_last(sharding)
    if of_x is None or of_x.spec[-1] is None:
        return product(*given, out_sharding=whole)
    rows = (*tuple(whole.spec)[:1], None, of_x.spec[-1])
    parts = product(*given, out_sharding=placed(sharding, rows))
    return resharded(parts, sharding, tuple(whole.spec))


def _rows(xp: Any, a: Array, b: Array) -> Array:
    """a[T, K] @ b[K, m] -> [T, m], the tokens spread over the cores."""
    if not spreads(xp, a.shape[0]):
        return matmul(xp, a, b)

    def times(mx: Any, half: Array) -> Array:
        return mx.matmul(half, b)

    return xp.concat(on_two_cores(xp, times, a), axis=0)


def _gram_in_blocks(mx: Any, du: Array, x: Array, block: int = 32) -> Array:
    """Sum over blocks of tokens, which stay in the cache and lose fewer bits."""
    if x.shape[0] % block:
        return mx.matmul(swap(mx, du), x)
    count = x.shape[0] // block
    du = mx.reshape(du, (count, block, du.shape[-1]))
    x = mx.reshape(x, (count, block, x.shape[-1]))
    return mx.sum(mx.matmul(swap(mx, du), x), axis=0)
