"""pre_residual: pre, with the streams passed through for combine.

A sublayer reads x twice, in pre and in combine. Where combine takes the x that is returned here,
its gradient of x is a cotangent of this op, which the vjp adds in the pass that makes its own
gradient of x: nothing else has to add the two.
"""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp, pre
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant

OP = Op(
    name="pre_residual",
    arrays=pre.OP.arrays,
    outputs={**pre.OP.outputs, "x": Out("... n C", "stream")},
    static=pre.OP.static,
)


def forward(
    x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant
) -> tuple[Any, Any, Any, Any]:
    """(aggregate(x, h_pre), h_post, h_res, x) with the mappings of x."""
    return forward_with_saved(x, phi, scale, bias, variant=variant)[0]


def forward_with_saved(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant):
    """Return the outputs and, for the vjp, the projection and h_pre."""
    outputs, saved = pre.forward_with_saved(x, phi, scale, bias, variant=variant)
    # astype copies where a caller may write to x: a result is the caller's alone
    return (*outputs, _xp.namespace(x).astype(x, x.dtype)), saved


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
):
    """Pull back through pre, and add the cotangent of x before the gradient is rounded."""
    xp = _xp.namespace(primals[0])
    *through, g_x = cotangents
    x, phi, scale, bias = (_xp.upcast(xp, array) for array in primals)
    dx, *others = pre.pullback(xp, x, phi, scale, bias, through, saved, saved_cotangents, variant)
    gradients = (dx + _xp.upcast(xp, g_x), *others)
    return tuple(_xp.as_dtype_of(xp, g, p) for g, p in zip(gradients, primals, strict=True))
