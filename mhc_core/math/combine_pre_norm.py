"""combine_pre_norm: combine_pre, and the RMS norm of the next layer's input in the same pass.

The norm reads h' as rounded to the streams' dtype, so the result equals rms_norm(combine_pre(...)).
"""

from __future__ import annotations

from typing import Any

from mhc_core.math import combine_pre, rms_norm
from mhc_core.math.pre_norm import NORM, RAW, through_norm
from mhc_core.signature import Op
from mhc_core.variants import Variant, check_variant

_ARRAYS = dict(combine_pre.OP.arrays)

OP = Op(
    name="combine_pre_norm",
    arrays={
        **{name: _ARRAYS[name] for name in _ARRAYS if name != "h_pre"},
        "h_norm_weight": "C",
        "h_pre": _ARRAYS["h_pre"],
    },
    optional=combine_pre.OP.optional,
    outputs={**combine_pre.OP.outputs, "h_raw": RAW},
    static={"variant": check_variant, **NORM},
)


def forward(*primals: Any, **static: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """(x', rms_norm(h'), h_pre', h_post', h_res', h'), with None for h' unless ``h_raw``."""
    return forward_with_saved(*primals, **static)[0]


def forward_with_saved(
    x: Any,
    y: Any,
    h_post: Any,
    h_res: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    h_norm_weight: Any,
    h_pre: Any = None,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
):
    """Return the outputs and, for the vjp, x' and the projection of x'."""
    primals = (x, y, h_post, h_res, phi, scale, bias, h_pre)
    (x_new, h, *mapped), saved = combine_pre.forward_with_saved(*primals, variant=variant)
    y_new = rms_norm.forward(h, h_norm_weight, eps=h_norm_eps)
    return (x_new, y_new, *mapped, h if h_raw else None), saved


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
    """Pull back through the norm, whose h' is computed again, then through combine_pre."""
    *own, weight = primals[:8]
    given = primals[8:]
    g_x, g_y, g_pre, g_post, g_res, g_raw = cotangents
    if not saved:
        _, saved = combine_pre.forward_with_saved(*own, *given, variant=variant)
    used = given[0] if given else saved[-1]
    dh, dweight = through_norm(saved[0], used, weight, g_y, g_raw, h_norm_eps)
    through = (g_x, dh, g_pre, g_post, g_res)
    gradients = combine_pre.vjp((*own, *given), through, saved, saved_cotangents, variant=variant)
    return (*gradients[:7], dweight, *gradients[7:])
