"""gated_pre: the kernels of ``gated_head``, which make H_post too."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _gated


def forward(kernels: Kernels, x: Array, *weights: Array, eps: float) -> tuple[Array, ...]:
    """h = mean_i sigmoid(z)_i u_i as in gated_head; h_post = 2 sigmoid(u @ inject.T / n)."""
    return _gated.forward(kernels, x, _gated.Weights(*weights), eps)


def forward_with_saved(
    kernels: Kernels, x: Array, *weights: Array, eps: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, the products with u, the low rank and 1 / rms."""
    return _gated.forward_with_saved(kernels, x, _gated.Weights(*weights), eps)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, eps: float
) -> tuple[Array, ...]:
    """Pull back through H_post, and as in gated_head."""
    x, *weights = primals
    return _gated.vjp(kernels, x, _gated.Weights(*weights), cotangents, saved, eps)
