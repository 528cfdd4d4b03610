"""expand: the host repeats a hidden state; the kernel ``aggregate`` sums its gradient."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops.contract import collapsed


def forward(kernels: Kernels, h: Array, *, n: int) -> Array:
    """x_i = h."""
    return kernels.host.repeat(h, n)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, n: int
) -> tuple[Array]:
    """dh = sum_i g_i."""
    (h,), (g,) = primals, cotangents
    return (collapsed(kernels, g, 1.0, h.dtype),)
