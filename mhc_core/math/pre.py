"""pre: the mappings and the layer's input, in one pass."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp, aggregate, mappings
from mhc_core.math.mappings import PROJECTION, Projected
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

OP = Op(
    name="pre",
    arrays={"x": "... n C", **PROJECTION},
    outputs={
        "h": Out("... C", "stream"),
        "h_post": Out("... n", "mapping"),
        "h_res": Out("... n n", "mapping", mixed=True),
    },
    static={"variant": check_variant},
)


def forward(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant) -> tuple[Any, Any, Any]:
    """(aggregate(x, h_pre), h_post, h_res) with the mappings of x."""
    return forward_with_saved(x, phi, scale, bias, variant=variant)[0]


def forward_with_saved(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant):
    """Return the outputs and, for the vjp, the projection and h_pre."""
    (h_pre, h_post, h_res), projected = mappings.forward_with_saved(
        x, phi, scale, bias, variant=variant
    )
    return (aggregate.forward(x, h_pre), h_post, h_res), (*projected, h_pre)


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
):
    """Pull back through the aggregate, then through the mappings with the cotangent of h_pre."""
    xp = _xp.namespace(primals[0])
    x, phi, scale, bias = (_xp.upcast(xp, array) for array in primals)
    given = cotangents, saved, saved_cotangents
    gradients = pullback(xp, x, phi, scale, bias, *given, variant)
    return tuple(_xp.as_dtype_of(xp, g, p) for g, p in zip(gradients, primals, strict=True))


def pullback(
    xp: Any,
    x: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    cotangents: Any,
    saved: Any,
    saved_cotangents: Any,
    variant: Variant,
) -> tuple[Any, Any, Any, Any]:
    """Return dx, dphi, dscale and dbias in the dtype of computation."""
    g_h, g_post, g_res = (None if g is None else _xp.upcast(xp, g) for g in cotangents)
    if not saved:
        (_, _, _), saved = forward_with_saved(x, phi, scale, bias, variant=variant)
    u, r, h_pre = saved
    dx, dh_pre = aggregate.pullback(xp, x, h_pre, g_h)
    of_projected = None
    if saved_cotangents:
        g_u, g_r, g_pre = saved_cotangents
        of_projected, dh_pre = Projected(g_u, g_r), dh_pre + g_pre
    more, dphi, dscale, dbias = mappings.pullback(
        xp, x, phi, scale, bias, Projected(u, r), (dh_pre, g_post, g_res), variant, of_projected
    )
    return dx + more, dphi, dscale, dbias
