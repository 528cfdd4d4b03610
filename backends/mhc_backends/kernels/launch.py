"""How every kernel is launched: the one place for threads, tiles and vector widths.

``MHC_METAL_TUNING`` may name a JSON file that overrides parts of :data:`TABLE`::

    {"combine": {"threads": 128, "elements": 4}, "aggregate": {"turns": 1}}

A launch shape never changes which numbers are summed for one token into which, other than by the
number of threads, and that does not depend on how many tokens there are: so a token's result does
not depend on its batch.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["TABLE", "VARIABLE", "Launch", "Shape", "launch"]

VARIABLE = "MHC_METAL_TUNING"

SIMD = 32
MOST_THREADS = 1024  # of a threadgroup
MOST_GRID = 2**31 - 1  # threads along one axis, which MLX takes as an int
ACCESS_BYTES = 16  # the widest access to memory
REGISTERS = 64  # numbers of the streams that a thread may hold
FILLED = 256  # threadgroups from which on a GPU is busy, so that each may take several turns
ROWS = 256  # that a threadgroup sums at least, where there are more

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the table says of a kernel.

    Attributes
    ----------
    groups
        What a threadgroup takes: a ``"tile"`` of a token's channels, whole tokens (``"token"``:
        sums over C end in it), or a share of ``"rows"`` to be summed.
    threads
        The most threads of a threadgroup; fewer where there is less to do.
    elements
        The most elements that a thread loads and stores at a time; fewer where C, the dtype or
        many streams ask for it.
    turns
        How many times a thread of a ``"tile"`` does that, where the GPU is busy anyway.
    """

    groups: Literal["tile", "token", "rows"]
    threads: int = 256
    elements: int = 8
    turns: int = 2


TABLE: Mapping[str, Shape] = {
    "aggregate": Shape(groups="tile"),
    "aggregate_vjp": Shape(groups="token"),
    "combine": Shape(groups="tile"),
    "combine_vjp": Shape(groups="token", elements=4),
    "combine_vjp_wide": Shape(groups="token", elements=1),
    "sum_rows": Shape(groups="rows", elements=1),
}
"""One line per kernel."""


@dataclass(frozen=True)
class Launch:
    """What a launch needs: the grid in threads, and the elements per thread and access (W)."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    elements: int


def launch(kernel: str, T: int, n: int, C: int, dtype: str) -> Launch:
    """Choose the launch shape for T tokens (or rows) of n streams of C channels.

    The grid is a multiple of the threadgroup, which is a multiple of 32, in both dialects: no
    kernel meets a simdgroup with missing threads.
    """
    shape = _shape(kernel)
    if shape.groups == "rows":
        return _rows(shape, T, C)
    elements = _elements(shape, n, C, dtype)
    accesses = -(-C // elements)
    threads = _threads(shape, accesses)
    tiles = -(-accesses // threads) if shape.groups == "tile" else 1
    if T * tiles > FILLED:
        tiles = -(-tiles // shape.turns)
    return _launch(T, tiles, threads, elements)


def _elements(shape: Shape, n: int, C: int, dtype: str) -> int:
    """Return the largest power of two within all limits that divides C, hence every row."""
    most = min(shape.elements, ACCESS_BYTES // ITEMSIZE[dtype], max(REGISTERS // n, 1))
    return math.gcd(C, 1 << (most.bit_length() - 1))


def _threads(shape: Shape, needed: int) -> int:
    return min(shape.threads, -(-needed // SIMD) * SIMD)


def _rows(shape: Shape, rows: int, columns: int) -> Launch:
    """Choose how many shares of the rows are summed; it depends on nothing but the rows."""
    width = min(columns, shape.threads)
    return _launch(-(-rows // ROWS), -(-columns // width), shape.threads, 1)


def _launch(groups: int, tiles: int, threads: int, elements: int) -> Launch:
    groups = min(groups, MOST_GRID // threads)  # each then takes several tokens, one by one
    return Launch((groups * threads, tiles, 1), (threads, 1, 1), elements)


# ---- tuning --------------------------------------------------------------------------------------


def _shape(kernel: str) -> Shape:
    if kernel not in TABLE:
        raise ValueError(f"no kernel is named {kernel!r}; known are {', '.join(TABLE)}")
    path = os.environ.get(VARIABLE)
    return _tuned(path).get(kernel, TABLE[kernel]) if path else TABLE[kernel]


@functools.cache
def _tuned(path: str) -> dict[str, Shape]:
    """Read a tuning file, once; a wrong one raises ValueError with what it needs."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f'{VARIABLE}={path}: needs an object such as {{"combine": {{...}}}}')
    entries: dict[str, Any] = content  # pyright: ignore[reportUnknownVariableType]
    return {kernel: _override(path, kernel, entry) for kernel, entry in entries.items()}


def _thread_count(value: int) -> bool:
    return value % SIMD == 0 and SIMD <= value <= MOST_THREADS


def _power_of_two(value: int) -> bool:
    return 1 <= value <= 16 and value & (value - 1) == 0


_NEEDS: Mapping[str, tuple[Callable[[int], bool], str]] = {
    "threads": (_thread_count, f"a multiple of {SIMD} up to {MOST_THREADS}"),
    "elements": (_power_of_two, "1, 2, 4, 8 or 16"),
    "turns": (lambda value: value >= 1, "an integer of at least 1"),
}
assert set(_NEEDS) | {"groups"} == {field.name for field in fields(Shape)}


def _override(path: str, kernel: str, entry: Any) -> Shape:
    where = f"{VARIABLE}={path}: {kernel!r}"
    if kernel not in TABLE:
        raise ValueError(f"{where} is no kernel; known are {', '.join(TABLE)}")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}; needs an object with {', '.join(_NEEDS)}")
    changes: dict[str, Any] = entry  # pyright: ignore[reportUnknownVariableType]
    for name, value in changes.items():
        if name not in _NEEDS:
            raise ValueError(f"{where} has {name!r}; known are {', '.join(_NEEDS)}")
        good, need = _NEEDS[name]
        if type(value) is not int or not good(value):
            raise ValueError(f"{where}: {name} is {value!r}; needs {need}")
    return replace(TABLE[kernel], **changes)
