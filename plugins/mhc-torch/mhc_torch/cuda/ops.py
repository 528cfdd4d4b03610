"""The ops on CUDA tensors by mhc-core's kernels, and PyTorch's transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from mhc_backends.kernels.ops import OPS
from mhc_torch import ops as neutral
from mhc_torch.cuda.driver import Nvidia
from mhc_torch.cuda.kernels import Kernels
from mhc_torch.ops import checkpoint, compile, grad, to_host

__all__ = ["checkpoint", "compile", "from_host", "functions", "grad", "to_host", "vjp"]


def functions(kernels: Kernels) -> tuple[Callable[[str], Any], Callable[..., Any]]:
    """Return a function from the name of an op to the op, and the vjp, with checks of devices."""

    def op_by_name(name: str) -> Callable[..., Any]:
        if name not in OPS:
            raise AttributeError(name)
        return kernels.function(name)

    def vjp(
        op: str, primals: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], **static: Any
    ) -> tuple[torch.Tensor, ...]:
        """Pull cotangents back by the op's vjp kernels."""
        neutral.require_one_device_of_vjp(op, primals, cotangents)
        return kernels.pull_back(op, tuple(primals), tuple(cotangents), (), static)

    return functools.cache(op_by_name), vjp


_op, vjp = functions(Kernels("torch-cuda", Nvidia()))


def __getattr__(name: str) -> Any:
    return _op(name)


def from_host(array: numpy.ndarray[Any, Any]) -> torch.Tensor:
    """Copy a NumPy array to the default device if that is a GPU, else to the current GPU."""
    default = torch.get_default_device()
    return neutral.from_host(array).to(default if default.type == "cuda" else "cuda")
