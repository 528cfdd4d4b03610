"""residual_add_aggregate: a residual added and the next layer's input taken, in one pass."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp, aggregate
from mhc_core.signature import Op, Out

OP = Op(
    name="residual_add_aggregate",
    arrays={"x": "... n C", "res": "... n C", "h_pre": "... n | n"},
    outputs={"x": Out("... n C", "stream"), "h": Out("... C", "stream")},
)


def forward(x: Any, res: Any, h_pre: Any) -> tuple[Any, Any]:
    """(x + res, sum_i h_pre_i (x + res)_i)."""
    return _forward(_xp.namespace(x), x, res, h_pre)


@_xp.fused
def _forward(xp: Any, x: Any, res: Any, h_pre: Any) -> tuple[Any, Any]:
    total = _xp.upcast(xp, x) + _xp.upcast(xp, res)
    h = _xp.collapse(xp, _xp.upcast(xp, h_pre), total)
    return _xp.as_dtype_of(xp, total, x), _xp.as_dtype_of(xp, h, x)


def vjp(primals: Any, cotangents: Any, saved: Any = None) -> tuple[Any, Any, Any]:
    """dx = dres = g_x + h_pre (outer) g_h; dh_pre_i = (x + res)_i . g_h."""
    (x, res, h_pre), (g_x, g_h) = primals, cotangents
    xp = _xp.namespace(x)
    total = _xp.upcast(xp, x) + _xp.upcast(xp, res)
    d_total, dh_pre = aggregate.pullback(xp, total, _xp.upcast(xp, h_pre), _xp.upcast(xp, g_h))
    d_total = d_total + _xp.upcast(xp, g_x)
    dres = xp.astype(d_total, res.dtype)  # a copy: not the array that dx is
    return _xp.as_dtype_of(xp, d_total, x), dres, _xp.sum_to(xp, dh_pre, h_pre)
