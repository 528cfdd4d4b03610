"""gated_head: kernels ``gated_project``, ``gated_low`` and ``gated_collapse``; no vjp kernels."""

from __future__ import annotations

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _gated


def forward(
    kernels: Kernels, x: Array, norm: Array, down: Array, up: Array, *, eps: float
) -> Array:
    """h = mean_i sigmoid(z)_i u_i with z = silu(u @ down.T / n) @ up.T and the normalised u."""
    return _gated.gated(kernels, x, norm, down, up, None, eps)[0]
