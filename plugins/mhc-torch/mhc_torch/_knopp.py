"""sinkhorn_knopp as two custom operators of PyTorch, because values decide when its loop ends.

``torch.compile`` and ``torch.vmap`` cannot look at values. An operator is a black box to both: it
runs the loop of the neutral maths, stops early under them too, and keeps the 100 possible
iterations out of compiled code. Matrices stop one by one, so a mapped axis is a leading one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from mhc_core.math import sinkhorn_knopp as neutral

__all__ = ["pull_back", "sinkhorn_knopp"]


def _static(max_iterations: int, epsilon: float, log_space: bool) -> dict[str, Any]:
    return {"max_iterations": max_iterations, "epsilon": epsilon, "log_space": log_space}


def _mapping_dtype(matrix: Tensor) -> torch.dtype:
    return torch.float64 if matrix.dtype == torch.float64 else torch.float32


def _leading(tensor: Tensor, axis: int | None, size: int) -> Tensor:
    """Move the mapped axis to the front."""
    return tensor.expand(size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)


@torch.library.custom_op("mhc_torch::sinkhorn_knopp", mutates_args=())
def sinkhorn_knopp(
    matrix: Tensor, *, max_iterations: int, epsilon: float, log_space: bool
) -> Tensor:
    """Run the neutral forward."""
    static = _static(max_iterations, epsilon, log_space)
    return neutral.forward(matrix, **static).contiguous()


@sinkhorn_knopp.register_fake
def _(matrix: Tensor, *, max_iterations: int, epsilon: float, log_space: bool) -> Tensor:
    return matrix.new_empty(matrix.shape, dtype=_mapping_dtype(matrix))


@sinkhorn_knopp.register_vmap
def _(info: Any, axes: Any, matrix: Tensor, **static: Any) -> tuple[Tensor, int]:
    return sinkhorn_knopp(_leading(matrix, axes[0], info.batch_size), **static), 0


@torch.library.custom_op("mhc_torch::sinkhorn_knopp_vjp", mutates_args=())
def _vjp(
    matrix: Tensor, g: Tensor, *, max_iterations: int, epsilon: float, log_space: bool
) -> Tensor:
    """Run the neutral vjp."""
    static = _static(max_iterations, epsilon, log_space)
    (gradient,) = neutral.vjp((matrix,), (g,), **static)
    return gradient.contiguous()


@_vjp.register_fake
def _(matrix: Tensor, g: Tensor, **static: Any) -> Tensor:
    return torch.empty_like(matrix, memory_format=torch.contiguous_format)


@_vjp.register_vmap
def _(info: Any, axes: Any, matrix: Tensor, g: Tensor, **static: Any) -> tuple[Tensor, int]:
    both = [_leading(t, axis, info.batch_size) for t, axis in zip((matrix, g), axes, strict=False)]
    return _vjp(*both, **static), 0


def pull_back(matrix: Tensor, g: Tensor, **static: Any) -> Tensor:
    """Return the gradient of the matrix; its own derivatives are autograd's, step by step."""
    return cast("Tensor", _PullBack.apply(matrix, g, tuple(static.items())))


class _PullBack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, g: Tensor, static: tuple[tuple[str, Any], ...]) -> Tensor:
        return _vjp(matrix, g, **dict(static))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        matrix, g, ctx.static = inputs
        ctx.save_for_backward(matrix, g)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def gradient(matrix: Tensor, g: Tensor) -> Tensor:
            return neutral.vjp((matrix,), (g,), **dict(ctx.static))[0]

        pull = cast("Any", torch.func.vjp)(gradient, *ctx.saved_tensors)[1]
        return *pull(*cotangents), None
