"""combine_pre: combine of one sublayer with pre of the next; the streams are read and written once.

The mappings read x' as rounded to the streams' dtype, so the result equals pre(combine(...)).
"""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp, aggregate, combine, mappings
from mhc_core.math.mappings import PROJECTION, Projected
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

OP = Op(
    name="combine_pre",
    arrays={**combine.OP.arrays, **PROJECTION, "h_pre": "... n | n"},
    optional=("h_res", "h_pre"),
    outputs={
        "x": Out("... n C", "stream"),
        "h": Out("... C", "stream"),
        "h_pre": Out("... n", "mapping"),
        "h_post": Out("... n", "mapping"),
        "h_res": Out("... n n", "mapping", mixed=True),
    },
    static={"variant": check_variant},
)


def forward(
    x: Any,
    y: Any,
    h_post: Any,
    h_res: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    h_pre: Any = None,
    *,
    variant: Variant,
) -> tuple[Any, Any, Any, Any, Any]:
    """(x', h', h_pre', h_post', h_res'); h' uses ``h_pre`` where given, else h_pre'."""
    return forward_with_saved(x, y, h_post, h_res, phi, scale, bias, h_pre, variant=variant)[0]


def forward_with_saved(
    x: Any,
    y: Any,
    h_post: Any,
    h_res: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    h_pre: Any = None,
    *,
    variant: Variant,
):
    """Return the outputs and, for the vjp, x' and the projection of x'."""
    x_new = combine.forward(x, y, h_post, h_res)
    mapped, projected = mappings.forward_with_saved(x_new, phi, scale, bias, variant=variant)
    h = aggregate.forward(x_new, mapped[0] if h_pre is None else h_pre)
    return (x_new, h, *mapped), (x_new, *projected, mapped[0])


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
):
    """Pull back through the next pre, for the cotangent of x', then through combine."""
    x, y, h_post, h_res, phi, scale, bias, *given = primals
    xp = _xp.namespace(x)
    if not saved:
        _, saved = forward_with_saved(*primals, variant=variant)
    x_new, u, r, h_pre = saved
    x_new = _xp.upcast(xp, x_new)
    g_x, g_h, g_pre, g_post, g_res = (None if g is None else _xp.upcast(xp, g) for g in cotangents)
    used = _xp.upcast(xp, given[0]) if given else h_pre
    dx_new, dh_pre = aggregate.pullback(xp, x_new, used, g_h)
    if not given:
        g_pre = g_pre + dh_pre
    of_projected = None
    if saved_cotangents:  # x' and h_pre' are outputs, and have theirs there
        _, g_u, g_r, _ = saved_cotangents
        of_projected = Projected(g_u, g_r)
    phi, scale, bias = (_xp.upcast(xp, array) for array in (phi, scale, bias))
    more, dphi, dscale, dbias = mappings.pullback(
        xp, x_new, phi, scale, bias, Projected(u, r), (g_pre, g_post, g_res), variant, of_projected
    )
    x, y, h_post, h_res = (None if a is None else _xp.upcast(xp, a) for a in (x, y, h_post, h_res))
    streams = combine.pullback(xp, x, y, h_post, h_res, g_x + dx_new + more)
    gradients = (*streams, dphi, dscale, dbias, *([dh_pre] if given else []))
    pairs = zip(gradients, primals, strict=True)
    return tuple(None if p is None else _xp.sum_to(xp, d, p) for d, p in pairs)
