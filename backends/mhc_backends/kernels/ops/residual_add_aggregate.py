"""residual_add_aggregate: kernels ``residual_add_aggregate`` and ``residual_add_aggregate_vjp``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: mx.array, res: mx.array, h_pre: mx.array) -> list[mx.array]:
    """(x + res, sum_i h_pre_i (x + res)_i)."""
    sizes = Sizes.of(x)
    outputs = {"total": Out.like(x), "h": Out((*x.shape[:-2], sizes.C), x.dtype)}
    return kernels("residual_add_aggregate", _inputs(x, res, h_pre), outputs, sizes)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None
) -> tuple[mx.array, mx.array, mx.array]:
    """dx = dres = g_x + h_pre (outer) g_h; dh_pre_i = (x + res)_i . g_h."""
    (x, res, h_pre), (g_x, g_h) = primals, cotangents
    sizes = Sizes.of(x)
    inputs = {**_inputs(x, res, h_pre), "g": tokens(g_x, 2), "g_h": tokens(g_h, 1)}
    dtype = x.dtype if x.dtype == res.dtype else mx.float32  # each is rounded once
    outputs = {"dx": Out(x.shape, dtype), "dh_pre": Out((sizes.T, sizes.n), mx.float32)}
    dx, dh_pre = kernels("residual_add_aggregate_vjp", inputs, outputs, sizes)
    return dx.astype(x.dtype), dx.astype(res.dtype), kernels.sum_to(dh_pre, h_pre, 1)


def _inputs(x: mx.array, res: mx.array, h_pre: mx.array) -> dict[str, mx.array]:
    return {"x": tokens(x, 2), "res": tokens(res, 2), "h_pre": tokens(h_pre, 1)}
