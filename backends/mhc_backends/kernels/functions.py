"""The functions of a kernel backend: forwards and vjps that MLX can differentiate.

:class:`Ops` makes them from the modules in ``mhc_backends.kernels.ops``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mhc_backends.kernels import ops
from mhc_backends.kernels.mlx import Kernels
from mhc_backends.mlx_common import as_tuple, distinct, placed
from mhc_backends.mlx_compiled import ops as mlx_ops
from mhc_core import gradients
from mhc_core import math as neutral_math
from mhc_core.signature import UNMIXED

__all__ = ["Ops", "has_kernels"]

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Ops:
    """The functions of a backend: an op per attribute, and ``vjp``.

    An op consists of its forward kernels and its vjp kernels, joined by ``mx.custom_function`` with
    every array as an argument: captured arrays would get zero gradients. ``compiled`` is
    ``mx.compile``, with which MLX builds a kernel's text once and not at every call, or None if
    kernels cannot be traced.
    """

    def __init__(self, kernels: Kernels, compiled: Compile | None = None) -> None:
        self._kernels = kernels
        self._compiled: Compile = compiled or (lambda function: function)
        self._forward = functools.cache(self._make_forward)
        self._inference = functools.cache(self._make_inference)
        self._vjp = functools.cache(self._make_vjp)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ops.OPS:
            raise AttributeError(name)

        def op(*arrays: mx.array | None, **static: Any) -> Any:
            if not has_kernels(name, arrays, static):
                return getattr(mlx_ops, name)(*arrays, **static)
            function = self._forward if gradients.wanted() else self._inference
            outputs = function(name, tuple(static.items()))(*arrays)
            count = ops.outputs(name)
            return outputs[0] if count == 1 else tuple(outputs[:count])

        return op

    def vjp(
        self, op: str, primals: Sequence[Any], cotangents: Sequence[Any], **static: Any
    ) -> tuple[Any, ...]:
        """Pull cotangents back by an op's vjp kernels."""
        if not has_kernels(op, primals, static):
            return mlx_ops.vjp(op, tuple(primals), tuple(cotangents), **static)
        return tuple(self._vjp(op, tuple(static.items()))(tuple(primals), tuple(cotangents)))

    def _make_forward(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        """Return a function from the op's arrays to one tuple: outputs, then what its vjp saves."""
        module, options, count = ops.load(op), dict(static), ops.outputs(op)
        places: tuple[int, ...] = ()  # the indices of the saved arrays in the tuple

        # Without stop_gradient mx.jvp asks the kernels for their derivatives before our rule.

        def forward(*primals: mx.array) -> tuple[mx.array, ...]:
            nonlocal places
            stopped = map(mx.stop_gradient, primals)
            if not hasattr(module, "forward_with_saved"):
                return as_tuple(module.forward(self._kernels, *stopped, **options))
            outputs, saved = module.forward_with_saved(self._kernels, *stopped, **options)
            places, every = placed(as_tuple(outputs), saved)
            return every

        def pullback(primals: Any, cotangents: Any, outputs: Any) -> Any:
            saved = tuple(as_tuple(outputs)[k] for k in places)
            return pulled(as_tuple(primals), as_tuple(cotangents)[:count], saved)

        def launches(primals: Any, cotangents: Any, saved: Any) -> Any:
            given = [tuple(map(mx.stop_gradient, a)) for a in (primals, cotangents, saved)]
            return tuple(module.vjp(self._kernels, *given[:2], given[2] or None, **options))

        pulled = mx.custom_function(launches)
        pulled.vjp(functools.partial(_second, op, options))
        pulled.jvp(functools.partial(_no_forward_mode, op))
        differentiable = mx.custom_function(forward)
        differentiable.vjp(pullback)
        differentiable.jvp(functools.partial(_no_forward_mode, op))
        return self._compiled(differentiable)

    def _make_inference(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        """Return the forward without a vjp: a custom function of MLX costs 2 us per output."""
        function = functools.partial(ops.load(op).forward, self._kernels, **dict(static))
        return self._compiled(lambda *primals: as_tuple(function(*primals)))

    def _make_vjp(self, op: str, static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        function = functools.partial(ops.load(op).vjp, self._kernels, **dict(static))
        return self._compiled(function)


def has_kernels(op: str, arrays: Sequence[Any], static: Mapping[str, Any]) -> bool:
    """Return whether kernels compute this call; if not, the neutral maths does, on MLX's arrays.

    Kernels mix by a given H_res, and make it by Sinkhorn alone.
    """
    at, projects = _mixing(op)
    if at is not None and (at >= len(arrays) or arrays[at] is None):
        return False
    variant = static.get("variant")
    if variant is None:
        return True
    return (variant.mixer == "sinkhorn" or not projects) and not variant.beyond


@functools.cache
def _mixing(op: str) -> tuple[int | None, bool]:
    """Return the index of an H_res that may be absent, if any, and whether the op makes one."""
    declared = neutral_math.load(op).OP
    at = list(declared.arrays).index(UNMIXED) if UNMIXED in declared.optional else None
    return at, declared.projects


def _second(op: str, options: dict[str, Any], given: Any, cotangents: Any, _: Any) -> Any:
    """Differentiate a vjp through the neutral maths, since kernels have no derivatives.

    It starts from the primals alone, so saved arrays get zero gradients.
    """
    primals, pulled, saved = map(as_tuple, given)
    count, neutral = len(primals), neutral_math.load(op).vjp

    def neutral_vjp(*arrays: mx.array) -> Any:
        return distinct(neutral(arrays[:count], arrays[count:], **options))

    _, gradients = mx.vjp(neutral_vjp, [*primals, *pulled], list(as_tuple(cotangents)))
    return gradients[:count], gradients[count:], [mx.zeros_like(array) for array in saved]


def _no_forward_mode(op: str, *_: Any) -> Any:
    raise NotImplementedError(
        f"{op}: kernels have no forward-mode derivatives (mx.jvp); pass backend='mlx-compiled', "
        "which has them, or take gradients of gradients by mx.grad"
    )
