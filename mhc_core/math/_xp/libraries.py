"""Which library an array is of, its dtypes, and casts that a compiler does not undo."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = [
    "Array",
    "as_dtype_of",
    "by_platform",
    "e4m3_bits",
    "from_e4m3_bits",
    "is_from",
    "lax",
    "namespace",
    "reinterpreted",
    "upcast",
]

Array = Any


def lax() -> Any:
    """Return jax.lax; JAX is imported by then."""
    return import_module("jax.lax")


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array.

    MLX's arrays name their own namespace. array_api_compat would first test for JAX's arrays by
    ``jax.Array``, which does not exist yet while another thread imports JAX.
    """
    if type(array).__module__.startswith("mlx."):
        return array.__array_namespace__()
    from array_api_compat import array_namespace

    return array_namespace(array)


def is_from(xp: Any, library: str) -> bool:
    """Return whether a namespace is a library's, by its name's start."""
    return xp.__name__.startswith(library)


def upcast(xp: Any, array: Array) -> Array:
    """Convert an array to the dtype of computation: float32, or float64 for float64.

    An array that has that dtype is returned itself, not copied: no caller writes into the result.
    """
    is_float64 = str(array.dtype).endswith("float64")
    return _as(xp, array, xp.float64 if is_float64 else xp.float32)


def as_dtype_of(xp: Any, array: Array, like: Array) -> Array:
    """Return a result in the dtype of ``like``, as asarray would: itself where it has it already.

    So the result must be a new array: if it may be a view of a caller's array, copy it by
    ``xp.astype``, which copies in libraries whose arrays are writable.
    """
    return _as(xp, array, like.dtype)


def _as(xp: Any, array: Array, dtype: Any) -> Array:
    """Cast without a copy where nothing changes; NumPy and PyTorch would make one."""
    if is_from(
        xp, "jax"
    ):  # it makes none, and takes away what is weak about a filled array's dtype
        return xp.astype(_rounded(array, dtype), dtype)
    if array.dtype == dtype:
        return array
    narrowed = xp.astype(array, dtype)
    return _bits_kept(narrowed) if is_from(xp, "array_api_compat.torch") else narrowed


def _bits_kept(array: Array) -> Array:
    """Return a narrow tensor in such a way that torch.compile keeps its rounding.

    Its generated code computes bfloat16 in float32 and leaves out a rounding that is cast back
    (emulate_precision_casts is off in torch/_inductor/config.py). Reading the bits forces the
    rounding. The difference that it makes, 0 in eager code, is added as a constant to autograd.
    """
    import torch
    from torch._subclasses.fake_tensor import is_fake  # the compiler's later stages have no flag

    if array.dtype not in (torch.bfloat16, torch.float16) or not is_fake(array):
        return array
    # without the bitwise_or, the compiler drops both views
    rounded = array.view(torch.int16).bitwise_or(0).view(array.dtype)
    away = (rounded - array).detach()
    return array + torch.where(away.isnan(), 0.0, away)  # NaN where both are infinite


def _rounded(array: Array, dtype: Any) -> Array:
    """Round a JAX array to what a narrower dtype can hold, in a way that XLA must keep.

    XLA drops the rounding of float32 -> bfloat16 -> float32 on GPUs (xla_allow_excess_precision is
    on by default there), but it must keep jax.lax.reduce_precision
    (https://docs.jax.dev/en/latest/_autosummary/jax.lax.reduce_precision.html).
    """
    if str(dtype) not in _NARROW or str(array.dtype) not in ("float32", "float64"):
        return array
    return _narrowing()(array, str(dtype))


# exponent bits, mantissa bits, and the exponent of the step between float16's numbers below 2^-14,
# which reduce_precision rounds to 0; bfloat16's smallest numbers are float32's own
_NARROW = {"bfloat16": (8, 7, 0), "float16": (5, 10, 24)}


@functools.cache
def _narrowing() -> Callable[[Array, str], Array]:
    import jax
    import jax.numpy as jnp

    custom_jvp = typing.cast("Callable[..., Any]", jax.custom_jvp)

    @functools.partial(custom_jvp, nondiff_argnums=(1,))
    def narrowed(array: Array, dtype: str) -> Array:
        exponent, mantissa, step = _NARROW[dtype]
        rounded = jax.lax.reduce_precision(array, exponent, mantissa)
        if not step:
            return rounded
        small = jnp.abs(array) < 2.0**-14
        return jnp.where(small, jnp.round(array * 2.0**step) * 2.0**-step, rounded)

    @narrowed.defjvp
    def _(dtype: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return narrowed(primals[0], dtype), tangents[0]

    return narrowed


def by_platform(on_gpu: Callable[..., Any], elsewhere: Callable[..., Any], *given: Any) -> Any:
    """Apply the form of a JAX function for the platform that it is lowered for, and only that."""
    return lax().platform_dependent(*given, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


def reinterpreted(xp: Any, array: Array, dtype: str) -> Array:
    """Return the bits of an array as another dtype of the same width, "int32" or "float32"."""
    if is_from(xp, "jax"):
        return lax().bitcast_convert_type(array, dtype)
    return array.view(getattr(xp, dtype))


def e4m3_bits(xp: Any, array: Array) -> Array:
    """Return float32 numbers of at most 448 as E4M3, rounded to nearest even, in uint8."""
    if is_from(xp, "mlx"):
        return xp.to_fp8(array)
    if is_from(xp, "jax"):
        return lax().bitcast_convert_type(array.astype("float8_e4m3fn"), "uint8")
    if is_from(xp, "array_api_compat.torch"):
        return array.to(xp.float8_e4m3fn).view(xp.uint8)
    return array.astype(import_module("ml_dtypes").float8_e4m3fn).view(xp.uint8)


def from_e4m3_bits(xp: Any, bits: Array) -> Array:
    """Return the numbers whose E4M3 bits are given, in float32."""
    if is_from(xp, "mlx"):
        return xp.from_fp8(bits, dtype=xp.float32)
    if is_from(xp, "jax"):
        return lax().bitcast_convert_type(bits, "float8_e4m3fn").astype("float32")
    if is_from(xp, "array_api_compat.torch"):
        return bits.view(xp.float8_e4m3fn).to(xp.float32)
    return bits.view(import_module("ml_dtypes").float8_e4m3fn).astype(xp.float32)
