"""pre_norm: pre, and the RMS norm of the layer's input in the same pass.

The norm reads h as rounded to the streams' dtype, so the result equals rms_norm(pre(...)).
"""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp, aggregate, pre, rms_norm
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

NORM = {"h_norm_eps": checks.non_negative, "h_raw": checks.boolean}
RAW = Out("... C", "stream", asked="h_raw")

OP = Op(
    name="pre_norm",
    arrays={**pre.OP.arrays, "h_norm_weight": "C"},
    outputs={**pre.OP.outputs, "h_raw": RAW},
    static={"variant": check_variant, **NORM},
)


def forward(*primals: Any, **static: Any) -> tuple[Any, Any, Any, Any]:
    """(rms_norm(h), h_post, h_res, h), with None for h unless ``h_raw``."""
    return forward_with_saved(*primals, **static)[0]


def forward_with_saved(
    x: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    h_norm_weight: Any,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
):
    """Return the outputs and, for the vjp, the projection and h_pre."""
    (h, *mapped), saved = pre.forward_with_saved(x, phi, scale, bias, variant=variant)
    y = rms_norm.forward(h, h_norm_weight, eps=h_norm_eps)
    return (y, *mapped, h if h_raw else None), saved


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
):
    """Pull back through the norm, whose h is computed again, then through pre."""
    *primals, weight = primals
    g_y, g_post, g_res, g_raw = cotangents
    if not saved:
        _, saved = pre.forward_with_saved(*primals, variant=variant)
    dh, dweight = through_norm(primals[0], saved[-1], weight, g_y, g_raw, h_norm_eps)
    through = (dh, g_post, g_res)
    return *pre.vjp(primals, through, saved, saved_cotangents, variant=variant), dweight


def through_norm(
    x: Any, weights: Any, norm_weight: Any, g_y: Any, g_raw: Any, eps: float
) -> tuple[Any, Any]:
    """Return the cotangent of h, in the dtype of computation, and the gradient of norm_weight."""
    xp = _xp.namespace(x)
    h, g = (_xp.upcast(xp, array) for array in (aggregate.forward(x, weights), g_y))
    dh, dweight, _ = rms_norm.pullback(xp, h, _xp.upcast(xp, norm_weight), g, eps)
    if g_raw is not None:
        dh = dh + _xp.upcast(xp, g_raw)
    return dh, _xp.sum_to(xp, dweight, norm_weight)
