"""gated_head: kernels ``gated_project``, ``gated_low`` and ``gated_collapse``, and of its vjp
``gated_collapse_vjp``, ``gated_dlow``, ``gated_low_vjp``, ``gated_dx`` and ``gated_dfactors``.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import _gated


def forward(
    kernels: Kernels, x: Array, norm: Array, down: Array, up: Array, *, eps: float
) -> Array:
    """h = mean_i sigmoid(z)_i u_i with z = silu(u @ down.T / n) @ up.T and the normalised u."""
    return _gated.forward(kernels, x, _gated.Weights(norm, down, up), eps)[0]


def forward_with_saved(
    kernels: Kernels, x: Array, norm: Array, down: Array, up: Array, *, eps: float
) -> tuple[Array, tuple[Array, ...]]:
    """Return h and, for the vjp, the products with u, the low rank and 1 / rms."""
    (h,), saved = _gated.forward_with_saved(kernels, x, _gated.Weights(norm, down, up), eps)
    return h, saved


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, eps: float
) -> tuple[Array, ...]:
    """Pull back to the gates' logits, through the low rank, then to the streams."""
    x, *weights = primals
    return _gated.vjp(kernels, x, _gated.Weights(*weights), cotangents, saved, eps)
