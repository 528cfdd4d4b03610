"""combine: the streams after a layer, mixed by H_res, with the layer's output written by H_post."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="combine",
    arrays={"x": "... n C", "y": "... C", "h_post": "... n | n", "h_res": "... n n | n n"},
    optional=("h_res",),
    outputs={"x": Out("... n C", "stream")},
)


def forward(x: Any, y: Any, h_post: Any, h_res: Any = None) -> Any:
    """x'_i = sum_j H_res[i, j] x_j + h_post_i y (eq. 3); without h_res, x'_i = x_i + h_post_i y."""
    given = (x, y, h_post) if h_res is None else (x, y, h_post, h_res)
    return _forward(_xp.namespace(x), *given)


@_xp.fused
def _forward(xp: Any, x: Any, *arrays: Any) -> Any:
    return _xp.as_dtype_of(xp, mixed(xp, *(_xp.upcast(xp, array) for array in (x, *arrays))), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None) -> tuple[Any, ...]:
    """dx = H_res^T g; dy = sum_i h_post_i g_i; dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j."""
    (x, y, h_post, *mixing), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    h_res = mixing[0] if mixing else None
    dx, dy, dh_post, dh_res = pullback(
        xp, *(None if a is None else _xp.upcast(xp, a) for a in (x, y, h_post, h_res, g))
    )
    if h_res is None:
        dx = xp.astype(dx, dx.dtype)  # the cotangent itself, copied where arrays are writable
    gradients = (
        _xp.as_dtype_of(xp, dx, x),
        _xp.as_dtype_of(xp, dy, y),
        _xp.sum_to(xp, dh_post, h_post),
        None if h_res is None else _xp.sum_to(xp, dh_res, h_res),
    )
    return gradients[: len(primals)]


@_xp.fused
def mixed(xp: Any, x: Any, y: Any, h_post: Any, h_res: Any = None) -> Any:
    """Return x' in the dtype of computation."""
    written = h_post[..., None] * y[..., None, :]
    return x + written if h_res is None else _xp.mix(xp, h_res, x, written)


def pullback(xp: Any, x: Any, y: Any, h_post: Any, h_res: Any, g: Any) -> tuple[Any, Any, Any, Any]:
    """Return all four gradients in the dtype of computation; that of no h_res is None."""
    dh_post = _xp.dot(xp, g, y[..., None, :], like=h_post)
    if h_res is None:
        return g, _collapsed(xp, h_post, g), *_xp.over_channels(xp, dh_post), None
    dx, dy = _streams_pullback(xp, g, h_post, h_res)
    return dx, dy, *_xp.over_channels(xp, dh_post, _xp.outer(xp, g, x, like=h_res))


@_xp.fused
def _collapsed(xp: Any, h_post: Any, g: Any) -> Any:
    return _xp.collapse(xp, h_post, g)


@_xp.fused
def _streams_pullback(xp: Any, g: Any, h_post: Any, h_res: Any) -> tuple[Any, Any]:
    return _xp.mix(xp, _xp.swap(xp, h_res), g), _xp.collapse(xp, h_post, g)
