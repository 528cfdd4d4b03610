"""The RMS norm that a layer begins with, applied in the pass that makes the layer's input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhc_torch import cuda

__all__ = ["HOOKS", "is_changed", "kernels_run", "norm_inside", "parts_changed"]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_EPS = torch.finfo(torch.float32).eps
"""The eps of a norm that names none: that of the dtype of computation, float32 for half widths.

``_fused_rms_norm`` in ``torch/_decomp/decompositions.py`` (PyTorch 2.13); a test compares.
"""


def is_changed(module: nn.Module) -> bool:
    """Return whether a module must be called: a hook, or a forward of its own, may do more."""
    own = vars(module)
    return "forward" in own or hasattr(module, "_hf_hook") or any(own[name] for name in HOOKS)


def parts_changed(module: nn.Module) -> bool:
    """Return whether a part of a module must be called, which an op would only read."""
    return any(map(is_changed, module.children()))


def norm_inside(norm: nn.Module | None, x: Tensor) -> dict[str, Any]:
    """Return the words with which an op on x applies a norm itself; none if the module must run.

    Where kernels run, the pass that makes h normalises it too. The formulas would gain nothing, so
    there, and for a norm of any other class, dtype or shape, the module itself runs; so it does
    under autocast, which has it return float32 (``ATen/autocast_mode.h``).
    """
    if type(norm) is not nn.RMSNorm or is_changed(norm) or not kernels_run(x):
        return {}
    weight = cast("Tensor | None", norm.weight)
    if weight is None or weight.ndim != 1 or weight.dtype != x.dtype or x.dtype == torch.float64:
        return {}
    if torch.is_autocast_enabled(x.device.type):
        return {}
    return {"h_norm_weight": weight, "h_norm_eps": _EPS if norm.eps is None else norm.eps}


def kernels_run(x: Tensor) -> bool:
    """Return whether kernels run the ops on these streams."""
    return x.is_cuda and x.dtype != torch.float64 and _kernels(x.get_device())


def _has_kernels(index: int) -> bool:
    if index not in _KERNELS:
        probe = torch.empty(0, device=f"cuda:{index}")
        _KERNELS[index] = not cuda.missing() and not cuda.takes((probe,))
    return _KERNELS[index]


_KERNELS: dict[int, bool] = {}
_kernels = cast("Callable[[int], bool]", torch.compiler.assume_constant_result(_has_kernels))
