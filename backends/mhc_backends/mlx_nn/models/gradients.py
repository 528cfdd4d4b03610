"""Gradients for operations without any: choices of indices, rounding, rotations made of views.

No code of a library is copied for this. :func:`with_globals` makes a function from the code of the
installed one that looks up some global names elsewhere; the library's own module is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx

__all__ = ["constant_choices", "straight_through", "with_globals", "with_gradient"]


def with_globals(function: Any, **names: Any) -> Any:
    """Return a copy of a function in which some global names have other values.

    Raises
    ------
    AttributeError
        If the function's code does not use one of the names, because the library has changed.
    """
    for name in names:
        if name not in function.__code__.co_names:
            raise AttributeError(
                f"{function.__module__}.{function.__qualname__} does not use {name}"
            )
    scope = {**function.__globals__, **names}
    code, closure = function.__code__, function.__closure__  # the closure is what super() needs
    made = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def with_gradient(
    function: Callable[[mx.array], mx.array], pullback: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """Return a function of one array whose gradient is ``pullback`` of its output's cotangent."""
    joined: Any = mx.custom_function(function)

    def vjp(_: Any, cotangent: mx.array, __: Any) -> mx.array:
        return pullback(cotangent)

    joined.vjp(vjp)
    return joined


def straight_through(rounding: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return ``rounding`` with the same bits and the gradient of the identity.

    The straight-through estimator of arXiv:1308.3432.
    """

    def rounded(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return with_gradient(lambda x: rounding(x, *args, **kwargs), _same)(x)

    return rounded


def _same(cotangent: mx.array) -> mx.array:
    return cotangent


def _constant(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def constant(*args: Any, **kwargs: Any) -> mx.array:
        return mx.stop_gradient(function(*args, **kwargs))

    return constant


constant_choices = SimpleNamespace(
    **{**vars(mx), "argpartition": _constant(mx.argpartition), "argsort": _constant(mx.argsort)}
)
"""``mlx.core`` in which choices of indices are constants, because MLX cannot differentiate them."""
