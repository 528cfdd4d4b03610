"""pre_scale: kernels ``pre_scale`` and ``pre_scale_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: Array, h_pre: Array) -> Array:
    """H_pre * x on the n slices of the last axis."""
    sizes, inputs = _inputs(x, h_pre)
    return kernels("pre_scale", inputs, {"out": Out.like(x)}, sizes)[0]


def vjp(kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None) -> tuple[Array, Array]:
    """dx = H_pre * g; dh_pre_i = x_i . g_i."""
    (x, h_pre), (g,) = primals, cotangents
    dx, dh_pre = scale_pullback(kernels, x, h_pre, g)
    return dx, kernels.sum_to(dh_pre, h_pre, 1)


def scale_pullback(kernels: Kernels, x: Array, h_pre: Array, g: Array) -> tuple[Array, Array]:
    """Return dx, and each token's dh_pre."""
    sizes, inputs = _inputs(x, h_pre)
    inputs["g"] = slices(g, sizes.n)
    outputs = {"dx": Out.like(x), "dh_pre": Out((sizes.T, sizes.n), FLOAT32)}
    dx, dh_pre = kernels("pre_scale_vjp", inputs, outputs, sizes)
    return dx, dh_pre


def slices(x: Array, n: int) -> Array:
    """View x[..., D] as [T, n, D / n]."""
    rows = tokens(x, 1)
    return rows.reshape(rows.shape[0], n, rows.shape[1] // n)


def _inputs(x: Array, h_pre: Array) -> tuple[Sizes, dict[str, Array]]:
    streams = slices(x, h_pre.shape[-1])
    return Sizes.of(streams), {"x": streams, "h_pre": tokens(h_pre, 1)}
