"""What all MLX backends share: whether MLX can run here, host arrays, and the transforms.

Imports nothing heavy; the functions that need MLX import it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

OLDEST = "0.32.3"  # the first that transposes right, and takes the max of no numbers

NO_FLOAT64 = ("float32", "float16", "bfloat16")
# MLX's GPUs have no float64, and on its CPU float64 exp is only as good as float32's.


def missing() -> str | None:
    """Say why MLX cannot run here, or None."""
    if find_spec("mlx") is None:
        return "MLX is not installed: pip install 'mhc-core[mlx]'"
    try:
        core: Any = import_module("mlx.core")
    except ImportError as error:
        return f"MLX has no backend installed: pip install 'mlx[cpu]' ({error})"
    version: str = core.__version__
    if _numbers(version) < _numbers(OLDEST):
        return f"MLX {version} is too old: pip install 'mlx>={OLDEST}'"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def not_the_default() -> str | None:
    """Say that MLX computes on the CPU, where it runs no kernels of ours, or None."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX's default device is the CPU: mx.set_default_device(mx.gpu) before the first op"
    return None


def as_tuple(arrays: Any) -> tuple[Any, ...]:
    """Give one array or several as a tuple: MLX unpacks tuples of one on their way."""
    if isinstance(arrays, (tuple, list)):
        return tuple(cast("Sequence[Any]", arrays))
    return (arrays,)


def placed(outputs: Sequence[Any], saved: Sequence[Any]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Put what a vjp saves behind the outputs, unless it is one of them; say where it is.

    MLX knows no other place for it. So where a vjp is differentiated in turn, what was saved has
    cotangents of its own, zero at first; what is an output too has them there.
    """
    every = list(outputs)
    for array in saved:
        if not any(array is other for other in every):
            every.append(array)
    where = (next(k for k, a in enumerate(every) if a is array) for array in saved)
    return tuple(where), tuple(every)


def distinct(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Return arrays with a node each in MLX's graph, without a copy.

    Two may be one array (dx and dres of residual_add_aggregate). Of what is returned twice, mx.vjp
    counts one cotangent and mx.vmap moves one axis.
    """
    import mlx.core as mx

    kinds = [(array.shape, array.dtype) for array in arrays]
    return tuple(
        mx.contiguous(array) if kind in kinds[:k] else array
        for k, (array, kind) in enumerate(zip(arrays, kinds, strict=True))
    )


def from_host(array: Any) -> Any:
    """Take a NumPy array in, in its own dtype."""
    import mlx.core as mx
    import numpy

    if array.dtype.name == "bfloat16":  # not a dtype of the buffer protocol
        return mx.array(array.view(numpy.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_host(array: Any) -> Any:
    """Give a NumPy array of the same dtype."""
    import ml_dtypes
    import mlx.core as mx
    import numpy

    if array.dtype == mx.bfloat16:
        return numpy.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return numpy.array(array)


def grad(function: Callable[..., Any], argnums: Sequence[int]) -> Callable[..., Any]:
    """mx.grad, always as a tuple."""
    import mlx.core as mx

    several = mx.grad(function, argnums=list(argnums))
    return several if len(argnums) > 1 else lambda *arrays: (several(*arrays),)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """mx.compile."""
    import mlx.core as mx

    return mx.compile(function)


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """mx.vmap."""
    import mlx.core as mx

    return mx.vmap(function, in_axes=tuple(in_axes))


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """mx.checkpoint."""
    import mlx.core as mx

    return mx.checkpoint(function)
