"""Give up what a part of a network computed, and compute it again for the gradients.

``mx.checkpoint`` does that too, but frees little where there are parameters: MLX evaluates what is
needed when it is needed, a parameter's gradient is needed at the very end, and until then the
arrays that it comes from wait, those of all parts. Here a part is computed again once its
cotangents are there, and all its gradients are there before the part before it has its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends._mlx import as_tuple

__all__ = ["is_repeatable", "recomputed"]

tree_flatten = cast("Callable[[Any], list[tuple[str, Any]]]", utils.tree_flatten)
tree_map = cast("Callable[[Callable[[Any], Any], Any], Any]", utils.tree_map)
random_state = cast("Sequence[mx.array]", mx.random.state)


def is_repeatable(value: Any) -> bool:
    """Whether an argument is the same when it is given again: an array, or plain data.

    A cache is not: a layer that is run again would append to it again.
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_repeatable, cast("Sequence[Any]", value)))
    if type(value) is dict:
        return all(map(is_repeatable, cast("dict[Any, Any]", value).values()))
    return value is None or isinstance(value, (mx.array, bool, int, float, str, mx.Dtype))


def recomputed(function: Callable[..., Any], modules: Sequence[nn.Module], *given: Any) -> Any:
    """Give the tuple of arrays ``function(*given)``, which is called again for its gradients.

    Gradients are those of the arrays in ``given`` and of the trainable parameters of ``modules``:
    they must be all that ``function`` uses. Where it draws from MLX's random state, which cannot
    be set back, it is called in the plain way.
    """
    tree: Any = ([module.trainable_parameters() for module in modules], given)
    start = random_state[0]
    drawn = False

    def run(*arrays: mx.array) -> Any:
        nonlocal drawn
        parameters, arguments = _filled(tree, arrays)
        with _parameters(modules, parameters):
            outputs = function(*arguments)
        drawn = random_state[0] is not start
        return outputs

    outputs = as_tuple(_in_order(run)(*_arrays(tree)))
    return function(*given) if drawn else outputs


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _filled(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """Put arrays into the places of a tree's arrays."""
    rest = iter(arrays)

    def fill(leaf: Any) -> Any:
        return next(rest) if isinstance(leaf, mx.array) else leaf

    return tree_map(fill, tree)


@contextmanager
def _parameters(modules: Sequence[nn.Module], parameters: Sequence[Any]) -> Generator[None]:
    """Let modules have other parameters for a while; what is traced must not stay in them."""
    before: list[Any] = [module.trainable_parameters() for module in modules]
    for module, other in zip(modules, parameters, strict=True):
        module.update(other)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.update(own)


def _in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Join a function of arrays with the vjp that calls it again, and hold that in order."""
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
    """Give arrays that MLX evaluates after others."""
    return cast("list[mx.array]", mx.depends(list(arrays), list(others)))
