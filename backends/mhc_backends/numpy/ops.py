"""The ops on NumPy arrays: the neutral maths, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy import ndarray

from mhc_core import math

Array = ndarray[Any, Any]


def __getattr__(name: str) -> Callable[..., Any]:
    if name in math.OPS:
        return math.load(name).forward
    raise AttributeError(name)


def vjp(
    op: str, primals: tuple[Array, ...], cotangents: tuple[Array, ...], **static: Any
) -> tuple[Array, ...]:
    """Pull cotangents back by the hand-written vjp."""
    return math.load(op).vjp(primals, cotangents, **static)


def from_host(array: Array) -> Array:
    """Return the array itself."""
    return array


def to_host(array: Array) -> Array:
    """Return the array itself."""
    return array
