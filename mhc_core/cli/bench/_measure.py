"""The measurement of one row at some sizes: all sides get the same inputs, and take turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mhc_core.cli.bench._arrays import Sizes
from mhc_core.cli.bench._library import leaves
from mhc_core.cli.bench._rows import Row
from mhc_core.cli.bench._sides import Entry, Side, entries
from mhc_core.cli.bench._timing import one_call, stream_of_calls
from mhc_core.text import safe

if TYPE_CHECKING:
    import numpy

__all__ = ["Measured", "Plan", "measure"]

DRAWS = 2  # sets of inputs, used in turn: a side that caches results must compute them again
COMPARED = 32  # tokens at each end whose results are compared: the results of all may be GBs

TIMERS = {"latency": one_call, "throughput": stream_of_calls}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a measurement.

    Attributes
    ----------
    timer
        ``"latency"`` or ``"throughput"``.
    repeats
        Turns of every side.
    calls
        Calls in a turn, or None for as many as a turn needs.
    warmup
        Calls before each turn.
    memory
        Whether the extra memory is measured.
    copy
        Bytes a second of a copy, by library.
    """

    timer: str
    repeats: int
    calls: int | None
    warmup: int = 1
    memory: bool
    copy: Mapping[str, float]


@dataclass
class Measured:
    """One line of the table."""

    row: str
    side: str
    ours: bool
    way: str
    sizes: Sizes
    ms: float = math.nan  # per sublayer, where a call has several
    gb_per_s: float = math.nan  # of the ideal traffic
    percent_of_copy: float = math.nan
    ratio: float | None = (
        None  # its time / that of the first backend: above 1, the backend is faster
    )
    ratio_to: str = ""
    ratios: dict[str, float] = field(default_factory=dict[str, float])  # to every entry of ours
    apart: float = math.nan  # from the first entry, relative to the largest number of an array
    extra_bytes: int | None = None
    failed: str = ""
    wrong: bool = False  # it ran, but its results differ

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, in which anything that is not a number is null."""
        flat = asdict(self)
        flat.update(flat.pop("sizes"))
        return {k: None if _is_not_finite(v) else v for k, v in flat.items()}


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def measure(row: Row, sides: Sequence[Side], sizes: Sizes, plan: Plan) -> list[Measured]:
    """Check that all sides agree, then time them in turns.

    A side that fails, or whose results differ, is reported as such and not timed.
    """
    import numpy

    every = [entry for side in sides for entry in entries(row, side)]
    lines = [Measured(row.name, e.side.name, e.side.ours, e.way, sizes) for e in every]
    inputs = _Inputs(row, sizes, every, numpy.random.default_rng())
    _compare(every, lines, inputs, sizes)
    good = [(e, line) for e, line in zip(every, lines, strict=True) if not line.failed]
    times = _take_turns(good, inputs, plan)
    for entry, line in good:
        if not line.failed:
            _fill_in(line, row, entry, times[entry.label], plan)
            if plan.memory and not entry.replayed:
                line.extra_bytes = _extra_bytes(entry, inputs)
    _ratios(good, times)
    return lines


# ---- inputs -------------------------------------------------------------------------------------


class _Inputs:
    """The same random numbers for every side, copied once to each library."""

    def __init__(
        self, row: Row, sizes: Sizes, every: Sequence[Entry], rng: numpy.random.Generator
    ) -> None:
        self._sets: list[dict[str, list[Any]]] = []
        by_library = {entry.side.library.name: entry.side for entry in every}
        for side in by_library.values():
            if side.remote is not None:
                side.remote.forget()  # the row before this
        for _ in range(DRAWS):
            drawn = row.make(sizes, rng)
            own = {
                name: [side.from_host(array) for array in drawn]
                for name, side in by_library.items()
            }
            for name, side in by_library.items():
                side.library.wait(own[name])
            self._sets.append(own)

    def of(self, entry: Entry, turn: int = 0) -> list[Any]:
        """Return the inputs of a turn."""
        return self._sets[turn % DRAWS][entry.side.library.name]


# ---- agreement ----------------------------------------------------------------------------------


def _compare(
    every: Sequence[Entry], lines: Sequence[Measured], inputs: _Inputs, sizes: Sizes
) -> None:
    """Run every entry and compare it with the first one that ran."""
    first: tuple[Entry, list[Any]] | None = None
    for entry, line in zip(every, lines, strict=True):
        allowed = _allowed(sizes.dtype, entry.side)
        try:
            got = _results(entry, inputs, 0, sizes)
            first = first or (entry, got)
            line.apart = _apart(got, first[1])
            if not line.apart <= allowed:
                # A sum may cancel by chance; a wrong result is wrong on other numbers too.
                others = [_results(one, inputs, 1, sizes) for one in (entry, first[0])]
                line.apart = min(line.apart, _apart(*others))
        except Exception as error:  # whatever a library may raise
            line.failed = _sentence(error)
            continue
        line.wrong = not line.apart <= allowed
        if line.wrong:
            line.failed = (
                f"{line.apart:.1e} apart from {first[0].label}; allowed is {allowed:.1e}: one of "
                "the two is wrong"
            )


def _results(entry: Entry, inputs: _Inputs, turn: int, sizes: Sizes) -> list[Any]:
    with entry.side.chosen():
        result = entry.function(*inputs.of(entry, turn))
        entry.side.library.wait(result)
        return _sample(result, entry.side, sizes)


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return safe(f"{type(error).__name__}: {lines[0]}")


def _sample(result: Any, side: Side, sizes: Sizes) -> list[Any]:
    """Copy results to the host in float64; for many tokens, only the first and the last."""
    import numpy

    parts: list[Any] = []
    for leaf in leaves(result):
        per_token = tuple(leaf.shape[:2]) == (sizes.B, sizes.T) and sizes.T > 2 * COMPARED
        parts += [leaf[:1, :COMPARED], leaf[-1:, -COMPARED:]] if per_token else [leaf]
    return [numpy.asarray(side.to_host(part)).astype(numpy.float64) for part in parts]


def _apart(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Compare results array by array, each relative to its largest number."""
    import numpy

    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not (numpy.isfinite(a).all() and numpy.isfinite(b).all()):
            return math.inf
        worst = max(worst, float(numpy.abs(a - b).max() / max(numpy.abs(b).max(), 1e-30)))
    return worst


