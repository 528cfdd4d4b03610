"""expand: MLX repeats a hidden state; the kernel ``aggregate`` sums its gradient."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.mlx import Kernels
from mhc_backends.kernels.ops.contract import collapsed, repeated


def forward(kernels: Kernels, h: mx.array, *, n: int) -> mx.array:
    """x_i = h."""
    return repeated(h, n)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, n: int
) -> tuple[mx.array]:
    """dh = sum_i g_i."""
    (h,), (g,) = primals, cotangents
    return (collapsed(kernels, g, 1.0, h.dtype),)
