"""The functions of a backend on tensors of any host that runs plans."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mhc_backends.kernels.ops import OPS
from mhc_core.sharding import channel_axis
from mhc_torch import _dtensor
from mhc_torch import ops as neutral
from mhc_torch.plans.kernels import Kernels

__all__ = ["functions"]


def functions(kernels: Kernels) -> tuple[Callable[[str], Any], Callable[..., Any]]:
    """Return a function from the name of an op to the op, and the vjp, with checks of devices."""

    def op_by_name(name: str) -> Callable[..., Any]:
        if name not in OPS:
            raise AttributeError(name)
        return kernels.function(name)

    def vjp(
        op: str,
        primals: Sequence[torch.Tensor | None],
        cotangents: Sequence[torch.Tensor | None],
        **static: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """Pull cotangents back by the op's vjp kernels."""
        if _dtensor.is_distributed(primals):
            return _dtensor.vjp(op, vjp, primals, cotangents, static, kernels.shared.pull_back)
        neutral.require_one_device_of_vjp(op, primals, cotangents)
        if channel_axis() is not None:
            return kernels.shared.pull_back(op, primals, cotangents, static)
        return kernels.vjp(op, primals, cotangents, static)

    return functools.cache(op_by_name), vjp
