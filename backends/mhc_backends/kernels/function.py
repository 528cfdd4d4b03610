"""A launch of a plan as a function of its own: what its text has in every language.

MLX writes the function around a kernel's text itself. Other libraries get the function whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

__all__ = ["LENGTH", "NAME", "Argument", "Function", "lengths", "typed"]

NAME = "mhc_kernel"
"""The name of every function; its text tells them apart."""

LENGTH = re.compile(r"\b(\w+)_shape\[(\d)\]")
"""The length of an axis as a kernel's text asks for it."""


class Argument(NamedTuple):
    """An argument: an array, or the length of one of its axes, of eight bytes.

    Attributes
    ----------
    array
        The name of the input or output.
    axis
        The axis, or None for the array.
    """

    array: str
    axis: int | None = None


class Function(NamedTuple):
    """The text of a function, without what its language needs before it, and its arguments."""

    text: str
    arguments: tuple[Argument, ...]


def lengths(source: str, arrays: Collection[str]) -> Sequence[Argument]:
    """Return the lengths that a kernel's text asks for, as ``x_shape[0]``."""
    found = [Argument(name, int(axis)) for name, axis in dict.fromkeys(LENGTH.findall(source))]
    for one in found:
        if one.array not in arrays:
            raise ValueError(f"the text asks for the shape of {one.array}, which is no array")
    return found


def typed(value: int) -> tuple[str, str]:
    """Return the type of a template argument, and its value as it is written."""
    return ("bool", str(value).lower()) if isinstance(value, bool) else ("int", str(value))
