"""combine_pre: kernels ``combine_project`` and ``pre``, or their forms for few tokens; without
H_res ``write_project`` and ``pre_unmixed``, or theirs.

The vjp is pre's, then combine's.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, variant: Variant) -> tuple[Array | None, ...]:
    """(x', h', H_pre', H_post', H_res'); h' uses h_pre where given, else H_pre'."""
    return forward_with_saved(kernels, *primals, variant=variant, saves=False)[0]


def forward_with_saved(
    kernels: Kernels,
    x: Array,
    y: Array,
    h_post: Array,
    h_res: Array | None,
    phi: Array,
    scale: Array,
    bias: Array,
    h_pre: Array | None = None,
    *,
    variant: Variant,
    saves: bool = True,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, x' and the projection of x'."""
    x_new, sums = _projection.combine_project(kernels, x, y, h_post, h_res, phi, variant.mixes)
    made = _projection.pre(kernels, x_new, sums, scale, bias, h_pre, variant, saves)
    outputs = (x_new, made.h, made.h_pre, made.h_post, made.h_res)
    return outputs, (x_new, *made.saved, made.h_pre)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, variant: Variant
) -> tuple[Array | None, ...]:
    """Pull back through the next pre, for the cotangent of x', then through combine."""
    x, y, h_post, h_res, phi, scale, bias, *given = primals
    if saved is None:
        _, saved = forward_with_saved(kernels, *primals, variant=variant)
    x_new, u, r, h_pre = saved
    g_x, g_h, g_pre, g_post, g_res = cotangents
    dh_pre = _projection.weights_vjp(kernels, x_new, g_h)
    through = g_pre if given else g_pre + dh_pre.reshape(g_pre.shape)
    used = _projection.Cotangents(through, g_post, g_res, given[0] if given else h_pre, g_h, g_x)
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
    shared = [kernels.sum_to(dh_pre, given[0], 1)] if given else []
    return (*pulled, *shared)
