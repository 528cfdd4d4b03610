"""Gradients for what has none: choices of indices, rounding, rotations made of views.

A library's method is not copied to get them. :func:`rebound` runs the very code of the installed
method with other values for some of the global names that it uses, and the library's own module
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import mlx.core as mx

__all__ = ["choosing", "rebound", "straight_through", "with_gradient"]


def rebound(function: Any, **names: Any) -> Any:
    """Give the same function with other values for some of its global names.

    Raises
    ------
    AttributeError
        Where the function's code does not use such a name: the library is not what it was.
    """
    for name in names:
        if name not in function.__code__.co_names:
            raise AttributeError(f"{function.__module__}.{function.__qualname__} uses no {name}")
    scope = {**function.__globals__, **names}
    code, closure = function.__code__, function.__closure__  # the closure is what super() needs
    made = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def with_gradient(
    function: Callable[[mx.array], mx.array], back: Callable[[mx.array], mx.array]
) -> Callable[[mx.array], mx.array]:
    """Give a function of one array a gradient: ``back`` takes the cotangent of what it returns."""
    joined: Any = mx.custom_function(function)

    def vjp(_: Any, cotangent: mx.array, __: Any) -> mx.array:
        return back(cotangent)

    joined.vjp(vjp)
    return joined


def straight_through(rounding: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Round as ``rounding`` does, bit for bit, and pass gradients as if nothing was rounded.

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


choosing = SimpleNamespace(
    **{**vars(mx), "argpartition": _constant(mx.argpartition), "argsort": _constant(mx.argsort)}
)
"""``mlx.core`` whose choices of indices are constants, as a gradient through them needs."""
