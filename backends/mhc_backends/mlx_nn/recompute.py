"""Recomputation: a part of a network drops its activations and runs again for the gradients.

``mx.checkpoint`` does that too, but frees little if there are parameters: MLX evaluates lazily, a
parameter's gradient is only needed at the very end, and until then the arrays that it comes from
stay in memory, for all parts. Here a part is recomputed as soon as its cotangents are evaluated,
and all its gradients are evaluated before the previous part begins.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends.mlx_common import as_tuple

__all__ = ["is_repeatable", "recomputed"]

tree_flatten = cast("Callable[[Any], list[tuple[str, Any]]]", utils.tree_flatten)
tree_map = cast("Callable[[Callable[[Any], Any], Any], Any]", utils.tree_map)
random_state = cast("Sequence[mx.array]", mx.random.state)


def is_repeatable(value: Any) -> bool:
    """Return whether an argument can be passed again unchanged: an array, or plain data.

    A cache cannot: a layer that is run again would append to it again.
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_repeatable, cast("Sequence[Any]", value)))
    if type(value) is dict:
        return all(map(is_repeatable, cast("dict[Any, Any]", value).values()))
    return value is None or isinstance(value, (mx.array, bool, int, float, str, mx.Dtype))


def recomputed(
    function: Callable[..., Any],
    blocks: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    *given: Any,
) -> Any:
    """Return the tuple of arrays ``function(blocks, *given)``, recomputed for its gradients.

    Gradients are taken for the arrays in ``given`` and for the trainable parameters of ``modules``,
    parts of ``blocks``; ``function`` must use no other arrays. It runs on copies of the blocks that
    hold the traced arrays, so that no other code ever sees them. It is called without recomputation
    if it draws from MLX's random state, which cannot be reset, or if an object that cannot be
    copied, such as a closure, refers to a part of a block.
    """
    tree: Any = ([module.trainable_parameters() for module in modules], given)
    start = random_state[0]
    drawn = False

    def run(*arrays: mx.array) -> Any:
        nonlocal drawn
        parameters, arguments = _filled(tree, arrays)
        traced = zip(_arrays(tree[0]), _arrays(parameters), strict=True)
        copies = Copies({id(own): other for own, other in traced})
        outputs = function(copies.of(list(blocks)), *arguments)
        drawn = random_state[0] is not start
        return outputs

    try:
        outputs = as_tuple(_in_order(run)(*_arrays(tree)))
    except CapturedError:
        return function(blocks, *given)
    return function(blocks, *given) if drawn else outputs


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _filled(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """Return a tree with its arrays replaced by others."""
    rest = iter(arrays)

    def fill(leaf: Any) -> Any:
        return next(rest) if isinstance(leaf, mx.array) else leaf

    return tree_map(fill, tree)


class CapturedError(Exception):
    """A module is referred to by something that cannot be copied with it."""


class Copies:
    """Copies of modules in which some arrays, identified by id, are replaced.

    A module shares its plain attributes with its copy, so that a layer may count its runs. A bound
    method of a module is bound to the copy.
    """

    def __init__(self, arrays: Mapping[int, mx.array]) -> None:
        self._arrays = arrays
        self._made: dict[int, nn.Module] = {}

    def of(self, value: Any) -> Any:
        """Copy a module, or a container of modules and arrays."""
        if isinstance(value, mx.array):
            return self._arrays.get(id(value), value)
        if isinstance(value, nn.Module):
            made = self._made.get(id(value))
            return self._copied(value) if made is None else made
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.of(value.__self__))
        if type(value) in (list, tuple):
            several = cast("list[Any]", value)  # or a tuple
            return type(several)(map(self.of, several))
        if type(value) is dict:
            return {key: self.of(item) for key, item in cast("dict[Any, Any]", value).items()}
        if _holds_a_module(value):
            raise CapturedError
        return value

    def _copied(self, module: nn.Module) -> nn.Module:
        kind = type(module)
        copy = self._made[id(module)] = kind.__new__(kind)
        parts = cast("dict[str, Any]", module)
        dict.update(copy, {name: self.of(value) for name, value in parts.items()})
        own = vars(module)
        others = {name: self.of(value) for name, value in own.items()}
        shared = all(others[name] is value for name, value in own.items())
        object.__setattr__(copy, "__dict__", own if shared else others)
        return copy


def _holds_a_module(value: Any) -> bool:
    """Return whether an object refers to a module, directly or indirectly, such as a closure."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, *_LEAVES)):
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            return True
        if isinstance(one, FunctionType):  # its globals would lead everywhere
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            waiting += gc.get_referents(one)
    return False


_LEAVES = (type(None), bool, int, float, complex, str, bytes, mx.array, mx.Dtype)


def _in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Join a function of arrays with a vjp that runs it again, in a fixed order of evaluation."""
    custom = mx.custom_function(function)

    def back(primals: Any, cotangents: Any, _: Any) -> Any:
        given = list(as_tuple(cotangents))
        again = _after(as_tuple(primals), given)
        real = [k for k, array in enumerate(again) if mx.issubdtype(array.dtype, mx.floating)]

        def of_real(*arrays: mx.array) -> Any:
            every = dict(enumerate(again)) | dict(zip(real, arrays, strict=True))
            return function(*every.values())

        _, gradients = mx.vjp(of_real, [again[k] for k in real], given)
        every = {k: mx.zeros_like(array) for k, array in enumerate(again)}
        every.update(zip(real, gradients, strict=True))
        return tuple(_after(every.values(), every.values()))

    custom.vjp(back)
    return custom


def _after(arrays: Iterable[mx.array], others: Iterable[mx.array]) -> list[mx.array]:
    """Return arrays that MLX evaluates after others."""
    return cast("list[mx.array]", mx.depends(list(arrays), list(others)))
