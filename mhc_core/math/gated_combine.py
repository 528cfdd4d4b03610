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
    h_pre, h_post, h_res = (_xp.up(xp, a) for a in (h_pre, h_post, h_res))
    gated = h_pre[..., None] * slices(xp, _xp.up(xp, x), n)
    out = h_post[..., None] * _xp.mix(xp, h_res, gated, slices(xp, _xp.up(xp, y), n))
    return _xp.cast(xp, xp.reshape(out, x.shape), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None):
    """With z = y + H_res (H_pre * x): dy = H_post * g, and the rest through z's two products."""
    x, y, h_pre, h_post, h_res = primals
    xp = _xp.namespace(x)
    n = h_pre.shape[-1]
    wide_x, wide_y, wide_g = (slices(xp, _xp.up(xp, a), n) for a in (x, y, cotangents[0]))
    wide_pre, wide_post, wide_res = (_xp.up(xp, a) for a in (h_pre, h_post, h_res))
    gated, z = _again(xp, wide_x, wide_y, wide_pre, wide_res)
    dz, d_gated, dx = _back_streams(xp, wide_g, wide_pre, wide_post, wide_res)
    return (
        _xp.cast(xp, xp.reshape(dx, x.shape), x),
        _xp.cast(xp, xp.reshape(dz, y.shape), y),
        _xp.sum_to(xp, _xp.dot(xp, d_gated, wide_x, like=h_pre), h_pre),
        _xp.sum_to(xp, _xp.dot(xp, wide_g, z, like=h_post), h_post),
        _xp.sum_to(xp, _xp.outer(xp, dz, gated, like=h_res), h_res),
    )


@_xp.fused
def _again(xp: Any, x: Any, y: Any, h_pre: Any, h_res: Any) -> tuple[Any, Any]:
    """Return H_pre * x and z."""
    gated = h_pre[..., None] * x
    return gated, _xp.mix(xp, h_res, gated, y)


@_xp.fused
def _back_streams(xp: Any, g: Any, h_pre: Any, h_post: Any, h_res: Any) -> tuple[Any, Any, Any]:
    """Return dz, d(H_pre * x) and dx."""
    dz = h_post[..., None] * g
    d_gated = _xp.mix(xp, _xp.swap(xp, h_res), dz)
    return dz, d_gated, h_pre[..., None] * d_gated
