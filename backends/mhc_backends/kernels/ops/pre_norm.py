"""pre_norm: the kernels of ``pre``, the last of which also normalises h, and those of its vjp."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels, Out
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, **static: Any) -> tuple[Array | None, ...]:
    """(rms_norm(h), H_post, H_res, h), with None for h unless ``h_raw``."""
    return forward_with_saved(kernels, *primals, **static, saves=False)[0]


def forward_with_saved(
    kernels: Kernels,
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    h_norm_weight: Array,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
    saves: bool = True,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, the projection and H_pre."""
    norm = _projection.Norm(h_norm_weight, h_norm_eps, h_raw)
    sums = _projection.project_for_pre(kernels, x, phi, variant.mixes)
    made = _projection.pre_norm(kernels, x, sums, scale, bias, None, norm, variant, saves)
    return (made.h, made.h_post, made.h_res, made.raw), (*made.saved, made.h_pre)


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
    """Pull back through the norm and the aggregate in one launch, then through the mappings."""
    (x, phi, scale, bias, weight), (g_h, g_post, g_res, g_raw) = primals, cotangents
    norm = _projection.Norm(weight, h_norm_eps, h_raw)
    if saved is None:
        static = {"variant": variant, "h_norm_eps": h_norm_eps, "h_raw": h_raw}
        _, saved = forward_with_saved(kernels, *primals, **static)
    u, r, h_pre = saved
    dh, dw, dweight = _projection.weights_norm_vjp(kernels, x, h_pre, norm, g_h, g_raw)
    given = _projection.Cotangents(dw, g_post, g_res, h_pre, dh)
    projected = _projection.Projected(u, r)
    return *_projection.pullback(
        kernels, x, phi, scale, bias, projected, given, variant, Out.like(x)
    ), dweight
