"""rms_norm: kernels ``rms_norm`` and ``rms_norm_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens
from mhc_backends.kernels.launch import shares


def forward(kernels: Kernels, x: Array, weight: Array, *, eps: float) -> Array:
    """y = x / sqrt(mean(x^2) + eps) weight."""
    return normalised(kernels, x, weight, eps)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, eps: float
) -> tuple[Array, Array]:
    """dx = r (w g) - r^3 x mean(x w g); dweight = sum_T g x r."""
    (x, weight), (g,) = primals, cotangents
    dx, dweight = pullback(kernels, x, weight, g, eps)
    return dx, kernels.host.cast(dweight.reshape(weight.shape), weight.dtype)


def normalised(kernels: Kernels, x: Array, weight: Array, eps: float) -> Array:
    """Return y in the dtype of x."""
    inputs = _inputs(kernels, x, weight, eps)
    return kernels("rms_norm", inputs, {"y": Out.like(x)}, _sizes(x))[0]


def pullback(
    kernels: Kernels, x: Array, weight: Array, g: Array, eps: float
) -> tuple[Array, Array]:
    """Return dx in the dtype of x, and dweight[1, C] in float32."""
    sizes = _sizes(x)
    inputs = {**_inputs(kernels, x, weight, eps), "g": tokens(g, 1)}
    parts = Out((shares("rms_norm_vjp", *sizes, kernels.dialect), sizes.C), FLOAT32)
    dx, dweight = kernels("rms_norm_vjp", inputs, {"dx": Out.like(x), "dweight": parts}, sizes)
    return dx, kernels.sum_rows(dweight)


def _sizes(x: Array) -> Sizes:
    return Sizes.of(x[..., None, :])


def _inputs(kernels: Kernels, x: Array, weight: Array, eps: float) -> dict[str, Array]:
    return {"x": tokens(x, 1), "weight": weight, "eps": kernels.host.constant([eps])}
