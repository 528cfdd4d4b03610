"""static_layer: a whole mHC layer with static mappings, F being an RMS norm."""

from __future__ import annotations

from typing import Any

from mhc_core import _checks
from mhc_core._signature import Op, Out
from mhc_core.math import _xp, aggregate, combine, rms_norm, static_mappings

OP = Op(
    name="static_layer",
    arrays={
        "x": "... n C",
        "h_pre_raw": "n",
        "h_post_raw": "n",
        "h_res_raw": "n n",
        "rms_weight": "C",
    },
    outputs={"x": Out("... n C", "stream")},
    static={"eps": _checks.non_negative, "iterations": _checks.positive_int},
)


def forward(
    x: Any,
    h_pre_raw: Any,
    h_post_raw: Any,
    h_res_raw: Any,
    rms_weight: Any,
    *,
    eps: float,
    iterations: int,
) -> Any:
    """H_res x + H_post (outer) rms_norm(aggregate(x, H_pre))."""
    xp = _xp.namespace(x)
    wide, raw = _up(xp, x, (h_pre_raw, h_post_raw, h_res_raw))
    h_pre, h_post, h_res = static_mappings.forward(*raw, iterations=iterations)
    h = aggregate.weighted(xp, wide, h_pre)
    y = rms_norm.normalised(xp, h, _xp.up(xp, rms_weight), eps)
    return _xp.cast(xp, combine.mixed(xp, wide, y, h_post, h_res), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, eps: float, iterations: int):
    """Through combine, the norm, the aggregate and the static mappings; h and y are run again."""
    x, *raw, rms_weight = primals
    xp = _xp.namespace(x)
    wide, raw = _up(xp, x, raw)
    weight = _xp.up(xp, rms_weight)
    h_pre, h_post, h_res = static_mappings.forward(*raw, iterations=iterations)
    h = aggregate.weighted(xp, wide, h_pre)
    y = rms_norm.normalised(xp, h, weight, eps)
    g = _xp.up(xp, cotangents[0])
    dx, dy, dh_post, dh_res = combine.back(xp, wide, y, h_post, h_res, g)
    dh, dweight = rms_norm.back(xp, h, weight, dy, eps)
    more, dh_pre = aggregate.back(xp, wide, h_pre, dh)
    summed = [_xp.sum_to(xp, d, like) for d, like in zip((dh_pre, dh_post, dh_res), raw, strict=True)]
    d_raw = static_mappings.vjp(raw, summed, iterations=iterations)
    gradients = (dx + more, *d_raw, dweight)
    return tuple(_xp.sum_to(xp, d, p) for d, p in zip(gradients, primals, strict=True))


def _up(xp: Any, x: Any, raw: Any) -> tuple[Any, list[Any]]:
    """Widen x, and the raw parameters to its dtype of computation, whatever they came in."""
    wide = _xp.up(xp, x)
    return wide, [xp.astype(array, wide.dtype) for array in raw]
