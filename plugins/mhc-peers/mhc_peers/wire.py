"""Messages between the process that compares and the one that runs a peer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Asked", "Began", "Found", "Wire", "from_wire", "to_wire"]


class Wire(NamedTuple):
    """An array between two processes, whose NumPy and ml_dtypes may differ."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def to_wire(array: Any) -> Wire:
    """Return a NumPy array as bytes."""
    array = np.asarray(array)
    return Wire(str(array.dtype), array.shape, array.tobytes())


def from_wire(wire: Wire) -> Any:
    """Return the NumPy array of some bytes."""
    flat: Any = np.frombuffer(wire.data, _numpy_dtype(wire.dtype))
    return flat.reshape(wire.shape).copy()


def _numpy_dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return ml_dtypes.bfloat16


@dataclass(frozen=True)
class Asked:
    """One question: an op of a peer on a case's arrays, forward or gradient, or its time."""

    number: int
    op: str
    quantity: str  # "forward", "gradient", or those after "time "
    names: tuple[str, ...]
    primals: tuple[Wire, ...]
    cotangents: tuple[Wire, ...]
    static: Mapping[str, Any]  # a variant as a dict of its fields


@dataclass(frozen=True)
class Began:
    """The message before a question, by which it is known at which one a process ended."""

    number: int


@dataclass(frozen=True)
class Found:
    """The answer of a peer: its arrays, the seconds of a call, or why there are none.

    ``problem`` is what went wrong at this question, ``unasked`` why it was not asked.
    """

    number: int
    arrays: tuple[Wire, ...] = ()
    seconds: float = 0.0
    problem: str = ""
    unasked: str = ""
