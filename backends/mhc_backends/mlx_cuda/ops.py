"""The ops on MLX arrays, by CUDA kernels, each compiled once per static configuration."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mhc_backends.kernels.functions import Ops
from mhc_backends.kernels.mlx import Kernels
from mhc_backends.kernels.nvidia import memory
from mhc_backends.mlx_common import checkpoint, compile, from_host, grad, to_host
from mhc_backends.mlx_cuda.compiled import finish
from mhc_backends.mlx_cuda.launcher import cuda_kernel
from mhc_backends.mlx_cuda.packed import Packed

__all__ = ["checkpoint", "compile", "from_host", "grad", "to_host", "vjp"]


def _memory() -> int:
    """Return the bytes of threadgroup memory that a kernel may use here."""
    architecture: Any = mx.device_info(mx.Device(mx.gpu)).get("architecture")
    return memory(architecture)


_KERNELS = Kernels(cuda_kernel, "cuda", _memory(), finish)
_OPS = Ops(_KERNELS, mx.compile, Packed(_KERNELS))
vjp = _OPS.vjp


def __getattr__(name: str) -> Any:
    return getattr(_OPS, name)
