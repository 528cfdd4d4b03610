"""gated_pre: a layer's input from streams that are normalised one by one and gated by channel."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp, gated_head
from mhc_core.signature import Op, Out

OP = Op(
    name="gated_pre",
    arrays={**gated_head.OP.arrays, "inject": "n nC"},
    outputs={"h": Out("... C", "stream"), "h_post": Out("... n", "mapping")},
    static={"eps": checks.non_negative},
)


def forward(x: Any, norm: Any, down: Any, up: Any, inject: Any, *, eps: float) -> tuple[Any, Any]:
    """h = mean_i sigmoid(z)_i u_i; h_post = 2 sigmoid(u @ inject.T / n)."""
    xp = _xp.namespace(x)
    streams, *weights = (_xp.upcast(xp, array) for array in (x, norm, down, up, inject))
    u, _ = gated_head.normalised(xp, streams, weights[0], eps)
    z, injected = _averages(xp, u, weights[1], weights[3])
    h = gated_head.collapsed(xp, u, z, weights[2])
    return _xp.as_dtype_of(xp, h, x), 2 * _xp.sigmoid(xp, injected)


residuals = gated_head.residuals


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, eps: float) -> tuple[Any, ...]:
    """Pull back through h_post and h to u, then through the norm of each stream."""
    xp = _xp.namespace(primals[0])
    x, norm, down, up, inject = (_xp.upcast(xp, array) for array in primals)
    g_h, g_post = (_xp.upcast(xp, g) for g in cotangents)
    u, r = gated_head.normalised(xp, x, norm, eps)
    z, injected = _averages(xp, u, down, inject)
    du, ddown, dup = gated_head.collapsed_pullback(xp, u, z, down, up, g_h)
    s = _xp.sigmoid(xp, injected)
    dz = g_post * 2 * s * (1 - s) / x.shape[-2]
    du = du + _xp.unproject(xp, dz, inject, u)
    dx, dnorm = gated_head.normalised_pullback(xp, x, norm, r, du)
    gradients = (dx, dnorm, ddown, dup, _xp.gram(xp, dz, u, like=inject))
    return tuple(_xp.as_dtype_of(xp, d, p) for d, p in zip(gradients, primals, strict=True))


def _averages(xp: Any, u: Any, down: Any, inject: Any) -> tuple[Any, ...]:
    """Return u @ down.T / n and u @ inject.T / n; over devices, in one all-reduce."""
    of = gated_head.averaged
    return _xp.over_channels(xp, of(xp, u, down), of(xp, u, inject))
