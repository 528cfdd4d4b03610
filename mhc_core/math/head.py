"""head: the streams collapsed before the output, by sigmoid weights of the streams themselves."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp, aggregate, mappings
from mhc_core.math.mappings import Projected
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

OP = Op(
    name="head",
    arrays={"x": "... n C", "phi": "n nC", "scale": "1", "bias": "n"},
    outputs={"h": Out("... C", "stream")},
    static={"variant": check_variant},
)


def forward(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant) -> Any:
    """h = sum_i w_i x_i with w = sigmoid(vec(x) @ phi.T r scale + bias) + pre_eps."""
    return forward_with_saved(x, phi, scale, bias, variant=variant)[0][0]


def forward_with_saved(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant):
    """Return h and the projection behind its weights."""
    xp = _xp.namespace(x)
    streams, phi, scale, bias = (_xp.upcast(xp, array) for array in (x, phi, scale, bias))
    projected = mappings.projection(xp, streams, phi, variant)
    w = _sigmoid(xp, projected, scale, bias) + variant.pre_eps
    return (_xp.as_dtype_of(xp, _xp.collapse(xp, w, streams), x),), projected


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
):
    """Pull back through the weighted sum, then the sigmoid and the projection."""
    xp = _xp.namespace(primals[0])
    x, phi, scale, bias = (_xp.upcast(xp, array) for array in primals)
    g = _xp.upcast(xp, cotangents[0])
    projected = Projected(*saved) if saved else mappings.projection(xp, x, phi, variant)
    s = _sigmoid(xp, projected, scale, bias)
    dx, dw = aggregate.pullback(xp, x, s + variant.pre_eps, g)
    dz = dw * s * (1 - s)
    dscale = xp.reshape(xp.sum(dz * (projected.u * projected.r)), (1,))
    dbias = _xp.sum_tokens(xp, dz, 1)
    given = Projected(*saved_cotangents) if saved_cotangents else None
    more, dphi = mappings.projection_pullback(xp, x, phi, projected, dz * scale, variant, given)
    gradients = (dx + more, dphi, dscale, dbias)
    return tuple(_xp.as_dtype_of(xp, d, p) for d, p in zip(gradients, primals, strict=True))


def _sigmoid(xp: Any, projected: Projected, scale: Any, bias: Any) -> Any:
    return _xp.sigmoid(xp, (projected.u * projected.r) * scale + bias)
