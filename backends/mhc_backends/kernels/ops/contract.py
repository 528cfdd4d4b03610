"""contract: the kernel ``aggregate`` with the same weight for every stream; MLX repeats a gradient.

The weights are constants and get no gradient.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: mx.array, *, how: str) -> mx.array:
    """h = sum_i x_i, or their mean."""
    return collapsed(kernels, x, 1 / x.shape[-2] if how == "mean" else 1.0, x.dtype)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, how: str
) -> tuple[mx.array]:
    """dx_i = g, or g / n."""
    (x,), (g,) = primals, cotangents
    n = x.shape[-2]
    each = (g.astype(mx.float32) / n if how == "mean" else g).astype(x.dtype)
    return (repeated(each, n),)


def collapsed(kernels: Kernels, x: mx.array, weight: float, dtype: mx.Dtype) -> mx.array:
    """Return sum_i weight x_i."""
    sizes = Sizes.of(x)
    weights = mx.array([[weight] * sizes.n], mx.float32)
    outputs = {"h": Out((*x.shape[:-2], sizes.C), dtype)}
    return kernels("aggregate", {"x": tokens(x, 2), "h_pre": weights}, outputs, sizes)[0]


def repeated(h: mx.array, n: int) -> mx.array:
    """Return n streams that are each h, written once: every kernel would copy a broadcast view."""
    streams = mx.broadcast_to(h[..., None, :], (*h.shape[:-1], n, h.shape[-1]))
    return mx.contiguous(streams)
