"""Models whose linear layers are quantised, in the two ways of quantisers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import mhc_torch

__all__ = ["check_quantised"]


class Whole(torch.Tensor):
    """A weight of a class of its own, as torchao's: only products know what it stands for."""

    def __new__(cls, scales: torch.Tensor, elements: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, elements.shape, dtype=scales.dtype)

    def __init__(self, scales: torch.Tensor, elements: torch.Tensor) -> None:
        self.parts = scales, elements

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            scales, elements = weight.parts
            return func(x, scales * elements.to(scales.dtype), *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(*args[0].parts)
        raise NotImplementedError(f"{func} of a quantised weight")


class Quantised(nn.Module):
    """A layer that a quantiser puts in the place of another, as bitsandbytes does."""

    def __init__(self, scales: torch.Tensor, elements: torch.Tensor, bias: Any) -> None:
        super().__init__()
        self.bias = bias
        for name, part in (("scales", scales), ("elements", elements)):
            self.register_buffer(name, part)

    @property
    def weight(self) -> torch.Tensor:
        """Return the matrix, whose dtype some models read."""
        return self.scales * self.elements.to(self.scales.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _quantised(model: nn.Module, as_module: bool) -> nn.Module:
    """Quantise every linear layer to 8 bits, in place."""
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                weight = layer.weight.detach()
                scales = weight.abs().amax(-1, keepdim=True) / 127
                parts = scales, (weight / scales).round().to(torch.int8)
                if as_module:
                    setattr(module, name, Quantised(*parts, layer.bias))
                else:
                    layer.weight = nn.Parameter(Whole(*parts), requires_grad=False)
    return model


def check_quantised(model: nn.Module, output: Callable[[Any], torch.Tensor]) -> None:
    """Check a model that is quantised before it is accelerated, and one that is afterwards."""
    before, after = _quantised(copy.deepcopy(model).eval(), False), copy.deepcopy(model).eval()
    with torch.no_grad():
        want = output(before)
        report = mhc_torch.accelerate(before, everywhere=True)
        assert not report.left
        mhc_torch.accelerate(after, everywhere=True)
        for one in (before, _quantised(after, True)):
            assert (output(one) - want).abs().max() <= 1e-5 * want.abs().max()
