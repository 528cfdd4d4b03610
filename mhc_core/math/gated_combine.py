"""gated_combine: the connection around a layer on the n slices of one hidden state (mlx-mhc's)."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp
from mhc_core.math.pre_scale import slices, whole_slices
from mhc_core.signature import Op, Out

OP = Op(
    name="gated_combine",
    arrays={
        "x": "... D",
        "y": "... D",
        "h_pre": "... n | n",
        "h_post": "... n | n",
        "h_res": "... n n | n n",
    },
    outputs={"x": Out("... D", "stream")},
    constraint=whole_slices,
)


def forward(x: Any, y: Any, h_pre: Any, h_post: Any, h_res: Any) -> Any:
    """H_post * (y + H_res (H_pre * x)) on the [n, D / n] views."""
    return _forward(_xp.namespace(x), x, y, h_pre, h_post, h_res)


@_xp.fused
def _forward(xp: Any, x: Any, y: Any, h_pre: Any, h_post: Any, h_res: Any) -> Any:
    n = h_pre.shape[-1]
    h_pre, h_post, h_res = (_xp.upcast(xp, a) for a in (h_pre, h_post, h_res))
    gated = h_pre[..., None] * slices(xp, _xp.upcast(xp, x), n)
    out = h_post[..., None] * _xp.mix(xp, h_res, gated, slices(xp, _xp.upcast(xp, y), n))
    return _xp.as_dtype_of(xp, xp.reshape(out, x.shape), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None):
    """With z = y + H_res (H_pre * x): dy = H_post * g, and the rest through z's two products."""
    x, y, h_pre, h_post, h_res = primals
    xp = _xp.namespace(x)
    n = h_pre.shape[-1]
    x_n, y_n, g_n = (slices(xp, _xp.upcast(xp, a), n) for a in (x, y, cotangents[0]))
    pre, post, res = (_xp.upcast(xp, a) for a in (h_pre, h_post, h_res))
    gated, z = _recomputed(xp, x_n, y_n, pre, res)
    dz, d_gated, dx = _streams_pullback(xp, g_n, pre, post, res)
    return (
        _xp.as_dtype_of(xp, xp.reshape(dx, x.shape), x),
        _xp.as_dtype_of(xp, xp.reshape(dz, y.shape), y),
        _xp.sum_to(xp, _xp.dot(xp, d_gated, x_n, like=h_pre), h_pre),
        _xp.sum_to(xp, _xp.dot(xp, g_n, z, like=h_post), h_post),
        _xp.sum_to(xp, _xp.outer(xp, dz, gated, like=h_res), h_res),
    )


@_xp.fused
def _recomputed(xp: Any, x: Any, y: Any, h_pre: Any, h_res: Any) -> tuple[Any, Any]:
    """Return H_pre * x and z."""
    gated = h_pre[..., None] * x
    return gated, _xp.mix(xp, h_res, gated, y)


@_xp.fused
def _streams_pullback(xp: Any, g: Any, h_pre: Any, h_post: Any, h_res: Any) -> tuple[Any, Any, Any]:
    """Return dz, d(H_pre * x) and dx."""
    dz = h_post[..., None] * g
    d_gated = _xp.mix(xp, _xp.swap(xp, h_res), dz)
    return dz, d_gated, h_pre[..., None] * d_gated
