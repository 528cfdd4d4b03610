"""static_layer: a whole mHC layer with static mappings, F being an RMS norm."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp, aggregate, combine, rms_norm, static_mappings
from mhc_core.signature import Op, Out

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
    static={"eps": checks.non_negative, "iterations": checks.iterations},
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
    primals = (x, h_pre_raw, h_post_raw, h_res_raw, rms_weight)
    return forward_with_saved(*primals, eps=eps, iterations=iterations)[0][0]


def forward_with_saved(
    x: Any,
    h_pre_raw: Any,
    h_post_raw: Any,
    h_res_raw: Any,
    rms_weight: Any,
    *,
    eps: float,
    iterations: int,
):
    """Return the output and, for the vjp, the aggregate and the mappings."""
    xp = _xp.namespace(x)
    streams, raw = _upcast(xp, x, (h_pre_raw, h_post_raw, h_res_raw))
    h_pre, h_post, h_res = static_mappings.forward(*raw, iterations=iterations)
    h = aggregate.weighted(xp, streams, h_pre)
    y = rms_norm.normalised(xp, h, _xp.upcast(xp, rms_weight), eps)
    out = _xp.as_dtype_of(xp, combine.mixed(xp, streams, y, h_post, h_res), x)
    return (out,), (h, h_pre, h_post, h_res)


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    eps: float,
    iterations: int,
):
    """Pull back through combine, norm, aggregate and static mappings; y is recomputed."""
    xp = _xp.namespace(primals[0])
    if not saved:
        _, saved = forward_with_saved(*primals, eps=eps, iterations=iterations)
    h, h_pre, h_post, h_res = saved
    x, raw = _upcast(xp, primals[0], primals[1:4])
    weight, g = _xp.upcast(xp, primals[4]), _xp.upcast(xp, cotangents[0])
    dh, dweight, y = rms_norm.pullback(xp, h, weight, _xp.collapse(xp, h_post, g), eps)
    if saved_cotangents:
        dh = dh + saved_cotangents[0]
    d_mapped = (
        _xp.dot(xp, x, dh[..., None, :], like=h_pre),
        _xp.dot(xp, g, y[..., None, :], like=h_post),
        _xp.outer(xp, g, x, like=h_res),
    )
    if saved_cotangents:
        d_mapped = tuple(d + g for d, g in zip(d_mapped, saved_cotangents[1:], strict=True))
    d_raw = static_mappings.vjp(raw, d_mapped, iterations=iterations)
    gradients = (_streams_pullback(xp, g, dh, h_pre, h_res), *d_raw, dweight)
    return tuple(_xp.sum_to(xp, d, p) for d, p in zip(gradients, primals, strict=True))


@_xp.fused
def _streams_pullback(xp: Any, g: Any, dh: Any, h_pre: Any, h_res: Any) -> Any:
    """dx = H_res^T g + H_pre (outer) dh."""
    return _xp.mix(xp, _xp.swap(xp, h_res), g, h_pre[..., None] * dh[..., None, :])


def _upcast(xp: Any, x: Any, raw: Any) -> tuple[Any, list[Any]]:
    """Convert x, and the raw parameters of any dtype, to the dtype of computation of x."""
    streams = _xp.upcast(xp, x)
    return streams, [xp.astype(array, streams.dtype) for array in raw]
