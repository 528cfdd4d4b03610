"""The common parts of all MLX backends: the checks of MLX and its device, host arrays, transforms.

Imports nothing heavy; the functions that need MLX import it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

from mhc_core.sharding import in_this_block

OLDEST = "0.32.3"  # the first with right transposes and a max of empty arrays

WHEEL = "mlx" if sys.platform == "darwin" else "'mlx[cpu]'"
# `pip install mlx` on Linux installs no backend at all.

NO_FLOAT64 = ("float32", "float16", "bfloat16")
# MLX's GPUs have no float64, and on its CPU float64 exp is only as good as float32's.


def missing() -> str | None:
    """Return why MLX cannot run here, or None."""
    if find_spec("mlx") is None:
        return f"MLX is not installed: pip install {WHEEL}"
    try:
        core: Any = import_module("mlx.core")
    except ImportError as error:
        return f"MLX has no backend installed: pip install {WHEEL} ({error})"
    version: str = core.__version__
    if _numbers(version) < _numbers(OLDEST):
        return f"MLX {version} is too old: pip install 'mlx>={OLDEST}'"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def device() -> str:
    """Return the device that MLX computes on, in words."""
    core: Any = import_module("mlx.core")
    processor = "gpu" if core.default_device().type == core.DeviceType.gpu else "cpu"
    words: dict[str, Any] = core.device_info()
    return f"{processor}, {words.get('device_name', 'unknown')}"


def not_the_default() -> str | None:
    """Return a message if MLX computes on the CPU, where it cannot run our kernels, else None."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX's default device is the CPU: mx.set_default_device(mx.gpu) before the first op"
    return None


def as_tuple(arrays: Any) -> tuple[Any, ...]:
    """Return one array or several as a tuple: MLX unpacks tuples of one when it passes them on."""
    if isinstance(arrays, (tuple, list)):
        return tuple(cast("Sequence[Any]", arrays))
    return (arrays,)


def filled(given: Sequence[Any], there: Sequence[bool]) -> tuple[Any, ...]:
    """Put None for each array that is not there: MLX's transformations take arrays alone."""
    arrays = iter(given)
    return tuple(next(arrays) if is_there else None for is_there in there)


def present(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arrays that are there, without the Nones."""
    return tuple(array for array in arrays if array is not None)


def placed(outputs: Sequence[Any], saved: Sequence[Any]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Append what a vjp saves to the outputs, unless it is one of them; return where each one is.

    MLX has no other place for saved arrays. So when a vjp is differentiated in turn, saved arrays
    have cotangents too, zero at first; one that is an output as well shares the output's cotangent.
    """
    every = list(outputs)
    for array in saved:
        if not any(array is other for other in every):
            every.append(array)
    where = (next(k for k, a in enumerate(every) if a is array) for array in saved)
    return tuple(where), tuple(every)


def distinct(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arrays as separate nodes in MLX's graph, without copying.

    Two of them may be one array (dx and dres of residual_add_aggregate). If an array is returned
    twice, mx.vjp counts only one of its cotangents and mx.vmap moves only one axis.
    """
    import mlx.core as mx

    kinds = [(array.shape, array.dtype) for array in arrays]
    return tuple(
        mx.contiguous(array) if kind in kinds[:k] else array
        for k, (array, kind) in enumerate(zip(arrays, kinds, strict=True))
    )


def refuse_second(op: str, *_: Any) -> Any:
    """Raise where a vjp that crosses devices would be differentiated: all-reduces have no vjp."""
    raise RuntimeError(
        f"{op}: gradients of gradients need whole channels, not their parts on several devices"
    )


def once(op: str, gradients: Sequence[Any]) -> tuple[Any, ...]:
    """Return gradients that cannot be differentiated: what crosses devices there has no vjp."""
    import mlx.core as mx

    def same(*arrays: Any) -> Any:
        return arrays

    guarded: Any = mx.custom_function(same)
    guarded.vjp(functools.partial(refuse_second, op))
    return as_tuple(guarded(*gradients))


def from_host(array: Any) -> Any:
    """Return a NumPy array as an MLX array of the same dtype."""
    import mlx.core as mx
    import numpy

    if array.dtype.name == "bfloat16":  # not a dtype of the buffer protocol
        return mx.array(array.view(numpy.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_host(array: Any) -> Any:
    """Return an MLX array as a NumPy array of the same dtype."""
    import ml_dtypes
    import mlx.core as mx
    import numpy

    if array.dtype == mx.bfloat16:
        return numpy.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return numpy.array(array)


def grad(function: Callable[..., Any], argnums: Sequence[int]) -> Callable[..., Any]:
    """Apply mx.grad, always returning a tuple."""
    import mlx.core as mx

    several = mx.grad(function, argnums=list(argnums))
    return several if len(argnums) > 1 else lambda *arrays: (several(*arrays),)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply mx.compile."""
    import mlx.core as mx

    return mx.compile(function)


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """Apply mx.vmap."""
    import mlx.core as mx

    return mx.vmap(function, in_axes=tuple(in_axes))


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply mx.checkpoint."""
    import mlx.core as mx

    def call(*arrays: Any) -> Any:
        return mx.checkpoint(in_this_block(function))(*arrays)

    return call
