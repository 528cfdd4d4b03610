"""contract: the streams collapsed without weights."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="contract",
    arrays={"x": "... n C"},
    outputs={"h": Out("... C", "stream")},
    static={"how": checks.one_of("sum", "mean")},
)


def forward(x: Any, *, how: str) -> Any:
    """h = sum_i x_i, or their mean."""
    xp = _xp.namespace(x)
    summed = xp.sum(_xp.upcast(xp, x), axis=-2)
    return _xp.as_dtype_of(xp, summed / x.shape[-2] if how == "mean" else summed, x)


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, how: str) -> tuple[Any]:
    """dx_i = g, or g / n."""
    (x,), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    g = _xp.upcast(xp, g)
    each = g / x.shape[-2] if how == "mean" else g
    # not as_dtype_of: it would leave a view of the cotangent
    return (xp.astype(xp.broadcast_to(each[..., None, :], x.shape), x.dtype),)
