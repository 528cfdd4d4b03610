"""static_mappings: the mappings of mHC without a projection, from parameters alone."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp, sinkhorn
from mhc_core.signature import Op, Out

OP = Op(
    name="static_mappings",
    arrays={"h_pre_raw": "... n", "h_post_raw": "... n", "h_res_raw": "... n n"},
    outputs={
        "h_pre": Out("... n", "mapping"),
        "h_post": Out("... n", "mapping"),
        "h_res": Out("... n n", "mapping"),
    },
    static={"iterations": checks.iterations},
)


def forward(h_pre_raw: Any, h_post_raw: Any, h_res_raw: Any, *, iterations: int):
    """(sigmoid, 2 sigmoid, sinkhorn with rows first and eps 0)."""
    xp = _xp.namespace(h_pre_raw)
    return (
        _xp.sigmoid(xp, _xp.upcast(xp, h_pre_raw)),
        2 * _xp.sigmoid(xp, _xp.upcast(xp, h_post_raw)),
        sinkhorn.forward(h_res_raw, iterations=iterations, eps=0.0, first="rows"),
    )


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, iterations: int):
    """The sigmoids' derivatives s (1 - s), and sinkhorn's vjp."""
    (h_pre_raw, h_post_raw, h_res_raw), (g_pre, g_post, g_res) = primals, cotangents
    xp = _xp.namespace(h_pre_raw)
    pre = _xp.sigmoid(xp, _xp.upcast(xp, h_pre_raw))
    post = _xp.sigmoid(xp, _xp.upcast(xp, h_post_raw))
    d_pre = _xp.upcast(xp, g_pre) * pre * (1 - pre)
    d_post = 2 * _xp.upcast(xp, g_post) * post * (1 - post)
    (d_res,) = sinkhorn.vjp((h_res_raw,), (g_res,), iterations=iterations, eps=0.0, first="rows")
    return _xp.as_dtype_of(xp, d_pre, h_pre_raw), _xp.as_dtype_of(xp, d_post, h_post_raw), d_res
