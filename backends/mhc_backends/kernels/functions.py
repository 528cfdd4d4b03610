"""The functions of a kernel backend: forwards and vjps that MLX can differentiate.

:class:`Ops` makes them from the modules in ``mhc_backends.kernels.ops``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx

from mhc_backends.kernels import host, ops
from mhc_backends.kernels.host import Channels
from mhc_backends.kernels.mlx import Kernels
from mhc_backends.mlx_common import (
    as_tuple,
    distinct,
    filled,
    once,
    placed,
    present,
    refuse_second,
)
from mhc_backends.mlx_compiled import ops as mlx_ops
from mhc_core import gradients
from mhc_core import math as neutral_math
from mhc_core.sharding import Axis, Group, channel_axis

__all__ = ["MIXERS", "Ops", "has_kernels"]

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Pack = Callable[[str, dict[str, Any], Sequence[Any]], "tuple[mx.array, ...] | None"]
Static = tuple[tuple[str, Any], ...]
There = tuple[bool, ...]

MIXERS = ("sinkhorn", "identity")
"""The mixers whose mappings kernels make."""


class Ops:
    """The functions of a backend: an op per attribute, and ``vjp``.

    An op consists of its forward kernels and its vjp kernels, joined by ``mx.custom_function`` with
    every array as an argument: captured arrays would get zero gradients. ``compiled`` is
    ``mx.compile``, with which MLX builds a kernel's text once and not at every call, or None if
    kernels cannot be traced. ``packed`` runs an op in the graph of a caller's own ``mx.compile``,
    where arrays between launches cost more than elsewhere, or returns None if it does not take it.
    """

    def __init__(
        self, kernels: Kernels, compiled: Compile | None = None, packed: Pack | None = None
    ) -> None:
        self._kernels = kernels
        self._compiled: Compile = compiled or (lambda function: function)
        self._packed = packed
        self._forward = functools.cache(self._make_forward)
        self._inference = functools.cache(self._make_inference)
        self._vjp = functools.cache(self._make_vjp)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ops.OPS:
            raise AttributeError(name)

        def op(*arrays: mx.array | None, **static: Any) -> Any:
            axis = channel_axis()
            if not has_kernels(name, static) or not _takes(name, axis):
                return getattr(mlx_ops, name)(*arrays, **static)
            key = name, tuple(static.items()), _there(arrays), axis
            function = (self._forward if gradients.wanted() else self._inference)(*key)
            made = function(*present(arrays))
            outputs = filled(made, kept(*key[:2]))
            return outputs[0] if len(outputs) == 1 else outputs

        return op

    def vjp(
        self, op: str, primals: Sequence[Any], cotangents: Sequence[Any], **static: Any
    ) -> tuple[Any, ...]:
        """Pull cotangents back by an op's vjp kernels."""
        axis = channel_axis()
        if not has_kernels(op, static) or not _takes(op, axis):
            return mlx_ops.vjp(op, tuple(primals), tuple(cotangents), **static)
        there = _there(primals)
        pull = self._vjp(op, tuple(static.items()), there, axis)
        return filled(pull(present(primals), present(cotangents)), there)

    def _on(self, axis: Axis | None) -> host.Kernels:
        """Return the kernels on the processes that share channels, if some do."""
        if axis is None:
            return self._kernels
        group = cast("Group", axis)
        return self._kernels.on_parts(Channels(group.size, functools.partial(_sums, group)))

    def _make_forward(
        self, op: str, static: Static, there: There, axis: Axis | None
    ) -> Callable[..., Any]:
        """Return a function from the op's arrays to one tuple: outputs, then what its vjp saves.

        It takes the arrays that are ``there``, and returns the outputs that are not None.
        """
        module, options, kernels = ops.load(op), dict(static), self._on(axis)
        outputs_there = kept(op, static)
        count = sum(outputs_there)
        places: tuple[int, ...] = ()  # the indices of the saved arrays in the tuple

        # Without stop_gradient mx.jvp asks the kernels for their derivatives before our rule.

        def forward(*primals: mx.array) -> tuple[mx.array, ...]:
            nonlocal places
            stopped = filled([mx.stop_gradient(array) for array in primals], there)
            if not hasattr(module, "forward_with_saved"):
                return as_tuple(module.forward(kernels, *stopped, **options))
            outputs, saved = module.forward_with_saved(kernels, *stopped, **options)
            places, every = placed(present(as_tuple(outputs)), saved)
            return every

        def pullback(primals: Any, cotangents: Any, outputs: Any) -> Any:
            saved = tuple(as_tuple(outputs)[k] for k in places)
            return pulled(as_tuple(primals), as_tuple(cotangents)[:count], saved)

        def launches(primals: Any, cotangents: Any, saved: Any) -> Any:
            given = [tuple(map(mx.stop_gradient, a)) for a in (primals, cotangents, saved)]
            arrays = filled(given[0], there), filled(given[1], outputs_there)
            return present(module.vjp(kernels, *arrays, given[2] or None, **options))

        pulled = mx.custom_function(self._building(launches))
        second = functools.partial(_second, op, options, there)
        pulled.vjp(second if axis is None else functools.partial(refuse_second, op))
        pulled.jvp(functools.partial(_no_forward_mode, op))
        differentiable = mx.custom_function(self._building(forward))
        differentiable.vjp(pullback)
        differentiable.jvp(functools.partial(_no_forward_mode, op))
        return self._compiled(differentiable)

    def _make_inference(
        self, op: str, static: Static, there: There, axis: Axis | None
    ) -> Callable[..., Any]:
        """Return the forward without a vjp: a custom function of MLX costs 2 us per output."""
        function = functools.partial(ops.load(op).forward, self._on(axis), **dict(static))

        def inference(*arrays: mx.array) -> tuple[mx.array, ...]:
            return present(as_tuple(function(*filled(arrays, there))))

        def packed(*arrays: mx.array) -> tuple[mx.array, ...] | None:
            return self._packed and self._packed(op, dict(static), filled(arrays, there))

        if self._packed is None or axis is not None:
            return self._compiled(self._building(inference))
        return _Traced(self._building(inference), self._compiled, self._building(packed))

    def _make_vjp(
        self, op: str, static: Static, there: There, axis: Axis | None
    ) -> Callable[..., Any]:
        function = functools.partial(ops.load(op).vjp, self._on(axis), **dict(static))
        cotangents_there = kept(op, static)

        def pull(primals: Any, cotangents: Any) -> tuple[mx.array, ...]:
            arrays = filled(primals, there), filled(cotangents, cotangents_there)
            pulled = present(function(*arrays))
            return pulled if axis is None else once(op, pulled)

        return self._compiled(self._building(pull))

    def _building(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that builds launches, which says when it has built them."""

        @functools.wraps(function)
        def building(*arrays: Any) -> Any:
            made = function(*arrays)
            self._kernels.built()
            return made

        return building


class _Traced:
    """A compiled function, with another for the graphs of callers' own ``mx.compile``.

    Inside such a graph MLX traces the original (``mlx/compile.cpp``), at every call. Elsewhere it
    runs Python only for arrays of new shapes, so the original runs again for known ones.
    """

    def __init__(
        self, original: Callable[..., Any], compiled: Compile, inside: Callable[..., Any]
    ) -> None:
        def counted(*arrays: mx.array) -> Any:
            self._runs += 1
            return original(*arrays)

        self._runs = 0
        self._known: set[Any] = set()
        self._compiled = compiled(counted)
        self._inside = inside

    def __call__(self, *arrays: mx.array) -> Any:
        before = self._runs
        made = self._compiled(*arrays)
        if self._runs == before:
            return made
        kind = tuple((array.shape, array.dtype) for array in arrays)
        if kind not in self._known:
            self._known.add(kind)
            return made
        return self._inside(*arrays) or made


def _takes(op: str, axis: Axis | None) -> bool:
    """Return whether an op's kernels take what each process has of the channels."""
    return axis is None or op in ops.OF_PARTS


def _sums(group: Group, parts: Sequence[mx.array]) -> Sequence[mx.array]:
    """Sum over the processes of a group, in one all-reduce."""
    whole = group.total(mx.concatenate([one.flatten() for one in parts]))
    ends = list(itertools.accumulate(one.size for one in parts))
    sums = mx.split(whole, ends[:-1])
    return [one.reshape(part.shape) for one, part in zip(sums, parts, strict=True)]


def has_kernels(op: str, static: Mapping[str, Any]) -> bool:
    """Return whether kernels compute this call; if not, the neutral maths does, on MLX's arrays.

    Kernels mix by a given H_res or not at all, and make H_res by Sinkhorn alone.
    """
    variant = static.get("variant")
    if variant is None:
        return True
    return not variant.beyond and (variant.mixer in MIXERS or not neutral_math.load(op).OP.projects)


@functools.cache
def kept(op: str, static: Static) -> tuple[bool, ...]:
    """Return which outputs of an op are not None."""
    return tuple(neutral_math.load(op).OP.kept(dict(static)))


def _there(arrays: Sequence[Any]) -> There:
    return tuple([array is not None for array in arrays])


def _second(
    op: str, options: dict[str, Any], there: There, given: Any, cotangents: Any, _: Any
) -> Any:
    """Differentiate a vjp through the neutral maths, since kernels have no derivatives.

    It starts from the primals alone, so saved arrays get zero gradients.
    """
    primals, pulled, saved = map(as_tuple, given)
    count, neutral = len(primals), neutral_math.load(op).vjp

    def neutral_vjp(*arrays: mx.array) -> Any:
        cotangents_there = neutral_math.load(op).OP.kept(options)
        groups = filled(arrays[:count], there), filled(arrays[count:], cotangents_there)
        return distinct(present(neutral(*groups, **options)))

    _, gradients = mx.vjp(neutral_vjp, [*primals, *pulled], list(as_tuple(cotangents)))
    return gradients[:count], gradients[count:], [mx.zeros_like(array) for array in saved]


def _no_forward_mode(op: str, *_: Any) -> Any:
    raise NotImplementedError(
        f"{op}: kernels have no forward-mode derivatives (mx.jvp); pass backend='mlx-compiled', "
        "which has them, or take gradients of gradients by mx.grad"
    )
