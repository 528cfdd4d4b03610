"""Each op as one node of autograd's graph: the neutral forward and the hand-written vjp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch

from mhc_core import math
from mhc_core.sharding import Axis, channel_axis, channels_over
from mhc_torch import _knopp
from mhc_torch._precision import full_float32

__all__ = ["apply", "filled", "pull_back", "pull_back_parts", "refuse_second", "witness"]

Tensors = tuple[torch.Tensor, ...]
Arrays = tuple["torch.Tensor | None", ...]  # None for what is absent
Static = tuple[tuple[str, Any], ...]

# For each value that an op saves, its index among the outputs, or None if it is not an output: a
# tensor must not be returned twice. It depends on the op alone; its first forward records it.
_ALSO_OUTPUT: dict[str, tuple[int | None, ...]] = {}


def apply(op: str, arrays: Arrays, static: dict[str, Any]) -> Any:
    """Return an op's outputs, computed as one node of autograd's graph."""
    outputs = filled(
        cast("Tensors", _Op.apply(op, tuple(static.items()), *arrays)),
        math.load(op).OP.kept(static),
    )
    return outputs[0] if len(outputs) == 1 else outputs


def filled(given: Iterable[torch.Tensor], there: Iterable[bool]) -> Arrays:
    """Put None for each tensor that is not there; take no more tensors than are there."""
    tensors = iter(given)
    return tuple(next(tensors) if is_there else None for is_there in there)


def pull_back(
    op: str, primals: Arrays, cotangents: Arrays, saved: Tensors | None, static: dict[str, Any]
) -> Arrays:
    """Pull cotangents back by the hand-written vjp."""
    if op == "sinkhorn_knopp":
        return (_knopp.pull_back(*cast("Tensors", (*primals, *cotangents)), **static),)
    with full_float32(cast("torch.Tensor", primals[0])):
        return math.load(op).vjp(primals, cotangents, saved, **static)


def pull_back_parts(
    op: str,
    primals: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
    static: dict[str, Any],
    pull: Callable[..., Arrays] | None = None,
) -> Arrays:
    """Pull cotangents back on parts of the channels, by ``pull`` or the formulas.

    The gradients cannot be differentiated: PyTorch passes a cotangent through an all-reduce as it
    is, with a warning, where it should be summed.
    """

    def run() -> Arrays:
        if pull is not None:
            return pull(op, primals, cotangents, static)
        return pull_back(op, tuple(primals), tuple(cotangents), None, static)

    there = [one for one in (*primals, *cotangents) if one is not None]
    if torch.is_grad_enabled() and any(one.requires_grad for one in there):
        return cast("Arrays", cast("Any", _Once).apply(op, run, *there))
    return run()


class _Once(torch.autograd.Function):
    """Gradients that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, op: str, run: Callable[[], Arrays], *_: torch.Tensor) -> Arrays:
        ctx.op = op
        return tuple(None if one is None else _owned(one) for one in run())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _second(ctx.op)


class _Op(torch.autograd.Function):
    """An op's autograd function: the op's outputs, then what else the vjp saves beside its primals.

    Saved values are outputs because torch.func lets a function save nothing else.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, static: Static, *primals: torch.Tensor | None) -> Tensors:
        outputs, saved = _run(op, dict(static), primals)
        where = tuple(_index(outputs, value) for value in saved)
        _ALSO_OUTPUT[op] = where
        extra = [value for value, index in zip(saved, where, strict=True) if index is None]
        return *map(_owned, outputs), *extra

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.op, ctx.static, *primals = inputs
        ctx.axis = channel_axis()
        ctx.kept = math.load(ctx.op).OP.kept(dict(ctx.static))
        extra = iter(output[sum(ctx.kept) :])
        where = _ALSO_OUTPUT[ctx.op]
        ctx.primals = len(primals)
        ctx.save_for_backward(
            *primals,
            *[next(extra) if index is None else output[index] for index in where],
            *witness(ctx.axis, primals),
        )
        ctx.saved = len(primals) + len(where)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # read once: a checkpoint recomputes them at each access
        primals, saved = kept[: ctx.primals], kept[ctx.primals : ctx.saved]
        # If this backward is itself differentiated, the saved values are recomputed from the
        # primals, because the vjp has no cotangents for saved values.
        if torch.is_grad_enabled():
            saved = None
        refuse_second(ctx.op, ctx.axis)
        given = filled(cotangents, ctx.kept)
        with channels_over(ctx.axis):  # a thread of autograd's has a context of its own
            gradients = pull_back(ctx.op, primals, given, saved, dict(ctx.static))
        needed = zip(ctx.needs_input_grad[2:], gradients, strict=True)
        return None, None, *[gradient if needs else None for needs, gradient in needed]


def refuse_second(op: str, axis: Axis | None) -> None:
    """Raise in a backward that is itself differentiated, where devices share channels."""
    if axis is not None and torch.is_grad_enabled():
        raise _second(op)


def _second(op: str) -> Exception:
    return RuntimeError(
        f"{op}: gradients of gradients (create_graph=True) need whole channels, not their "
        "parts on several devices"
    )


def witness(axis: Axis | None, primals: Sequence[Any]) -> tuple[Any, ...]:
    """Return what is saved besides, where devices share channels.

    torch.utils.checkpoint compares the number of tensors that are saved, so it refuses a
    recomputation outside the block, whose numbers would be wrong.
    """
    return () if axis is None else (next(one for one in primals if one is not None),)


def _run(op: str, static: dict[str, Any], primals: Arrays) -> tuple[Tensors, Tensors]:
    """Return the outputs, and the values that the vjp would otherwise recompute."""
    if op == "sinkhorn_knopp":
        return (_knopp.sinkhorn_knopp(*cast("Tensors", primals), **static),), ()
    module = math.load(op)
    with full_float32(cast("torch.Tensor", primals[0])):
        if hasattr(module, "forward_with_saved"):
            outputs, saved = module.forward_with_saved(*primals, **static)
            return tuple(output for output in outputs if output is not None), tuple(saved)
        outputs: Any = module.forward(*primals, **static)
    return (outputs if len(module.OP.outputs) > 1 else (outputs,)), ()


def _index(outputs: Tensors, value: torch.Tensor) -> int | None:
    return next((i for i, output in enumerate(outputs) if output is value), None)


def _owned(output: torch.Tensor) -> torch.Tensor:
    """Return a copy of a view: of an input, or of a matrix per token laid out token by token.

    Autograd does not allow writing to a node's output that is a view.
    """
    return output.clone(memory_format=torch.contiguous_format) if output._is_view() else output
