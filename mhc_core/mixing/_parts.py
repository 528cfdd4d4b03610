"""Common parts of mixers: softmax, and matrices that are sums of weighted 0/1 matrices."""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp

__all__ = ["gathered", "softmax", "softmax_vjp", "spread"]

Places = tuple[tuple[float, ...], ...]  # a row of n * n zeros and ones for each weight


def softmax(xp: Any, logits: Any) -> Any:
    """Return the softmax along the last axis; no difference of finite logits overflows it."""
    half = logits / 2
    powers = xp.exp(_xp.doubled(xp, half - _xp.shift(xp, half, -1)))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def softmax_vjp(xp: Any, weights: Any, g: Any) -> Any:
    """Return the gradient of the logits from the softmax and its cotangent."""
    return weights * (g - xp.sum(weights * g, axis=-1, keepdims=True))


def spread(xp: Any, weights: Any, places: Places, n: int) -> Any:
    """sum_w weights[..., w] P_w -> [..., n, n], with P_w from ``places``."""
    matrices = _xp.constant(xp, places, weights)
    flat = _xp.matmul(xp, weights[..., None, :], matrices)
    return xp.reshape(flat, (*weights.shape[:-1], n, n))


def gathered(xp: Any, g: Any, places: Places) -> Any:
    """Return the gradient of the weights of :func:`spread`, ``sum_ij P_w[i, j] g[..., i, j]``."""
    n = g.shape[-1]
    matrices = _xp.swap(xp, _xp.constant(xp, places, g))
    flat = xp.reshape(g, (*g.shape[:-2], 1, n * n))
    return _xp.matmul(xp, flat, matrices)[..., 0, :]
