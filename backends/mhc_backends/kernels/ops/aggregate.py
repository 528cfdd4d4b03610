"""aggregate: kernels ``aggregate`` and ``aggregate_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: Array, h_pre: Array) -> Array:
    """h = sum_i h_pre_i x_i."""
    sizes = Sizes.of(x)
    inputs = {"x": tokens(x, 2), "h_pre": tokens(h_pre, 1)}
    outputs = {"h": Out((*x.shape[:-2], sizes.C), x.dtype)}
    return kernels("aggregate", inputs, outputs, sizes)[0]


def vjp(kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None) -> tuple[Array, Array]:
    """dx_i = h_pre_i dh; dh_pre_i = sum_C x_i dh."""
    (x, h_pre), (g,) = primals, cotangents
    sizes = Sizes.of(x)
    inputs = {"x": tokens(x, 2), "h_pre": tokens(h_pre, 1), "g": tokens(g, 1)}
    outputs = {"dx": Out.like(x), "dh_pre": Out((sizes.T, sizes.n), FLOAT32)}
    dx, dh_pre = kernels("aggregate_vjp", inputs, outputs, sizes)
    (dh_pre,) = kernels.over_channels(dh_pre)
    return dx, kernels.sum_to(dh_pre, h_pre, 1)
