"""The cost of a call before its backend's function begins: no array work is done here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mhc_core.cli.bench._arrays import Sizes, draw, dtype_of, shape_of

__all__ = ["Dispatched", "dispatch"]


@dataclass(frozen=True)
class Dispatched:
    """The cost of one small call, in nanoseconds."""

    backend: str
    op: str
    arrays: int
    selection_ns: float
    validation_ns: float
    call_ns: float  # the public call as a whole, with a backend's function that does nothing


SMALL = Sizes(B=1, T=2, n=4, C=8, dtype="float32")
OPS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # label: op, static arguments
    "aggregate": ("aggregate", {}),
    "residual_add_aggregate": ("residual_add_aggregate", {}),
    "combine": ("combine", {}),
    "static_layer": ("static_layer", {"eps": 1e-5, "iterations": 20}),
    "gated_combine": ("gated_combine", {}),
    "combine_pre": ("combine_pre", {}),
    "combine_pre with h_pre": ("combine_pre", {}),
}


def dispatch(backend: str, repeats: int) -> Iterator[Dispatched]:
    """Measure selection, validation and the total overhead of each small call."""
    import mhc_core
    from mhc_core import selection
    from mhc_core.dispatch import get_op
    from mhc_core.signature import signature

    for label, (op, options) in OPS.items():
        arrays = _arrays(backend, op, optional="with" in label)
        has_variant = op == "combine_pre"
        static = {"variant": mhc_core.DEEPSEEK_V4} if has_variant else options
        positional = (*arrays[:7], mhc_core.DEEPSEEK_V4, *arrays[7:]) if has_variant else arrays
        checked = signature(get_op, op, arrays, static)
        measured = {
            "select": partial(selection.select, op, checked, None, arrays),
            "validate": partial(signature, get_op, op, arrays, static),
            "call": partial(getattr(mhc_core, op), *positional),
        }
        measured["call"]()  # discovers, selects, imports
        with _without_array_work(selection):
            times = [_nanoseconds(function, repeats) for function in measured.values()]
        yield Dispatched(backend, label, len(arrays), *times)


def _arrays(backend: str, op: str, optional: bool) -> tuple[Any, ...]:
    import numpy

    from mhc_core.discovery import backend_module, backends
    from mhc_core.dispatch import get_op

    spec = backends()[backend].spec
    assert spec is not None, backend
    own, rng = backend_module(spec), numpy.random.default_rng()
    declared = get_op(op)
    return tuple(
        own.from_host(draw(name, shape_of(pattern, SMALL), dtype_of(pattern, SMALL), rng))
        for name, pattern in declared.arrays.items()
        if optional or name != "h_pre" or name not in declared.optional
    )


@contextmanager
def _without_array_work(selection: Any) -> Generator[None]:
    """Replace every selected function by one that does nothing."""
    selected, recalled = (
        selection._SELECTED,
        selection._RECALLED,
    )  # its tables, without public names

    def nothing(*_: Any, **__: Any) -> None:
        return None

    selection._SELECTED = dict.fromkeys(selected, nothing)
    selection._RECALLED = {
        kind: {
            key: tuple(one._replace(function=nothing) for one in known) for key, known in by.items()
        }
        for kind, by in recalled.items()
    }
    try:
        yield
    finally:
        selection._SELECTED, selection._RECALLED = selected, recalled


def _nanoseconds(function: Callable[[], Any], repeats: int, calls: int = 2000) -> float:
    """Return the median over the repeats of a call's mean time, less the cost of the loop itself.

    It is the thread's own CPU time: dispatch waits for nothing, and other load on the machine must
    not count.
    """

    def mean(body: Callable[[], Any]) -> float:
        start = time.thread_time_ns()
        for _ in range(calls):
            body()
        return (time.thread_time_ns() - start) / calls

    empty = partial(int)  # called like the measured functions, and almost free

    mean(function)
    pairs = [(mean(function), mean(empty)) for _ in range(repeats)]
    return statistics.median(full - loop for full, loop in pairs)
