"""static_mappings: kernels ``static_mappings`` and ``static_mappings_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(
    kernels: Kernels,
    h_pre_raw: Array,
    h_post_raw: Array,
    h_res_raw: Array,
    *,
    iterations: int,
) -> tuple[Array, Array, Array]:
    """(sigmoid, 2 sigmoid, sinkhorn with rows first and eps 0)."""
    inputs = _inputs(h_pre_raw, h_post_raw, h_res_raw)
    outputs = {
        "h_pre": Out(h_pre_raw.shape, FLOAT32),
        "h_post": Out(h_post_raw.shape, FLOAT32),
        "h_res": Out(h_res_raw.shape, FLOAT32),
    }
    sizes = _sizes(inputs["h_res_raw"])
    h_pre, h_post, h_res = kernels("static_mappings", inputs, outputs, sizes, ITERATIONS=iterations)
    return h_pre, h_post, h_res


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, iterations: int
) -> tuple[Array, Array, Array]:
    """The sigmoids' derivatives s (1 - s), and sinkhorn's vjp."""
    (h_pre_raw, h_post_raw, h_res_raw), (g_pre, g_post, g_res) = primals, cotangents
    inputs = _inputs(h_pre_raw, h_post_raw, h_res_raw)
    more = {"g_pre": tokens(g_pre, 1), "g_post": tokens(g_post, 1), "g_res": tokens(g_res, 2)}
    outputs = {
        "d_pre": Out.like(h_pre_raw),
        "d_post": Out.like(h_post_raw),
        "d_res": Out.like(h_res_raw),
    }
    sizes = _sizes(inputs["h_res_raw"])
    d_pre, d_post, d_res = kernels(
        "static_mappings_vjp", {**inputs, **more}, outputs, sizes, ITERATIONS=iterations
    )
    return d_pre, d_post, d_res


def _inputs(h_pre_raw: Array, h_post_raw: Array, h_res_raw: Array) -> dict[str, Array]:
    return {
        "h_pre_raw": tokens(h_pre_raw, 1),
        "h_post_raw": tokens(h_post_raw, 1),
        "h_res_raw": tokens(h_res_raw, 2),
    }


def _sizes(h_res_raw: Array) -> Sizes:
    return Sizes(h_res_raw.shape[0], h_res_raw.shape[-1], 1)
