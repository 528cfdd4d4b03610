"""expand: one hidden state repeated into n streams."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="expand",
    arrays={"h": "... C"},
    outputs={"x": Out("... n C", "stream")},
    static={"n": checks.positive_int},
)


def forward(h: Any, *, n: int) -> Any:
    """x_i = h."""
    xp = _xp.namespace(h)
    streams = xp.broadcast_to(h[..., None, :], (*h.shape[:-1], n, h.shape[-1]))
    return xp.astype(streams, h.dtype)  # a copy where arrays can be written to


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, n: int) -> tuple[Any]:
    """dh = sum_i g_i."""
    (h,), (g,) = primals, cotangents
    xp = _xp.namespace(h)
    return (_xp.as_dtype_of(xp, xp.sum(_xp.upcast(xp, g), axis=-2), h),)
