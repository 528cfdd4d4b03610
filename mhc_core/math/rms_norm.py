"""rms_norm: root-mean-square normalisation over the last axis."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.signature import Op, Out

OP = Op(
    name="rms_norm",
    arrays={"x": "... C", "weight": "C"},
    outputs={"y": Out("... C", "stream")},
    static={"eps": checks.non_negative},
)


def forward(x: Any, weight: Any, *, eps: float) -> Any:
    """y = x / sqrt(mean(x^2) + eps) weight."""
    xp = _xp.namespace(x)
    return _xp.as_dtype_of(xp, normalised(xp, _xp.upcast(xp, x), _xp.upcast(xp, weight), eps), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, eps: float) -> tuple[Any, Any]:
    """dx = r (w g) - r^3 x mean(x w g); dweight = sum_T g x r."""
    (x, weight), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    dx, dweight, _ = pullback(xp, _xp.upcast(xp, x), _xp.upcast(xp, weight), _xp.upcast(xp, g), eps)
    return _xp.as_dtype_of(xp, dx, x), _xp.sum_to(xp, dweight, weight)


def normalised(xp: Any, x: Any, weight: Any, eps: float) -> Any:
    """Return y in the dtype of computation."""
    return x * _inverse(xp, x, eps) * weight


def pullback(xp: Any, x: Any, weight: Any, g: Any, eps: float) -> tuple[Any, Any, Any]:
    """Return dx, each token's dweight, and y, in the dtype of computation."""
    r = _inverse(xp, x, eps)
    scaled = x * r
    y = scaled * weight
    (pulled,) = _xp.over_channels(xp, _xp.dot(xp, y, g)[..., None] / _xp.channels(xp, x))
    return r * (weight * g - scaled * pulled), g * scaled, y


def _inverse(xp: Any, x: Any, eps: float) -> Any:
    (square,) = _xp.over_channels(xp, _xp.mean_square(xp, x))
    return 1 / xp.sqrt(square + eps)
