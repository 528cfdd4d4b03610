"""residual_add_aggregate: kernels ``residual_add_aggregate`` and ``residual_add_aggregate_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: Array, res: Array, h_pre: Array) -> list[Array]:
    """(x + res, sum_i h_pre_i (x + res)_i)."""
    sizes = Sizes.of(x)
    outputs = {"total": Out.like(x), "h": Out((*x.shape[:-2], sizes.C), x.dtype)}
    return kernels("residual_add_aggregate", _inputs(x, res, h_pre), outputs, sizes)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None
) -> tuple[Array, Array, Array]:
    """dx = dres = g_x + h_pre (outer) g_h; dh_pre_i = (x + res)_i . g_h."""
    (x, res, h_pre), (g_x, g_h) = primals, cotangents
    sizes = Sizes.of(x)
    inputs = {**_inputs(x, res, h_pre), "g": tokens(g_x, 2), "g_h": tokens(g_h, 1)}
    dtype = x.dtype if x.dtype == res.dtype else FLOAT32  # each is rounded once
    outputs = {"dx": Out(x.shape, dtype), "dh_pre": Out((sizes.T, sizes.n), FLOAT32)}
    dx, dh_pre = kernels("residual_add_aggregate_vjp", inputs, outputs, sizes)
    (dh_pre,) = kernels.over_channels(dh_pre)
    cast = kernels.host.cast
    return (
        cast(dx, x.dtype),
        cast(dx, res.dtype),
        kernels.sum_to(dh_pre, h_pre, 1),
    )


def _inputs(x: Array, res: Array, h_pre: Array) -> dict[str, Array]:
    return {"x": tokens(x, 2), "res": tokens(res, 2), "h_pre": tokens(h_pre, 1)}
