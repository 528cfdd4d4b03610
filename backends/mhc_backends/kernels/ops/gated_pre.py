"""gated_pre: kernels ``gated_project``, ``gated_low`` and ``gated_collapse``; no vjp kernels."""

from __future__ import annotations

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _gated


def forward(
    kernels: Kernels, x: Array, norm: Array, down: Array, up: Array, inject: Array, *, eps: float
) -> tuple[Array, Array]:
    """h = mean_i sigmoid(z)_i u_i as in gated_head; h_post = 2 sigmoid(u @ inject.T / n)."""
    h, h_post = _gated.gated(kernels, x, norm, down, up, inject, eps)
    return h, h_post
