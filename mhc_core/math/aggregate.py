"""aggregate: the layer's input, a weighted sum of the streams."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="aggregate",
    arrays={"x": "... n C", "h_pre": "... n | n"},
    outputs={"h": Out("... C", "stream")},
)


def forward(x: Any, h_pre: Any) -> Any:
    """h = sum_i h_pre_i x_i."""
    return weighted(_xp.namespace(x), x, h_pre)


@_xp.fused
def weighted(xp: Any, x: Any, h_pre: Any) -> Any:
    """Return h in x's dtype."""
    return _xp.as_dtype_of(xp, _xp.collapse(xp, _xp.upcast(xp, h_pre), _xp.upcast(xp, x)), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None) -> tuple[Any, Any]:
    """dx_i = h_pre_i dh; dh_pre_i = sum_C x_i dh."""
    (x, h_pre), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    dx, dh_pre = pullback(xp, _xp.upcast(xp, x), _xp.upcast(xp, h_pre), _xp.upcast(xp, g))
    return _xp.as_dtype_of(xp, dx, x), _xp.sum_to(xp, dh_pre, h_pre)


def pullback(xp: Any, x: Any, h_pre: Any, g: Any) -> tuple[Any, Any]:
    """Return dx and dh_pre in the dtype of computation."""
    (dh_pre,) = _xp.over_channels(xp, _xp.dot(xp, x, g[..., None, :], like=h_pre))
    return h_pre[..., None] * g[..., None, :], dh_pre
