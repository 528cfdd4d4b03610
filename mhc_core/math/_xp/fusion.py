"""MLX: what it fuses, and its second core.

MLX computes operation by operation unless mx.compile fuses them, and inside mx.grad it ignores
mx.compile. So a formula has two forms: unrolled sums of products, which fuse into one pass over the
streams (half the time of a matmul on a CPU), and matmuls, which are twice as fast as the sums where
nothing fuses. On a GPU the sums are always taken: a float32 matmul may be TF32.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from mhc_core.math._xp.libraries import Array, is_from

__all__ = [
    "fused",
    "on_gpu",
    "on_two_cores",
    "spreads",
    "sums_pay",
    "unrolled",
]

unrolled: ContextVar[bool] = ContextVar("mhc_unrolled", default=False)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let MLX compile a function of a namespace and arrays into as few passes as possible."""

    @functools.wraps(function)
    def call(xp: Any, *arrays: Array) -> Any:
        # a compiled kernel without elements ends the process in MLX's CUDA build
        if is_from(xp, "mlx") and all(array.size for array in arrays):
            return _fused_by_mlx(function, on_gpu(xp))(*arrays)
        return function(xp, *arrays)

    return call


@functools.cache
def _fused_by_mlx(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    import mlx.core as mx

    def body(*arrays: Array) -> Any:
        token = unrolled.set(_fusing(mx, arrays[0]))
        try:
            return function(mx, *arrays)
        finally:
            unrolled.reset(token)

    return mx.compile(body) if on_gpu or _cpu_compiler() else body


@functools.cache
def _cpu_compiler() -> bool:
    """Return whether mx.compile works on the CPU, where it calls g++."""
    return shutil.which("g++") is not None


def on_gpu(mx: Any) -> bool:
    """Return whether MLX computes on a GPU by default."""
    return mx.default_device().type == mx.DeviceType.gpu


def _fusing(mx: Any, array: Array) -> bool:
    """Return whether this code runs under mx.compile or mx.grad, where arrays have no values.

    mx.eval would work under mx.grad, but arrays evaluated there keep their whole graph alive.
    """
    if on_gpu(mx):
        return True
    try:
        mx.async_eval(array)
    except ValueError:
        return True
    return False


def sums_pay(xp: Any, terms: int) -> bool:
    """Return whether products over a few streams are better unrolled into sums that fuse."""
    if terms > 8:
        return False
    return is_from(xp, "jax") or (is_from(xp, "mlx") and (unrolled.get() or on_gpu(xp)))


def spreads(xp: Any, tokens: int) -> bool:
    """Return whether tokens are enough for two cores of a CPU, of which MLX takes one."""
    return is_from(xp, "mlx") and tokens >= 256 and not on_gpu(xp) and (os.cpu_count() or 1) > 1


def on_two_cores(mx: Any, function: Callable[..., Array], *arrays: Array) -> list[Array]:
    """Apply a function to each half of the tokens."""
    half = arrays[0].shape[0] // 64 * 32
    first = function(mx, *(array[:half] for array in arrays))
    with mx.stream(_second_stream(mx)):
        second = function(mx, *(array[half:] for array in arrays))
    return [first, second]


@functools.cache
def _second_stream(mx: Any) -> Any:
    return mx.new_thread_local_stream(mx.cpu)
