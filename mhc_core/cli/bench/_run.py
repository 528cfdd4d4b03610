"""A run: the options, the measurement, the tables and the record."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from mhc_core.cli.bench import _check, _dispatch, _measure, _record, _table
from mhc_core.cli.bench._arrays import Sizes, draw
from mhc_core.cli.bench._check import Checked
from mhc_core.cli.bench._measure import Measured
from mhc_core.cli.bench._plot import Points
from mhc_core.cli.bench._rows import Row
from mhc_core.cli.bench._sides import Side
from mhc_core.cli.bench._timing import copy_speed
from mhc_core.selection import without_proofs

__all__ = ["Run", "dispatched", "measured"]

COPIES = 5  # turns of the copy


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a run."""

    mode: str
    sides: Sequence[Side]
    rows: Sequence[Row]
    sizes: Sequence[Sizes]
    repeats: int
    calls: int | None
    warmup: int
    check: bool
    notes: Sequence[str]


@without_proofs()  # a wrong backend may be measured too
def measured(run: Run) -> tuple[dict[str, Any], bool, Points]:
    """Measure; return the record, whether all of ours ran and were right, and what to draw."""
    here = [side for side in run.sides if side.remote is None]
    libraries = list(dict.fromkeys(side.library.name for side in here))
    made = _record.record(run.mode, libraries)
    _table.print_lines(_record.header(made))
    checks = _checks(run) if run.check else []
    copy = _copies(run)
    rows = _all_rows(run, copy)
    notes = [*run.notes, *_left_out(run)]
    _table.print_lines([*_legend(run, copy), *_failures(rows), *notes])
    traffic = {row.name: row.traffic for row in run.rows}
    measured = [(row, traffic[row.row](row.sizes)) for row in rows]
    title = f"mhc bench, {run.mode}: {made['machine']['processor']}"
    points = Points(title, measured, copy)
    made |= {
        "repeats": run.repeats,
        "copy_gb_per_s": {name: speed / 1e9 for name, speed in copy.items()},
        "check": [asdict(one) for one in checks],
        "rows": [row.as_dict() for row in rows],
        "notes": notes,
    }
    good = not any(row.wrong or (row.failed and row.ours) for row in rows)
    return made, good and all(one.passed for one in checks), points


def _all_rows(run: Run, copy: Mapping[str, float]) -> list[Measured]:
    plan = _measure.Plan(
        timer="latency" if run.mode == "latency" else "throughput",
        repeats=run.repeats,
        calls=run.calls,
        warmup=run.warmup,
        memory=run.mode == "train",
        copy=copy,
    )
    rows: list[Measured] = []
    for sizes in run.sizes:
        here: list[Measured] = []
        for row, _ in _table.track(run.rows, [f"{row.name}, {sizes}" for row in run.rows]):
            sides = [side for side in run.sides if not side.refuses(row, sizes)]
            here += _measure.measure(row, sides, sizes, plan)
        per = " per sublayer" if run.mode == "decode" else ""
        title = f"{run.mode}{per}: {sizes}, medians of {run.repeats} turns"
        _table.print_measured(title, here)
        rows += here
    return rows


def _copies(run: Run) -> dict[str, float]:
    """Measure the memory's own speed in every library that is used."""
    speeds: dict[str, float] = {}
    for side in run.sides:
        library = side.library
        if library.name not in speeds and side.remote is None:
            shape = (library.copied_bytes // 4,)
            numbers = draw("x", shape, "float32", numpy.random.default_rng())
            speeds[library.name] = copy_speed(library, side.from_host, numbers, COPIES)
    return speeds


# ---- checks -------------------------------------------------------------------------------------


def _checks(run: Run) -> list[Checked]:
    """Compare every backend with the oracle; sizes that differ only in B and T are checked once."""
    seed = secrets.randbits(31)
    sizes = {(s.n, s.C, s.dtype): s for s in run.sizes}.values()
    steps = list(itertools.product([side for side in run.sides if side.ours], sizes))
    found: list[Checked] = []
    names = [f"checking {side.name}, {here}" for side, here in steps]
    for (side, here), _ in _table.track(steps, names):
        found += _check.check(side, run.rows, here, seed)
    wrong = [one for one in found if not one.passed]
    lines = [
        f"WRONG: {one.backend} {one.op} {one.dtype}, {one.what}: "
        f"error {one.error:.1e}, allowed {one.tolerance:.1e}"
        for one in wrong
    ]
    summary = f"check: {len(found)} arrays compared with the float64 oracle, {len(wrong)} wrong"
    _table.print_lines([*lines, f"{summary} (seed {seed})"])
    return found


# ---- words --------------------------------------------------------------------------------------


def _legend(run: Run, copy: Mapping[str, float]) -> Iterator[str]:
    for name, speed in copy.items():
        yield f"copy ({name}): {speed / 1e9:.1f} GB/s, read and written"
    yield (
        "GB/s: of what must be moved, every input and output once; caches that hold them can "
        "bring it above a copy's"
    )
    yield "time / ours: of a backend that is run the same way; above 1, the backend is faster"
    if run.mode == "train":
        yield "extra MB: the most memory beyond the inputs; outputs and gradients are in it"


def _failures(rows: Sequence[Measured]) -> Iterator[str]:
    for row in rows:
        if row.failed:
            yield f"{row.row} ({row.way}), {row.sizes}: {row.side}: {row.failed}"


def _left_out(run: Run) -> Iterator[str]:
    """Yield a line for everything that a backend was not measured on, with the reason."""
    for side in (side for side in run.sides if side.ours):
        reasons: dict[str, dict[str, None]] = {}
        for row, sizes in itertools.product(run.rows, run.sizes):
            reason = side.refuses(row, sizes)
            if reason is None and row.passes == "step" and side.library.pull is None:
                reason = f"{side.library.name} has no autodiff"
            if reason:
                reasons.setdefault(reason, {})[row.name] = None
        for reason, names in reasons.items():
            yield f"{side.name}: without {', '.join(names)}: {reason}"


# ---- dispatch -----------------------------------------------------------------------------------


@without_proofs()  # a wrong backend may be measured too
def dispatched(names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure the cost of a call without its array work; return the record."""
    made = _record.record("dispatch", [])
    _table.print_lines(_record.header(made))
    steps = _table.track(names, names)
    rows = [row for name, _ in steps for row in _dispatch.dispatch(name, repeats)]
    _table.print_dispatched(rows)
    return made | {"repeats": repeats, "rows": [asdict(row) for row in rows]}
