"""pre_scale: each of the n slices of the last axis times its H_pre."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhc_core.math import _xp
from mhc_core.signature import Op, Out


def whole_slices(sizes: Mapping[str, int]) -> str | None:
    """Raise unless the last axis is n slices of one size."""
    if sizes["D"] % sizes["n"] == 0:
        return None
    return f"x has a last axis of {sizes['D']}; needs a multiple of n={sizes['n']}"


OP = Op(
    name="pre_scale",
    arrays={"x": "... D", "h_pre": "... n | n"},
    outputs={"x": Out("... D", "stream")},
    constraint=whole_slices,
)


def forward(x: Any, h_pre: Any) -> Any:
    """H_pre * x on the [n, D / n] view."""
    xp = _xp.namespace(x)
    scaled = _xp.upcast(xp, h_pre)[..., None] * slices(xp, _xp.upcast(xp, x), h_pre.shape[-1])
    return _xp.as_dtype_of(xp, xp.reshape(scaled, x.shape), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None) -> tuple[Any, Any]:
    """dx = H_pre * g; dh_pre_i = x_i . g_i."""
    (x, h_pre), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    g = slices(xp, _xp.upcast(xp, g), h_pre.shape[-1])
    dh_pre = _xp.dot(xp, slices(xp, _xp.upcast(xp, x), h_pre.shape[-1]), g, like=h_pre)
    dx = xp.reshape(_xp.upcast(xp, h_pre)[..., None] * g, x.shape)
    return _xp.as_dtype_of(xp, dx, x), _xp.sum_to(xp, dh_pre, h_pre)


def slices(xp: Any, x: Any, n: int) -> Any:
    """View the last axis as [n, D / n]."""
    return xp.reshape(x, (*x.shape[:-1], n, x.shape[-1] // n))
