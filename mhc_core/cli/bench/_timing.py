"""The seconds of one call, in the two ways in which users wait for a GPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from mhc_core.cli.bench._library import Library, leaves

__all__ = ["TURN", "copy_speed", "one_call", "stream_of_calls"]

TURN = 0.05  # seconds that a turn lasts at least, if MOST calls are enough for it
MOST = 200

Function = Callable[..., Any]


def one_call(
    function: Function,
    arrays: Sequence[Any],
    library: Library,
    calls: int | None,
    warmup: int = 1,
) -> float:
    """Call and wait repeatedly; return the median."""
    first, _ = _warm(function, arrays, library, warmup)
    count = calls or min(max(round(TURN / max(first, 1e-9)), 1), MOST)
    times: list[float] = []
    gc.collect()
    for _ in range(count):
        start = time.perf_counter()
        library.wait(function(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stream_of_calls(
    function: Function,
    arrays: Sequence[Any],
    library: Library,
    calls: int | None,
    warmup: int = 1,
) -> float:
    """Issue calls without waiting, wait once at the end; return the mean."""
    first, size = _warm(function, arrays, library, warmup)
    count = calls or min(max(round(TURN / max(first, 1e-9)), 3), MOST)
    count = max(min(count, library.at_once // max(size, 1)), 1)
    result: Any = None
    held: list[Any] = []
    gc.collect()
    start = time.perf_counter()
    for _ in range(count):
        result = function(*arrays)
        library.issue(result)
        if library.holds:
            held.append(result)
    library.wait(held or result)
    return (time.perf_counter() - start) / count


def _warm(
    function: Function, arrays: Sequence[Any], library: Library, times: int
) -> tuple[float, int]:
    """Warm the caches as this side does; return the last run's seconds and bytes."""
    seconds, result = 0.0, None
    for _ in range(times):
        start = time.perf_counter()
        result = function(*arrays)
        library.wait(result)
        seconds = time.perf_counter() - start
    return seconds, sum(int(getattr(leaf, "nbytes", 0)) for leaf in leaves(result))


def copy_speed(library: Library, from_host: Function, numbers: Any, repeats: int) -> float:
    """Return the bytes a second, read and written, of copying an array far beyond the caches."""
    array = from_host(numbers)
    library.wait(array)
    turns = [stream_of_calls(library.copy, (array,), library, None) for _ in range(repeats)]
    return 2 * numbers.nbytes / statistics.median(turns)
