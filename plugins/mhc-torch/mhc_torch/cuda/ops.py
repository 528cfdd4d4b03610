"""The ops on CUDA tensors by mhc-core's kernels, and PyTorch's transforms."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from mhc_torch import ops as neutral
from mhc_torch.cuda.driver import Nvidia
from mhc_torch.cuda.launches import Cuda
from mhc_torch.ops import checkpoint, compile, grad, to_host
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

__all__ = ["checkpoint", "compile", "from_host", "grad", "to_host", "vjp"]


_op, vjp = functions(Kernels("torch-cuda", Cuda(Nvidia())))


def __getattr__(name: str) -> Any:
    return _op(name)


def from_host(array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """Copy a NumPy array to the default device if that is a GPU, else to the current GPU."""
    default = torch.get_default_device()
    return neutral.from_host(array).to(default if default.type == "cuda" else "cuda")
