"""The ops on MLX arrays: compiled once per static configuration, with the hand-written vjps.

On a GPU a whole op is compiled. On a CPU only the passes over the streams are (the maths marks them
with ``fused``): there mx.compile calls g++ for every kernel, 12 s for a whole combine_pre, and
saves little beyond those passes.

Every array is an argument of the custom function: captured arrays would get zero gradients. Inside
another transformation MLX traces these functions into it, so that a user's own mx.compile fuses
across them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mhc_backends.mlx_common import (
    as_tuple,
    checkpoint,
    compile,
    distinct,
    filled,
    from_host,
    grad,
    once,
    placed,
    present,
    to_host,
    vmap,
)
from mhc_backends.mlx_compiled._precompiled import hurried
from mhc_backends.mlx_compiled._vmap import differentiable
from mhc_core import math
from mhc_core.sharding import Axis, channel_axis, channels_over

__all__ = ["checkpoint", "compile", "from_host", "grad", "hurried", "to_host", "vjp", "vmap"]

Static = tuple[tuple[str, Any], ...]

# Its loop ends early where the values can be looked at, which they cannot under mx.compile.
UNCOMPILED = {"sinkhorn_knopp"}


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in math.OPS:
        raise AttributeError(name)
    declared = math.load(name).OP

    def op(*arrays: mx.array | None, **static: Any) -> Any:
        there = tuple(array is not None for array in arrays)
        key = name, tuple(static.items()), _device(), there, channel_axis()
        made = _forward(*key)(*present(arrays))
        outputs = filled(made, declared.kept(static))
        return outputs[0] if len(outputs) == 1 else outputs

    return op


def _device() -> Any:  # MLX's stubs do not say that it can be hashed
    return mx.default_device().type


@functools.cache
def _forward(
    op: str, static: Static, device: Any, there: tuple[bool, ...], axis: Axis | None
) -> Callable[..., Any]:
    """Return a function from the op's arrays to one tuple of its outputs and what its vjp saves.

    It takes the arrays that are ``there``, and returns the outputs that are not None. ``axis`` has
    the devices that share channels, also when the vjp is traced.
    """
    module, options = math.load(op), dict(static)
    kept = module.OP.kept(options)
    count = sum(kept)

    places: tuple[int, ...] = ()  # the indices of the saved arrays in the tuple

    def forward(*primals: mx.array) -> Any:
        nonlocal places
        arrays = filled(primals, there)
        with channels_over(axis):
            if not hasattr(module, "forward_with_saved"):
                return as_tuple(module.forward(*arrays, **options))
            outputs, saved = module.forward_with_saved(*arrays, **options)
        places, every = placed(present(outputs), saved)
        return every

    def pullback(primals: Any, cotangents: Any, outputs: Any) -> Any:
        # the cotangent of a sum is one number, broadcast: without a copy every pass is strided
        cotangents, outputs = as_tuple(cotangents), as_tuple(outputs)
        given = filled([mx.contiguous(c) for c in cotangents[:count]], kept)
        saved = ([a[k] for k in places] for a in (outputs, cotangents)) if places else ()
        arrays = filled(as_tuple(primals), there)
        with channels_over(axis):
            gradients = distinct(present(module.vjp(arrays, given, *saved, **options)))
        return gradients if axis is None else once(op, gradients)

    def again(*arrays: mx.array) -> Any:
        return _forward(op, static, device, there, axis)(*arrays)

    words = [name for name, is_there in zip(module.OP.arrays, there, strict=False) if is_there]
    return _compiled(differentiable(forward, pullback, module.OP, words, again), op, device)


@functools.cache
def _vjp(
    op: str, static: Static, device: Any, there: tuple[bool, ...], axis: Axis | None
) -> Callable[..., Any]:
    module, options = math.load(op), dict(static)

    def function(primals: Any, cotangents: Any) -> Any:
        given = filled(cotangents, module.OP.kept(options))
        with channels_over(axis):
            pulled = present(module.vjp(filled(primals, there), given, **options))
        return pulled if axis is None else once(op, pulled)

    return _compiled(function, op, device)


def _compiled(function: Callable[..., Any], op: str, device: Any) -> Callable[..., Any]:
    if device != mx.DeviceType.gpu or op in UNCOMPILED:
        return function
    compiled = mx.compile(function)

    def call(*arrays: Any) -> Any:
        # a compiled kernel without elements ends the process in MLX's CUDA build
        return (function if _any_empty(arrays) else compiled)(*arrays)

    return call


def _any_empty(arrays: Any) -> bool:
    return any(_any_empty(a) if isinstance(a, tuple) else a.size == 0 for a in arrays)


def vjp(
    op: str,
    primals: tuple[mx.array | None, ...],
    cotangents: tuple[mx.array | None, ...],
    **static: Any,
) -> tuple[mx.array | None, ...]:
    """Pull cotangents back by the hand-written vjp, compiled."""
    there = tuple(array is not None for array in primals)
    pull = _vjp(op, tuple(static.items()), _device(), there, channel_axis())
    return filled(pull(present(primals), present(cotangents)), there)