def _allowed(dtype: str, side: Side) -> float:
    """Return a tolerance of half the dtype's digits: above any rounding, below any wrong formula.

    On a GPU, other people's float32 matmuls may be TF32, of 10 bits.
    """
    import ml_dtypes

    tf32 = not side.ours and side.library.accelerator
    eps = float(ml_dtypes.finfo(dtype).eps)  # pyright: ignore
    return max(eps, 2.0**-10 if tf32 else 0.0) ** 0.5


# ---- turns --------------------------------------------------------------------------------------


def _take_turns(
    good: Sequence[tuple[Entry, Measured]], inputs: _Inputs, plan: Plan
) -> dict[str, list[float]]:
    """Return the seconds of every turn of every entry; the starting entry changes each turn."""
    times: dict[str, list[float]] = {entry.label: [] for entry, _ in good}
    for turn in range(plan.repeats):
        first = turn % max(len(good), 1)
        for entry, line in [*good[first:], *good[:first]]:
            if line.failed:
                continue
            try:
                with entry.side.chosen():
                    seconds = _turn(entry, inputs.of(entry, turn), plan)
            except Exception as error:  # such as no memory left
                line.failed = _sentence(error)
                continue
            times[entry.label].append(seconds)
    return times


def _turn(entry: Entry, given: Sequence[Any], plan: Plan) -> float:
    """Return the seconds of one turn; a side in a process of its own is timed there."""
    if entry.side.remote is not None:
        waits = plan.timer == "latency"
        return entry.function.seconds(given, waits, plan.calls, plan.warmup)  # pyright: ignore
    timer = TIMERS[plan.timer]
    return timer(entry.function, given, entry.side.library, plan.calls, plan.warmup)


def _fill_in(line: Measured, row: Row, entry: Entry, times: Sequence[float], plan: Plan) -> None:
    seconds = statistics.median(times)
    speed = row.traffic(line.sizes) / seconds
    line.ms = 1e3 * seconds / row.layers
    line.gb_per_s = speed / 1e9
    copy = plan.copy.get(entry.side.library.name)
    line.percent_of_copy = 100 * speed / copy if copy else math.nan


def _extra_bytes(entry: Entry, inputs: _Inputs) -> int | None:
    peak = entry.side.library.peak
    if peak is None:
        return None
    gc.collect()
    with entry.side.chosen():
        return peak(lambda: entry.function(*inputs.of(entry)))


# ---- ratios -------------------------------------------------------------------------------------


def _ratios(good: Sequence[tuple[Entry, Measured]], times: Mapping[str, list[float]]) -> None:
    """Return every entry's time as a multiple of ours: the median over the turns."""
    timed = [(entry, line) for entry, line in good if not line.failed]
    ours = [(entry, line) for entry, line in timed if entry.side.ours]
    for entry, line in timed:
        for other, _ in ours:
            pairs = zip(times[entry.label], times[other.label], strict=True)
            line.ratios[other.label] = statistics.median(mine / its for mine, its in pairs)
        reference = _reference(entry, ours)
        if reference:
            line.ratio, line.ratio_to = line.ratios[reference], reference


def _reference(entry: Entry, ours: Sequence[tuple[Entry, Measured]]) -> str | None:
    """Return the label of the entry to compare with: our first of its library, run the same way.

    If none of ours runs that way, our fastest; if none is of that library, the first of all.
    """
    same = [(e, m) for e, m in ours if e.side.library is entry.side.library] or list(ours)
    if not same:
        return None
    mine = [(e, m) for e, m in same if e.side is same[0][0].side]
    if not entry.side.uncompilable:
        for other, _ in mine:
            if other.way == entry.way:
                return other.label
    return min(mine, key=lambda pair: pair[1].ms)[0].label
