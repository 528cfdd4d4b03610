"""contract: the kernel ``aggregate``, all weights the same; the host repeats a gradient.

The weights are constants and get no gradient.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: Array, *, how: str) -> Array:
    """h = sum_i x_i, or their mean."""
    return collapsed(kernels, x, 1 / x.shape[-2] if how == "mean" else 1.0, x.dtype)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, how: str
) -> tuple[Array]:
    """dx_i = g, or g / n."""
    (x,), (g,) = primals, cotangents
    n = x.shape[-2]
    cast = kernels.host.cast
    each = cast(cast(g, FLOAT32) / n if how == "mean" else g, x.dtype)
    return (kernels.host.repeat(each, n),)


def collapsed(kernels: Kernels, x: Array, weight: float, dtype: Any) -> Array:
    """Return sum_i weight x_i."""
    sizes = Sizes.of(x)
    weights = kernels.host.constant([[weight] * sizes.n])
    outputs = {"h": Out((*x.shape[:-2], sizes.C), dtype)}
    return kernels("aggregate", {"x": tokens(x, 2), "h_pre": weights}, outputs, sizes)[0]
