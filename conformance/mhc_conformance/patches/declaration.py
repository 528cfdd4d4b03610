"""Replacements of the oracle's functions, and what they are written with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mhc_conformance import oracle
from mhc_conformance.autodiff import Value, node, straight_through, value
from mhc_conformance.cases import numpy_dtype

__all__ = [
    "PATCHES",
    "Patch",
    "axes",
    "cast",
    "patch",
    "patches",
    "reaches",
    "rounded",
    "stopped",
]

Array = NDArray[Any]
Replaced = Callable[[Callable[..., Any]], Callable[..., Any]]
Which = Literal["both", "backward"]


@dataclass(frozen=True)
class Patch:
    """A bug by the functions of the oracle that it replaces.

    Attributes
    ----------
    name, what
        The bug's name, and what it is in a few words.
    replacements
        The names of the oracle's functions, each with what takes the right one and returns the
        wrong one. All are replaced that an op calls.
    which
        ``"backward"`` for a bug whose outputs are right.
    """

    name: str
    what: str
    replacements: Mapping[str, Replaced]
    which: Which

    @contextlib.contextmanager
    def present(self) -> Generator[None]:
        """Put the bug into the oracle for the length of a block."""
        right = {name: getattr(oracle, name) for name in self.replacements}
        try:
            for name, replacement in self.replacements.items():
                wrong: Any = replacement(right[name])
                # the names of an op's arrays are read from its function
                wrong.__signature__ = inspect.signature(right[name])
                _put(name, wrong)
            yield
        finally:
            for name, function in right.items():
                _put(name, function)


def _put(name: str, function: Callable[..., Any]) -> None:
    setattr(oracle, name, function)
    if name in oracle.OPS:
        oracle.OPS[name] = function


PATCHES: list[Patch] = []
"""Every patch, in the order in which they are tried."""


def patch(
    name: str, what: str, *functions: str, which: Which = "both"
) -> Callable[[Replaced], Replaced]:
    """Register a replacement of one of the oracle's functions, or of several; it gets each."""

    def register(replacement: Replaced) -> Replaced:
        PATCHES.append(Patch(name, what, dict.fromkeys(functions, replacement), which))
        return replacement

    return register


def patches(name: str, what: str, **replacements: Replaced) -> None:
    """Register one bug that replaces several of the oracle's functions, each by its own."""
    PATCHES.append(Patch(name, what, replacements, "both"))


def reaches(op: str) -> set[str]:
    """Return the oracle's functions that an op calls, directly or not."""
    found: set[str] = set()
    left = [op]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        function = getattr(oracle, name, None)
        code = getattr(function, "__code__", None)
        if code is not None and inspect.getmodule(function) is oracle:
            left += code.co_names
    return found


# --- operations -------------------------------------------------------------------------------


def rounded(dtype: str, array: Value) -> Value:
    """Round a value to a dtype; the gradient passes."""
    return straight_through(array, _narrow(dtype, array.data))


def cast(dtype: str, array: Value) -> Value:
    """Round a value to a dtype, and its gradient too, as a cast in the library does."""
    narrow = _narrow(dtype, array.data)
    return node("cast", narrow, (array,), lambda g: (_narrow(dtype, np.asarray(g)),))


def _narrow(dtype: str, data: Array) -> Array:
    return data.astype(numpy_dtype(dtype)).astype(np.float64)


def stopped(array: Value) -> Value:
    """Return a value without a gradient."""
    return value(array.data)


def axes(first: str) -> tuple[int, int]:
    """Return the axis along which Sinkhorn's first lines sum to 1, and the other."""
    return (-2, -1) if first == "columns" else (-1, -2)
