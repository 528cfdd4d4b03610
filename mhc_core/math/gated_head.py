"""gated_head: the streams collapsed before the output, normalised one by one, gated by channel."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="gated_head",
    arrays={"x": "... n C", "norm": "nC", "down": "R nC", "up": "nC R"},
    outputs={"h": Out("... C", "stream")},
    static={"eps": checks.non_negative},
)


def forward(x: Any, norm: Any, down: Any, up: Any, *, eps: float) -> Any:
    """h = mean_i sigmoid(z)_i u_i with z = silu(u @ down.T / n) @ up.T, u = rms_norm(x) (1 + norm).

    u and z have a number for each stream and channel; the norm is each stream's own.
    """
    xp = _xp.namespace(x)
    streams, norm, down, up = (_xp.upcast(xp, array) for array in (x, norm, down, up))
    u, _ = normalised(xp, streams, norm, eps)
    return _xp.as_dtype_of(xp, collapsed(xp, u, down, up), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, eps: float) -> tuple[Any, ...]:
    """Pull back to u, through the gates too, then through the norm of each stream."""
    xp = _xp.namespace(primals[0])
    x, norm, down, up = (_xp.upcast(xp, array) for array in primals)
    u, r = normalised(xp, x, norm, eps)
    du, ddown, dup = collapsed_pullback(xp, u, down, up, _xp.upcast(xp, cotangents[0]))
    dx, dnorm = normalised_pullback(xp, x, norm, r, du)
    gradients = (dx, dnorm, ddown, dup)
    return tuple(_xp.as_dtype_of(xp, d, p) for d, p in zip(gradients, primals, strict=True))


def normalised(xp: Any, x: Any, norm: Any, eps: float) -> tuple[Any, Any]:
    """Return u, and r = 1 / rms of each stream."""
    r = 1 / xp.sqrt(_xp.mean_square(xp, x) + eps)
    return x * r * (1 + xp.reshape(norm, x.shape[-2:])), r


def normalised_pullback(xp: Any, x: Any, norm: Any, r: Any, du: Any) -> tuple[Any, Any]:
    """dx = r (g - s mean(s g)) with s = x r and g = du (1 + norm); dnorm = sum_T du s."""
    scaled = x * r
    g = du * (1 + xp.reshape(norm, x.shape[-2:]))
    pulled = _xp.dot(xp, scaled, g)[..., None] / x.shape[-1]
    dnorm = _xp.sum_tokens(xp, du * scaled, 2)
    return r * (g - scaled * pulled), xp.reshape(dnorm, norm.shape)


def _low(xp: Any, u: Any, down: Any) -> tuple[Any, Any]:
    """Return z = u @ down.T / n and its sigmoid: silu(z) = z sigmoid(z)."""
    z = _xp.project(xp, u, down) / u.shape[-2]
    return z, _xp.sigmoid(xp, z)


def collapsed(xp: Any, u: Any, down: Any, up: Any) -> Any:
    """Return h in the dtype of computation."""
    z, s = _low(xp, u, down)
    gates = _xp.sigmoid(xp, _xp.unproject(xp, z * s, _xp.swap(xp, up), u))
    return xp.sum(gates * u, axis=-2) / u.shape[-2]


def collapsed_pullback(xp: Any, u: Any, down: Any, up: Any, g_h: Any) -> tuple[Any, Any, Any]:
    """Return du, ddown and dup."""
    n, columns = u.shape[-2], _xp.swap(xp, up)
    z, s = _low(xp, u, down)
    gates = _xp.sigmoid(xp, _xp.unproject(xp, z * s, columns, u))
    each = (g_h / n)[..., None, :]
    du, d_gates = each * gates, each * u * gates * (1 - gates)
    dup = _xp.swap(xp, _xp.gram(xp, z * s, d_gates, like=columns))
    dz = _xp.project(xp, d_gates, columns) * s * (1 + z * (1 - s)) / n
    return du + _xp.unproject(xp, dz, down, u), _xp.gram(xp, dz, u, like=down), dup
