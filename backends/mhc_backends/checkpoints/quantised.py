"""Matrices of gates that MLX quantised, as ``nn.QuantizedLinear`` stores them.

``weight`` has the elements of a matrix, packed in uint32 from the lowest bit on, so that a row is
one stream of bits. ``scales``, and ``biases`` in the mode "affine", have an entry for each group of
elements of a row. Modes, group sizes and bits are those of ``mx.quantize`` (MLX 0.32.4)::

    affine        scale * element + bias, in the scales' dtype
    mxfp4, mxfp8  2^(scale - 127) * element, elements of E2M1 and E4M3
    nvfp4         scale * element, of E4M3 and E2M1

The shapes tell the mode, since the number of inputs is known from the norm and from the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from mhc_backends.checkpoints.names import OWNER, QUANTISED, Key
from mhc_backends.checkpoints.sources import DTYPES, Tensor

__all__ = ["Packing", "dequantised", "fitting", "parts", "unpacked"]

AFFINE_BITS = (1, 2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
WORD = 32  # bits of uint32

Arrays = np.ndarray[Any, Any]


class Packing(NamedTuple):
    """How a matrix is quantised, in the words of ``mx.quantize``."""

    mode: str
    group_size: int
    bits: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the tensors beside the weight."""
        return QUANTISED if self.mode == "affine" else QUANTISED[:1]


_MATRICES = ("down", "up", "inject")

MICROSCALED = {
    (32, 4): Packing("mxfp4", 32, 4),
    (32, 8): Packing("mxfp8", 32, 8),
    (16, 4): Packing("nvfp4", 16, 4),
}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # ml_dtypes has it from 0.5 on
_E4M3: Arrays = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_ELEMENTS: Mapping[int, Arrays] = {4: np.concatenate([_E2M1, -_E2M1]), 8: _E4M3}


def unpacked(tensors: Mapping[Key, Tensor]) -> tuple[dict[Key, Tensor], dict[Key, Packing]]:
    """Return the tensors with each quantised matrix in its own shape, and how each is packed.

    Raise for parts that do not fit each other, naming them.
    """
    whole = {key: tensor for key, tensor in tensors.items() if not key.part}
    packings: dict[Key, Packing] = {}
    for key, tensor in whole.items():
        beside = [part for part in QUANTISED if key.beside(part) in tensors]
        if not beside:
            if tensor.dtype == "uint32" and key.parameter in _MATRICES:
                raise ValueError(
                    f"{OWNER}: {tensor.name} has dtype uint32, of a quantised matrix, without its "
                    f"scales; needs {key.beside('scales')}, or {', '.join(DTYPES.values())}"
                )
            continue
        scales, biases = (tensors.get(key.beside(part)) for part in QUANTISED)
        if scales is None:
            raise ValueError(
                f"{OWNER}: {key.beside('scales')} is missing beside {key.beside('biases')}"
            )
        inputs = _inputs(key, whole)
        packings[key] = packing = _packing(tensor, scales, biases, inputs)
        norm = whole[key._replace(parameter="norm")]
        dtype = scales.dtype if packing.mode == "affine" else norm.dtype
        whole[key] = tensor._replace(shape=(tensor.shape[0], inputs), dtype=dtype)
    return whole, packings


def parts(key: Key, packing: Packing, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the tensors of a quantised matrix as they are stored, the weight first."""
    return {own: tensors[own] for own in (key, *map(key.beside, packing.parts))}


def dequantised(packing: Packing, weight: Arrays, scales: Arrays, *biases: Arrays) -> Arrays:
    """Return the matrix in float32, from its parts in NumPy."""
    numbers = _numbers(weight, packing.bits)
    grouped = numbers.reshape(len(numbers), -1, packing.group_size)
    if packing.mode == "affine":
        (bias,) = biases
        wide: Arrays = grouped * scales.astype(np.float32)[..., None]
        wide += bias.astype(np.float32)[..., None]
        return cast("Arrays", wide.reshape(numbers.shape))
    e8m0 = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    factors: Arrays = _E4M3[scales] if packing.mode == "nvfp4" else e8m0
    wide = _ELEMENTS[packing.bits][grouped]
    wide *= factors[..., None]
    return cast("Arrays", wide.reshape(numbers.shape))


def _numbers(weight: Arrays, bits: int) -> Arrays:
    """Return the unsigned numbers of ``bits`` bits that fill the words of each row."""
    row = np.ascontiguousarray(weight.astype("<u4")).view(np.uint8)
    stream = np.unpackbits(row, axis=-1, bitorder="little").reshape(len(weight), -1, bits)
    numbers = np.zeros(stream.shape[:-1], np.uint8)
    for bit in range(bits):
        numbers |= stream[..., bit] << bit
    return numbers


# ---- what fits ----------------------------------------------------------------------------------


def _inputs(key: Key, tensors: Mapping[Key, Tensor]) -> int:
    """Return the number of a matrix's columns: the gates' rank, or all channels of the streams."""
    other = "down" if key.parameter == "up" else "norm"
    shape = tensors[key._replace(parameter=other)].shape
    return shape[0] if shape else 0


def _packing(weight: Tensor, scales: Tensor, biases: Tensor | None, inputs: int) -> Packing:
    if weight.dtype != "uint32":
        raise TypeError(
            f"{OWNER}: {weight.name} has dtype {weight.dtype}; needs uint32, since it has scales"
        )
    affine = biases is not None
    allowed = tuple(DTYPES.values()) if affine else ("uint8",)
    if scales.dtype not in allowed:
        without = "" if affine else ", since it has no biases"
        raise TypeError(
            f"{OWNER}: {scales.name} has dtype {scales.dtype}; needs {', '.join(allowed)}{without}"
        )
    for other in (scales, biases):
        if other is not None and (len(other.shape) != 2 or other.shape != scales.shape):
            raise ValueError(
                f"{OWNER}: {other.name} has shape {other.shape}; needs that of {scales.name}, "
                "(rows, groups)"
            )
    if biases is not None and biases.dtype != scales.dtype:
        raise TypeError(
            f"{OWNER}: {biases.name} has dtype {biases.dtype}; needs {scales.dtype}, as "
            f"{scales.name} has"
        )
    found = fitting(weight.shape, scales.shape, inputs, affine)
    if found is None:
        raise ValueError(
            f"{OWNER}: {weight.name} has shape {weight.shape} and {scales.name} {scales.shape}; "
            f"needs rows of {inputs} elements of {_allowed(affine)}"
        )
    return found


def fitting(
    weight: tuple[int, ...], scales: tuple[int, ...], inputs: int, affine: bool
) -> Packing | None:
    """Return the packing for which two shapes belong to a matrix, if there is one."""
    if len(weight) != 2 or weight[0] != scales[0] or not (inputs and scales[1]):
        return None
    bits, rest = divmod(weight[1] * WORD, inputs)
    group, other_rest = divmod(inputs, scales[1])
    if rest or other_rest:
        return None
    if affine:
        fits = bits in AFFINE_BITS and group in AFFINE_GROUPS
        return Packing("affine", group, bits) if fits else None
    return MICROSCALED.get((group, bits))


def _allowed(affine: bool) -> str:
    if affine:
        groups, bits = (", ".join(map(str, known)) for known in (AFFINE_GROUPS, AFFINE_BITS))
        return f"{bits} bits, in groups of {groups}"
    return ", or of ".join(
        f"{one.bits} bits in groups of {one.group_size}" for one in MICROSCALED.values()
    )
