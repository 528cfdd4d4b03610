"""mx.vmap of an op: the op called again, on arrays with one more leading axis.

Without a custom rule, MLX maps the body of a custom function and drops its vjp: the gradients
become autodiff's, whose matmuls are TF32 on GPUs that have it. (MLX traces the body before it calls
the rule, so no rule can help a body that cannot be mapped.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mhc_backends.mlx_common import as_tuple
from mhc_core.signature import Op

__all__ = ["differentiable"]

Axes = Sequence[int | None]
Function = Callable[..., Any]  # of primals, to a tuple
Back = Callable[[Any, Any, Any], Any]  # of primals, cotangents and outputs, to a tuple


def differentiable(
    forward: Function, back: Back, op: Op, names: Sequence[str], again: Function
) -> Function:
    """Join a forward of an op with its vjp, so that mx.grad and mx.vmap work in any order.

    ``names`` are those of its arrays, and ``again`` is the finished function as callers use it, for
    instance compiled.
    """
    ranks: dict[Any, tuple[int, ...]] = {}

    def noting(*primals: mx.array) -> Any:
        outputs = forward(*primals)
        ranks[_ranks(primals)] = _ranks(outputs)
        return outputs

    def rule(inputs: Sequence[mx.array], axes: Axes) -> Any:
        led = leading(op, names, inputs, axes)
        if led is None:
            return _by_the_body(forward, back, inputs, axes)
        before = [a.ndim - (k is not None) for a, k in zip(inputs, axes, strict=True)]
        pairs = zip(again(*led), ranks[tuple(before)], strict=True)
        size = _size(inputs, axes)
        outputs = tuple(_mapped(output, rank, size) for output, rank in pairs)
        return outputs, (0,) * len(outputs)

    return _custom(noting, back, rule)


def _mapped(output: mx.array, rank: int, size: int) -> mx.array:
    """Broadcast an output over the mapped axis if it lacks the axis.

    An array saved for the vjp may depend on parameters alone; None among a rule's axes makes MLX
    fail in some later steps.
    """
    return output if output.ndim > rank else mx.broadcast_to(output, (size, *output.shape))


def _custom(forward: Function, back: Back, rule: Function) -> Function:
    function = mx.custom_function(forward)
    function.vjp(back)

    def of_tuples(inputs: Any, axes: Any) -> Any:
        return rule(as_tuple(inputs), as_tuple(axes))

    def push(primals: Any, tangents: Any) -> Any:
        return _pushed(forward, as_tuple(primals), as_tuple(tangents))

    function.jvp(push)
    function.vmap(of_tuples)
    return function


def _pushed(forward: Function, primals: Sequence[mx.array], tangents: Sequence[Any]) -> Any:
    """Push the given tangents forward, by autodiff of the body.

    Without a rule, MLX takes zeros for the missing tangents. Under mx.vmap those zeros are not
    mapped, and MLX's jvp of a matmul fails, since it adds a mapped product to an unmapped one.
    """
    given = [k for k, tangent in enumerate(tangents) if tangent is not None]

    def of_given(*arrays: mx.array) -> Any:
        every = dict(enumerate(primals)) | dict(zip(given, arrays, strict=True))
        return forward(*every.values())

    return tuple(mx.jvp(of_given, [primals[k] for k in given], [tangents[k] for k in given])[1])


def _ranks(arrays: Sequence[mx.array]) -> tuple[int, ...]:
    return tuple(array.ndim for array in arrays)


def _size(inputs: Sequence[mx.array], axes: Axes) -> int:
    return next(a.shape[k] for a, k in zip(inputs, axes, strict=True) if k is not None)


# ---- arrays that may have leading axes are mapped ------------------------------------------------


def leading(
    op: Op, names: Sequence[str], inputs: Sequence[mx.array], axes: Axes
) -> list[mx.array] | None:
    """Move the mapped axis to the front; return None if a parameter is mapped.

    A parameter is an array without leading axes in the op's declaration: all tokens share it.
    """
    words = [op.patterns[name][0] for name in names]
    if any(k is not None and w[0] != "..." for k, w in zip(axes, words, strict=True)):
        return None
    x, k, named = inputs[0], axes[0], len(words[0]) - 1
    shape = x.shape if k is None else (*x.shape[:k], *x.shape[k + 1 :])
    tokens = (_size(inputs, axes), *shape[: len(shape) - named])
    alone = [len(op.patterns[name]) == 1 for name in names]
    return [
        a if w[0] != "..." else _led(a, k, len(w) - 1, tokens, always)
        for a, k, w, always in zip(inputs, axes, words, alone, strict=True)
    ]


def _led(
    array: mx.array, axis: int | None, named: int, tokens: tuple[int, ...], always: bool
) -> mx.array:
    """Return one array with all leading axes, unless all tokens may share it.

    ``named`` is the number of axes after the leading ones, ``always`` whether the leading axes are
    required.
    """
    if axis is None:
        shared = array.ndim == named and not always
        return array if shared else mx.broadcast_to(array, (*tokens, *_last(array, named)))
    array = mx.moveaxis(array, axis, 0)
    last = _last(array, named)
    lacking = len(tokens) + named - array.ndim  # where it was one for all tokens
    array = array.reshape(*tokens[:1], *[1] * lacking, *array.shape[1:])
    return mx.broadcast_to(array, (*tokens, *last))


def _last(array: mx.array, named: int) -> tuple[int, ...]:
    return tuple(array.shape[array.ndim - named :])


# ---- parameters are mapped ----------------------------------------------------------------------


def _by_the_body(forward: Function, back: Back, inputs: Sequence[mx.array], axes: Axes) -> Any:
    """Map the forward over parameters too, with the mapped vjp as its vjp."""

    def mapped(*primals: mx.array) -> Any:
        return as_tuple(mx.vmap(forward, in_axes=tuple(axes))(*primals))

    def pull(primals: Any, cotangents: Any, outputs: Any) -> Any:
        given = as_tuple(primals), as_tuple(cotangents), as_tuple(outputs)
        in_axes = (tuple(axes), *[(0,) * len(arrays) for arrays in given[1:]])
        each = as_tuple(mx.vmap(back, in_axes=in_axes)(*given))
        return tuple(map(_gathered, each, given[0], axes))

    def rule(inputs: Sequence[mx.array], axes: Axes) -> Any:
        return _by_the_body(mapped, pull, inputs, axes)

    outputs = as_tuple(_custom(mapped, pull, rule)(*inputs))
    return outputs, (0,) * len(outputs)


def _gathered(each: mx.array, primal: mx.array, axis: int | None) -> mx.array:
    """Move a mapped array's gradients to its axis, or sum them if the array was not mapped."""
    if axis is not None:
        return mx.moveaxis(each, 0, axis)
    return each.astype(mx.float32).sum(axis=0).astype(primal.dtype)
