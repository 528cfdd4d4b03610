"""rms_norm: kernels ``rms_norm`` and ``rms_norm_vjp``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.launch import shares
from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: mx.array, weight: mx.array, *, eps: float) -> mx.array:
    """y = x / sqrt(mean(x^2) + eps) weight."""
    return normalised(kernels, x, weight, eps)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, eps: float
) -> tuple[mx.array, mx.array]:
    """dx = r (w g) - r^3 x mean(x w g); dweight = sum_T g x r."""
    (x, weight), (g,) = primals, cotangents
    dx, dweight = pullback(kernels, x, weight, g, eps)
    return dx, dweight.reshape(weight.shape).astype(weight.dtype)


def normalised(kernels: Kernels, x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return y in the dtype of x."""
    inputs = _inputs(x, weight, eps)
    return kernels("rms_norm", inputs, {"y": Out.like(x)}, _sizes(x))[0]


def pullback(
    kernels: Kernels, x: mx.array, weight: mx.array, g: mx.array, eps: float
) -> tuple[mx.array, mx.array]:
    """Return dx in the dtype of x, and dweight[1, C] in float32."""
    sizes = _sizes(x)
    inputs = {**_inputs(x, weight, eps), "g": tokens(g, 1)}
    parts = Out((shares("rms_norm_vjp", *sizes, kernels.dialect), sizes.C), mx.float32)
    dx, dweight = kernels("rms_norm_vjp", inputs, {"dx": Out.like(x), "dweight": parts}, sizes)
    return dx, kernels.sum_rows(dweight)


def _sizes(x: mx.array) -> Sizes:
    return Sizes.of(x[..., None, :])


def _inputs(x: mx.array, weight: mx.array, eps: float) -> dict[str, mx.array]:
    return {"x": tokens(x, 1), "weight": weight, "eps": mx.array([eps], mx.float32)}
