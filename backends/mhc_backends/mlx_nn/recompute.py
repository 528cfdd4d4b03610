"""Recomputation: a segment of a network drops its activations and runs again for the gradients.

``mx.checkpoint`` does that too, but saves little memory if a segment has parameters. MLX evaluates
lazily: the gradients of parameters are needed only at the end, and until then the arrays that they
are computed from stay in memory, for all segments. Here a segment is recomputed as soon as its
cotangents are evaluated, and all its gradients are evaluated before the previous segment begins.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends.mlx_common import as_tuple, filled
from mhc_core.sharding import in_this_block

__all__ = ["recomputed"]

tree_flatten = cast("Callable[[Any], list[tuple[str, Any]]]", utils.tree_flatten)
tree_map = cast("Callable[[Callable[[Any], Any], Any], Any]", utils.tree_map)
random_state = cast("Sequence[mx.array]", mx.random.state)


def recomputed(
    function: Callable[..., Any],
    blocks: Sequence[nn.Module],
    modules: Sequence[nn.Module],
    *arguments: Any,
) -> Any:
    """Return the tuple ``function(blocks, *arguments)``, recomputed for its gradients.

    It consists of arrays, and of None where a mapping is None, as H_res of streams that are not
    mixed.
    It has gradients by the arrays in ``arguments`` and by the trainable parameters of ``modules``,
    which are submodules of ``blocks``; ``function`` must use no other arrays. It runs on copies of
    the blocks that hold the traced arrays, so that no other code sees those. It is called without
    recomputation in two cases: if it draws from MLX's random state, which cannot be reset, and if
    an object that cannot be copied, such as a closure, refers to a submodule of a block.
    """
    tree: Any = ([module.trainable_parameters() for module in modules], arguments)
    start = random_state[0]
    drawn = False
    given: list[bool] = []

    def run(*arrays: mx.array) -> Any:
        nonlocal drawn, given
        parameters, traced_arguments = _filled(tree, arrays)
        traced = zip(_arrays(tree[0]), _arrays(parameters), strict=True)
        copies = Copies({id(own): other for own, other in traced})
        outputs = as_tuple(function(copies.of(list(blocks)), *traced_arguments))
        drawn = random_state[0] is not start
        given = [output is not None for output in outputs]
        return tuple(output for output in outputs if output is not None)

    try:
        outputs = as_tuple(_in_order(in_this_block(run))(*_arrays(tree)))
    except CapturedError:
        return function(blocks, *arguments)
    return function(blocks, *arguments) if drawn else filled(outputs, given)


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _filled(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """Return a tree with its arrays replaced by others."""
    rest = iter(arrays)

    def fill(leaf: Any) -> Any:
        return next(rest) if isinstance(leaf, mx.array) else leaf

    return tree_map(fill, tree)


class CapturedError(Exception):
    """An object that cannot be copied refers to a module that must be copied."""


class Copies:
    """Copies of modules in which some arrays, identified by id, are replaced.

    A module shares its plain attributes with its copy, so that a layer may count its runs. In a
    copy, bound methods of a module are bound to that module's copy.
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
            items = cast("list[Any]", value)  # or a tuple
            return type(items)(map(self.of, items))
        if type(value) is dict:
            return {key: self.of(item) for key, item in cast("dict[Any, Any]", value).items()}
        if _holds_a_module(value):
            raise CapturedError
        return value

    def _copied(self, module: nn.Module) -> nn.Module:
        cls = type(module)
        copy = self._made[id(module)] = cls.__new__(cls)
        content = cast("dict[str, Any]", module)
        dict.update(copy, {name: self.of(value) for name, value in content.items()})
        own = vars(module)
        others = {name: self.of(value) for name, value in own.items()}
        shared = all(others[name] is value for name, value in own.items())
        object.__setattr__(copy, "__dict__", own if shared else others)
        return copy


def _holds_a_module(value: Any) -> bool:
    """Return whether an object, such as a closure, refers to a module, directly or indirectly."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, *_WITHOUT_REFERENCES)):
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            return True
        if isinstance(one, FunctionType):  # not its globals, which refer to the whole program
            waiting += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            waiting += gc.get_referents(one)
    return False


_WITHOUT_REFERENCES = (type(None), bool, int, float, complex, str, bytes, mx.array, mx.Dtype)


def _in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of arrays with a vjp that runs it again, in a fixed order of evaluation."""
    custom = mx.custom_function(function)

    def vjp(primals: Any, cotangents: Any, _: Any) -> Any:
        dy = list(as_tuple(cotangents))
        inputs = _after(as_tuple(primals), dy)  # so nothing is recomputed before they are evaluated
        floating = [k for k, x in enumerate(inputs) if mx.issubdtype(x.dtype, mx.floating)]

        def of_floating(*arrays: mx.array) -> Any:
            all_inputs = dict(enumerate(inputs)) | dict(zip(floating, arrays, strict=True))
            return function(*all_inputs.values())

        _, computed = mx.vjp(of_floating, [inputs[k] for k in floating], dy)
        gradients = {k: mx.zeros_like(x) for k, x in enumerate(inputs)}
        gradients.update(zip(floating, computed, strict=True))
        return tuple(_after(gradients.values(), gradients.values()))

    custom.vjp(vjp)
    return custom


def _after(arrays: Iterable[mx.array], others: Iterable[mx.array]) -> list[mx.array]:
    """Return the arrays; MLX evaluates them after the others."""
    return cast("list[mx.array]", mx.depends(list(arrays), list(others)))
