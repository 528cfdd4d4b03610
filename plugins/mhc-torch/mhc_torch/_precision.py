"""Full float32, whatever precision the program allows for PyTorch's own matmuls.

Under ``torch.autocast``, ``torch.set_float32_matmul_precision("high")`` and the like, a matmul of
float32 tensors is computed in TF32 or bfloat16. The mappings must not depend on that. The settings
belong to the whole process, so they are read here and never written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["full_float32"]


@contextlib.contextmanager
def full_float32(tensor: torch.Tensor):
    """Compute in full float32 on this tensor's device within a ``with`` block."""
    kind = tensor.device.type
    with contextlib.ExitStack() as entered:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            entered.enter_context(torch.autocast(kind, enabled=False))
        if reduced_precision(kind):
            entered.enter_context(_FullMatmuls())
        yield


def reduced_precision(kind: str) -> bool:
    """Return whether float32 matmuls on such a device may round their operands to fewer bits."""
    library: Any = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
    return library.matmul.fp32_precision not in ("none", "ieee")


class _FullMatmuls(TorchFunctionMode):
    """A mode that replaces the matmuls of float32 tensors, in this thread alone."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.matmul and all(a.dtype == torch.float32 for a in args):
            return _full_matmul(*args)
        return func(*args, **(kwargs or {}))


class _FullMatmul(torch.autograd.Function):
    """A float32 matmul, and its gradients, without a rounding of the operands."""

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (matmul_in_float64 if a.device.type == "cpu" else matmul_by_halves)(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        (a, b), (g,) = ctx.saved_tensors, cotangents
        da, db = _full_matmul(g, b.mT), _full_matmul(a.mT, g)
        return da.sum_to_size(a.shape), db.sum_to_size(b.shape)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Multiply all at once: PyTorch cannot map the views that halve a number."""
        rank = max(t.ndim - (axis is not None) for t, axis in zip(args, in_dims, strict=True))
        a, b = (_leading(t, axis, rank) for t, axis in zip(args, in_dims, strict=True))
        return _full_matmul(a, b), 0


def _leading(a: torch.Tensor, axis: int | None, rank: int) -> torch.Tensor:
    """Move the mapped axis, if there is one, to the front; the result has rank + 1 axes."""
    if axis is None:
        return a
    a = a.movedim(axis, 0)
    return a.reshape(a.shape[0], *[1] * (rank + 1 - a.ndim), *a.shape[1:])


def _full_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", _FullMatmul.apply(a, b))


def matmul_in_float64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return float32 products where CPUs may round to bfloat16."""
    return torch.matmul(a.double(), b.double()).float()


def matmul_by_halves(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return float32 products where the hardware multiplies in TF32, of 11 significant bits.

    a = a_1 + a_2 with a_1 exact in TF32; only a_2 @ b_2, below float32's rounding, is left out.
    """
    (a_1, a_2), (b_1, b_2) = _halves(a), _halves(b)
    return torch.matmul(a_1, b_1) + (torch.matmul(a_1, b_2) + torch.matmul(a_2, b_1))


def _halves(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper = (a.view(torch.int32) & -0x2000).view(torch.float32)  # without the last 13 bits
    return upper, a - upper
