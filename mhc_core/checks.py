"""Checks of the static arguments: each returns the value in its plain form or raises.

Messages name the op, the argument, what was received and what is needed. The checks never read
array values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

__all__ = [
    "Check",
    "boolean",
    "bounds",
    "iterations",
    "non_negative",
    "one_of",
    "positive",
    "positive_int",
]

Check = Callable[[str, str, Any], Any]

MOST_ITERATIONS = 1000  # of Sinkhorn; published models take 20, and libraries unroll the loop
MOST_SHOWN = 200  # characters of a value in a message


def positive_int(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int of at least 1."""
    need = "needs an integer of at least 1"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{owner}: {name} is {_shown(value)}; {need}")
    number = int(value)
    if number < 1:
        raise ValueError(f"{owner}: {name} is {_shown(number)}; {need}")
    return number


def iterations(owner: str, name: str, value: Any) -> int:
    """Return ``value`` as an int from 1 to 1000."""
    number = positive_int(owner, name, value)
    if number > MOST_ITERATIONS:
        raise ValueError(
            f"{owner}: {name} is {_shown(number)}; needs an integer of at most {MOST_ITERATIONS}"
        )
    return number


def non_negative(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a finite float of at least 0."""
    need = "needs a finite number of at least 0"
    number = _real(owner, name, value, need)
    if not 0 <= number < math.inf:
        raise ValueError(f"{owner}: {name} is {number}; {need}")
    return number


def positive(owner: str, name: str, value: Any) -> float:
    """Return ``value`` as a finite float above 0."""
    need = "needs a finite number above 0"
    number = _real(owner, name, value, need)
    if not 0 < number < math.inf:
        raise ValueError(f"{owner}: {name} is {number}; {need}")
    return number


def boolean(owner: str, name: str, value: Any) -> bool:
    """Return ``value``, which must be True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {_shown(value)}; needs True or False")
    return value


def bounds(owner: str, name: str, value: Any) -> tuple[float, float] | None:
    """Return ``value``, None or two finite numbers of which the first is smaller, as floats."""
    if value is None:
        return None
    need = "needs None or two finite numbers, the smaller one first"
    try:
        ends: list[Any] = list(value)
    except TypeError:
        ends = []
    if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, Real) for end in ends):
        raise TypeError(f"{owner}: {name} is {_shown(value)}; {need}")
    try:
        plain = float(ends[0]), float(ends[1])
    except OverflowError:  # an int or a fraction beyond float's range
        plain = math.inf, -math.inf
    if not -math.inf < plain[0] < plain[1] < math.inf:
        raise ValueError(f"{owner}: {name} is {_shown(value)}; {need}")
    return plain


def one_of(*allowed: str) -> Check:
    """Return a check that accepts only the given words."""

    def check(owner: str, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{owner}: {name} is {_shown(value)}; needs {known}")
        return value

    return check


def _real(owner: str, name: str, value: Any, need: str) -> float:
    """Return a real number as a float, infinite where it is beyond float's range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: {name} is {_shown(value)}; {need}")
    try:
        return float(value)
    except OverflowError:  # an int or a fraction beyond float's range
        return -math.inf if value < 0 else math.inf


def _shown(value: Any) -> str:
    """Return the received value for a message, cut short: a value from a file may be very long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer too long to spell, or a deep list
        return f"a {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
