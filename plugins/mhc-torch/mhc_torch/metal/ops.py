"""The ops on MPS tensors by mhc-core's kernels, and PyTorch's transforms."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from mhc_core.errors import BackendUnavailableError
from mhc_torch import ops as neutral
from mhc_torch.metal import NO_MPS
from mhc_torch.metal.host import Metal
from mhc_torch.ops import checkpoint, compile, grad, to_host
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

__all__ = ["checkpoint", "compile", "from_host", "grad", "to_host", "vjp"]


_op, vjp = functions(Kernels("torch-metal", Metal()))


def __getattr__(name: str) -> Any:
    return _op(name)


def from_host(array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """Copy a NumPy array to the GPU."""
    if not torch.backends.mps.is_available():
        raise BackendUnavailableError(f"backend 'torch-metal': {NO_MPS}")
    return neutral.from_host(array).to("mps")
