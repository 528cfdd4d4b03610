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
    (z,) = _xp.over_channels(xp, averaged(xp, u, down))
    return _xp.as_dtype_of(xp, collapsed(xp, u, z, up), x)


def residuals(
    x: Any, norm: Any, down: Any, up: Any, inject: Any = None, *, eps: float
) -> tuple[Any, Any, Any]:
    """Return what the kernels keep of a forward for their vjp; the formulas need none of it.

    ``products[..., n, R]`` of ``x (1 + norm)`` and down's rows (and then inject's), ``low[..., R]``
    ``= silu(z)``, and ``r[..., n]``. It is for a forward by formulas before a vjp by kernels.
    """
    xp = _xp.namespace(x)
    streams, norm, *rows = (_xp.upcast(xp, a) for a in (x, norm, down, inject) if a is not None)
    _, r = normalised(xp, streams, norm, eps)
    shape = streams.shape[-2:]
    matrices = [xp.permute_dims(xp.reshape(one, (-1, *shape)), (1, 2, 0)) for one in rows]
    weighted = (streams * (1 + xp.reshape(norm, shape)))[..., None, :]
    products = [_xp.matmul(xp, weighted, one)[..., 0, :] for one in matrices]
    (whole,) = _xp.over_channels(xp, xp.concat(products, axis=-1))
    z = xp.sum(r * whole[..., : down.shape[0]], axis=-2) / shape[0]
    return whole, z * _xp.sigmoid(xp, z), r[..., 0]


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, eps: float) -> tuple[Any, ...]:
    """Pull back to u, through the gates too, then through the norm of each stream."""
    xp = _xp.namespace(primals[0])
    x, norm, down, up = (_xp.upcast(xp, array) for array in primals)
    u, r = normalised(xp, x, norm, eps)
    (z,) = _xp.over_channels(xp, averaged(xp, u, down))
    du, ddown, dup = collapsed_pullback(xp, u, z, down, up, _xp.upcast(xp, cotangents[0]))
    dx, dnorm = normalised_pullback(xp, x, norm, r, du)
    gradients = (dx, dnorm, ddown, dup)
    return tuple(_xp.as_dtype_of(xp, d, p) for d, p in zip(gradients, primals, strict=True))


def normalised(xp: Any, x: Any, norm: Any, eps: float) -> tuple[Any, Any]:
    """Return u, and r = 1 / rms of each stream."""
    (square,) = _xp.over_channels(xp, _xp.mean_square(xp, x))
    r = 1 / xp.sqrt(square + eps)
    return x * r * (1 + xp.reshape(norm, x.shape[-2:])), r


def normalised_pullback(xp: Any, x: Any, norm: Any, r: Any, du: Any) -> tuple[Any, Any]:
    """dx = r (g - s mean(s g)) with s = x r and g = du (1 + norm); dnorm = sum_T du s."""
    scaled = x * r
    g = du * (1 + xp.reshape(norm, x.shape[-2:]))
    (pulled,) = _xp.over_channels(xp, _xp.dot(xp, scaled, g)[..., None] / _xp.channels(xp, x))
    dnorm = _xp.sum_tokens(xp, du * scaled, 2)
    return r * (g - scaled * pulled), _xp.merged(xp, dnorm, norm)


def averaged(xp: Any, u: Any, weights: Any) -> Any:
    """Return u @ weights.T / n, or the part of it that this device's channels make."""
    return _xp.project(xp, u, weights) / u.shape[-2]


def collapsed(xp: Any, u: Any, z: Any, up: Any) -> Any:
    """Return h in the dtype of computation, z = u @ down.T / n."""
    gates = _gates(xp, u, z * _xp.sigmoid(xp, z), up)
    return xp.sum(gates * u, axis=-2) / u.shape[-2]


def _gates(xp: Any, u: Any, low: Any, up: Any) -> Any:
    return _xp.sigmoid(xp, _xp.unproject(xp, low, _xp.swap(xp, up), u))


def collapsed_pullback(
    xp: Any, u: Any, z: Any, down: Any, up: Any, g_h: Any
) -> tuple[Any, Any, Any]:
    """Return du, ddown and dup."""
    n, columns, s = u.shape[-2], _xp.swap(xp, up), _xp.sigmoid(xp, z)
    gates = _gates(xp, u, z * s, up)
    each = (g_h / n)[..., None, :]
    du, d_gates = each * gates, each * u * gates * (1 - gates)
    dup = _xp.swap(xp, _xp.gram(xp, z * s, d_gates, like=columns))
    (d_low,) = _xp.over_channels(xp, _xp.project(xp, d_gates, columns))
    dz = d_low * s * (1 + z * (1 - s)) / n
    return du + _xp.unproject(xp, dz, down, u), _xp.gram(xp, dz, u, like=down), dup
