"""The ops on MLX arrays, by Metal kernels, each compiled once per static configuration."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.functions import Ops
from mhc_backends.kernels.mlx import Kernels
from mhc_backends.mlx_common import checkpoint, compile, from_host, grad, to_host

__all__ = ["checkpoint", "compile", "from_host", "grad", "to_host", "vjp"]

_OPS = Ops(Kernels(mx.fast.metal_kernel, "metal"), mx.compile)
vjp = _OPS.vjp


def __getattr__(name: str) -> Any:
    return getattr(_OPS, name)
