"""Each op as one node of autograd's graph: the neutral forward and the hand-written vjp."""

from __future__ import annotations

from typing import Any, cast

import torch

from mhc_core import math
from mhc_torch import _knopp
from mhc_torch._precision import full_float32

__all__ = ["apply", "pull_back"]

Tensors = tuple[torch.Tensor, ...]
Static = tuple[tuple[str, Any], ...]

# For each value that an op saves, its index among the outputs, or None if it is not an output: a
# tensor must not be returned twice. It depends on the op alone; its first forward records it.
_ALSO_OUTPUT: dict[str, tuple[int | None, ...]] = {}


def apply(op: str, arrays: Tensors, static: dict[str, Any]) -> Any:
    """Return an op's outputs, computed as one node of autograd's graph."""
    results = cast("Tensors", _Op.apply(op, tuple(static.items()), *arrays))
    count = len(math.load(op).OP.outputs)
    return results[0] if count == 1 else results[:count]


def pull_back(
    op: str, primals: Tensors, cotangents: Tensors, saved: Tensors | None, static: dict[str, Any]
) -> Tensors:
    """Pull cotangents back by the hand-written vjp."""
    if op == "sinkhorn_knopp":
        return (_knopp.pull_back(*primals, *cotangents, **static),)
    with full_float32(primals[0]):
        return math.load(op).vjp(primals, cotangents, saved, **static)


class _Op(torch.autograd.Function):
    """An op's autograd function: the op's outputs, then what else the vjp saves beside its primals.

    Saved values are outputs because torch.func lets a function save nothing else.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, static: Static, *primals: torch.Tensor) -> Tensors:
        outputs, saved = _run(op, dict(static), primals)
        where = tuple(_index(outputs, value) for value in saved)
        _ALSO_OUTPUT[op] = where
        extra = [value for value, index in zip(saved, where, strict=True) if index is None]
        return *map(_owned, outputs), *extra

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.op, ctx.static, *primals = inputs
        ctx.outputs = len(math.load(ctx.op).OP.outputs)
        extra = iter(output[ctx.outputs :])
        where = _ALSO_OUTPUT[ctx.op]
        ctx.primals = len(primals)
        ctx.save_for_backward(
            *primals, *[next(extra) if index is None else output[index] for index in where]
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # read once: a checkpoint recomputes them at each access
        primals, saved = kept[: ctx.primals], kept[ctx.primals :]
        # If this backward is itself differentiated, the saved values are recomputed from the
        # primals, because the vjp has no cotangents for saved values.
        saved = None if torch.is_grad_enabled() else saved
        given = cotangents[: ctx.outputs]
        gradients = pull_back(ctx.op, primals, given, saved, dict(ctx.static))
        needed = zip(ctx.needs_input_grad[2:], gradients, strict=True)
        return None, None, *[gradient if needs else None for needs, gradient in needed]


def _run(op: str, static: dict[str, Any], primals: Tensors) -> tuple[Tensors, Tensors]:
    """Return the outputs, and the values that the vjp would otherwise recompute."""
    if op == "sinkhorn_knopp":
        return (_knopp.sinkhorn_knopp(*primals, **static),), ()
    module = math.load(op)
    with full_float32(primals[0]):
        if hasattr(module, "forward_with_saved"):
            outputs, saved = module.forward_with_saved(*primals, **static)
            return tuple(outputs), tuple(saved)
        outputs: Any = module.forward(*primals, **static)
    return (outputs if len(module.OP.outputs) > 1 else (outputs,)), ()


def _index(outputs: Tensors, value: torch.Tensor) -> int | None:
    return next((i for i, output in enumerate(outputs) if output is value), None)


def _owned(output: torch.Tensor) -> torch.Tensor:
    """Return a copy of a view: of an input, or of a matrix per token laid out token by token.

    Autograd does not allow writing to a node's output that is a view.
    """
    return output.clone(memory_format=torch.contiguous_format) if output._is_view() else output
