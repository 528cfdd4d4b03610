"""A layer's input in FP8: E4M3 with UE8M0 scales of blocks of channels, for FP8 matrix products.

::

    h, h_post, h_res = mhc_core.pre(x, ..., h_norm_weight=w)
    elements, scales = fp8.quantised(h)   # beside h, which stays as it is

A scale is a power of two, of which UE8M0 stores the exponent + 127: for a block with the largest
magnitude a it is the least power of two that is at least ``max(a, 1e-4) / 448``, and the elements
are ``h / scale``, rounded to E4M3, whose largest number is 448. So does DeepGEMM
(``per_token_cast_to_fp8(..., use_ue8m0=True)`` in ``deep_gemm/utils/math.py``), whose kernels take
blocks of 128 and of 32.

The functions accept arrays of NumPy, JAX, MLX or PyTorch and return the same type, under
``jax.jit`` and ``mx.compile`` too. Both results are uint8, since not every library has these
dtypes; in NumPy, JAX and PyTorch ``elements.view(float8_e4m3fn)`` is the same array as floats.
They are formulas, a pass over h of their own: no kernel applies them yet.

**Gradients.** Integers have none. To train through the rounding, use the straight-through
estimator, in which h has the gradient of the rounded h::

    rounded = fp8.dequantised(*fp8.quantised(h)).astype(h.dtype)
    h = h + stop_gradient(rounded - h)

Examples
--------
>>> import numpy
>>> from mhc_core import fp8
>>> elements, scales = fp8.quantised(numpy.array([448.0, 1.0, -3.3]))
>>> elements.tolist(), scales.tolist()
([126, 56, 197], [127])
>>> fp8.dequantised(elements, scales).tolist()
[448.0, 1.0, -3.25]
"""

from __future__ import annotations

from typing import Any

__all__ = ["dequantised", "quantised"]

Array = Any

LEAST = 1e-4  # the smallest magnitude that a scale is made for
_LARGEST = 0x600000  # the mantissa of 448 = 1.75 * 2^8, in the bits of float32
_EXPONENT = 8
_NAN = 0x7F  # in E4M3, which has no infinity
_MANTISSA_BITS, _BIAS, _MAGNITUDE = 23, 127, 0x7FFFFFFF


def quantised(h: Array, block: int = 128) -> tuple[Array, Array]:
    """Return h as E4M3 elements and UE8M0 scales of blocks along the last axis.

    Parameters
    ----------
    h
        ``[..., C]``: what :func:`mhc_core.pre` or :func:`mhc_core.combine_pre` returns.
    block
        The channels that share a scale: 128 or 32. The last block may be shorter.

    Returns
    -------
    elements, scales
        ``[..., C]`` and ``[..., ceil(C / block)]``, uint8: the bits of E4M3, and the exponents of
        the scales plus 127. NaN and infinity become NaN.

    Raises
    ------
    TypeError, ValueError
        For an h that is not an array, has no floating dtype or no axis, and for another block.
    """
    from mhc_core.math import _xp

    _block("quantised", block)
    xp = _namespace("quantised", h)
    blocks = _blocks(xp, xp.astype(_xp.stopped(xp, h), xp.float32), block)
    largest = xp.max(xp.abs(blocks), axis=-1)
    bits = _xp.reinterpreted(xp, xp.where(largest < LEAST, LEAST, largest), "int32") & _MAGNITUDE
    above = xp.astype((bits & (2**_MANTISSA_BITS - 1)) > _LARGEST, xp.int32)
    exponent = (bits >> _MANTISSA_BITS) - _EXPONENT + above
    inverse = _power_of_two(xp, _BIAS - exponent)
    scaled = blocks * inverse[..., None]
    finite = xp.isfinite(scaled)
    elements = _xp.e4m3_bits(xp, xp.where(finite, scaled, 0.0))  # MLX has no bits for NaN
    elements = elements + _NAN * xp.astype(xp.logical_not(finite), xp.uint8)
    whole = xp.reshape(elements, (*h.shape[:-1], -1))[..., : h.shape[-1]]
    return whole, xp.astype(exponent, xp.uint8)


def dequantised(elements: Array, scales: Array, block: int = 128) -> Array:
    """Return the numbers that elements and scales stand for, in float32.

    Parameters
    ----------
    elements, scales, block
        As :func:`quantised` returned and received them.

    Returns
    -------
    array
        ``[..., C]``, float32.

    Raises
    ------
    ValueError
        For shapes that do not belong together, and for another block.
    """
    from mhc_core.math import _xp

    _block("dequantised", block)
    count = -(-elements.shape[-1] // block)
    if tuple(scales.shape) != (*elements.shape[:-1], count):
        raise ValueError(
            f"dequantised: scales has shape {tuple(scales.shape)}; needs "
            f"{(*elements.shape[:-1], count)}, one for each block of {block} of elements "
            f"{tuple(elements.shape)}"
        )
    xp = _xp.namespace(elements)
    blocks = _blocks(xp, _xp.from_e4m3_bits(xp, elements), block)
    scale = _power_of_two(xp, xp.astype(scales, xp.int32) - _BIAS)
    whole = xp.reshape(blocks * scale[..., None], (*elements.shape[:-1], -1))
    return whole[..., : elements.shape[-1]]


def _blocks(xp: Any, array: Array, block: int) -> Array:
    """Return ``[..., C]`` as ``[..., blocks, block]``, with zeros after the last channel."""
    *leading, C = array.shape
    missing = -C % block
    if missing:
        zeros = xp.broadcast_to(xp.zeros_like(array[..., :1]), (*leading, missing))
        array = xp.concat([array, zeros], axis=-1)
    return xp.reshape(array, (*leading, -(-C // block), block))


def _power_of_two(xp: Any, exponent: Array) -> Array:
    """Return ``2^exponent`` in float32, exactly, for the exponents of normal numbers."""
    from mhc_core.math import _xp

    return _xp.reinterpreted(xp, (exponent + _BIAS) << _MANTISSA_BITS, "float32")


def _block(owner: str, block: Any) -> None:
    if isinstance(block, bool) or block not in (32, 128):
        raise ValueError(f"{owner}: block is {block!r}; needs 128 or 32")


def _namespace(owner: str, h: Array) -> Any:
    from mhc_core.math import _xp

    try:
        xp = _xp.namespace(h)
    except TypeError as error:
        raise TypeError(
            f"{owner}: h is a {type(h).__name__}; needs an array of NumPy, JAX, MLX or PyTorch"
        ) from error
    if str(h.dtype).rpartition(".")[-1] not in ("float32", "bfloat16", "float16", "float64"):
        raise TypeError(f"{owner}: h has dtype {h.dtype}; needs a floating one of 16 bits or more")
    if not h.ndim or not h.shape[-1]:
        raise ValueError(f"{owner}: h has shape {tuple(h.shape)}; needs (..., C), C at least 1")
    return xp
