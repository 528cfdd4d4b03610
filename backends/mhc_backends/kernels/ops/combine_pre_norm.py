"""combine_pre_norm: the kernels of ``combine_pre``, the last of which also normalises h'.

The vjp is pre_norm's, then combine's.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, **static: Any) -> tuple[Array | None, ...]:
    """(x', rms_norm(h'), H_pre', H_post', H_res', h'), with None for h' unless ``h_raw``."""
    return forward_with_saved(kernels, *primals, **static, saves=False)[0]


def forward_with_saved(
    kernels: Kernels,
    x: Array,
    y: Array,
    h_post: Array,
    h_res: Array | None,
    phi: Array,
    scale: Array,
    bias: Array,
    h_norm_weight: Array,
    h_pre: Array | None = None,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
    saves: bool = True,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, x' and the projection of x'."""
    norm = _projection.Norm(h_norm_weight, h_norm_eps, h_raw)
    x_new, sums = _projection.combine_project(
        kernels, x, y, h_post, h_res, phi, variant.mixes, norms=True
    )
    made = _projection.pre_norm(kernels, x_new, sums, scale, bias, h_pre, norm, variant, saves)
    outputs = (x_new, made.h, made.h_pre, made.h_post, made.h_res, made.raw)
    return outputs, (x_new, *made.saved, made.h_pre)


def vjp(
    kernels: Kernels,
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
) -> tuple[Array, ...]:
    """Pull back through the next pre_norm, for the cotangent of x', then through combine."""
    x, y, h_post, h_res, phi, scale, bias, weight, *given = primals
    norm = _projection.Norm(weight, h_norm_eps, h_raw)
    if saved is None:
        static = {"variant": variant, "h_norm_eps": h_norm_eps, "h_raw": h_raw}
        _, saved = forward_with_saved(kernels, *primals, **static)
    x_new, u, r, h_pre = saved
    g_x, g_h, g_pre, g_post, g_res, g_raw = cotangents
    weights = given[0] if given else h_pre
    dh, dw, dweight = _projection.weights_norm_vjp(kernels, x_new, weights, norm, g_h, g_raw)
    through = g_pre if given else g_pre + dw.reshape(g_pre.shape)
    used = _projection.Cotangents(through, g_post, g_res, weights, dh, g_x)
    pulled = _projection.combined_pullback(
        kernels,
        _projection.Streams(x, y, h_post, h_res),
        x_new,
        phi,
        scale,
        bias,
        _projection.Projected(u, r),
        used,
        variant,
    )
    shared = [kernels.sum_to(dw, given[0], 1)] if given else []
    return (*pulled, dweight, *shared)
