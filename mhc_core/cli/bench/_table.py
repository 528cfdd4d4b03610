"""The tables on the screen, and the progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from mhc_core.cli import _screen
from mhc_core.cli.bench._dispatch import Dispatched
from mhc_core.cli.bench._measure import Measured

__all__ = ["print_dispatched", "print_lines", "print_measured", "track"]

Step = TypeVar("Step")

WIDTH = 132  # columns where the output is no terminal
BAR = 10  # cells of a bar of 100 %


def track(steps: Sequence[Step], names: Sequence[str]) -> Iterator[tuple[Step, str]]:
    """Yield each step with its name, and show on stderr how far the run is."""
    with _screen.progress(44, transient=True) as bars:
        bar = bars.add_task("", total=len(steps))
        for step, name in zip(steps, names, strict=True):
            bars.update(bar, description=name)
            yield step, name
            bars.advance(bar)


def print_lines(lines: Iterable[str]) -> None:
    """Print text unchanged."""
    for line in lines:
        _screen.say(line)


def print_measured(title: str, rows: Sequence[Measured]) -> None:
    """Print the rows at one size, a block for each; columns without any values are left out."""
    from rich.table import Table

    table = Table(title=_screen.text(title), title_justify="left")
    memory = any(row.extra_bytes is not None for row in rows)
    for heading in ("row", "who", "how"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "GB/s", "% of copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=BAR)
    for heading in ("time/ours", "apart", *(["extra MB"] if memory else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    before = ""
    for row in rows:
        if before and row.row != before:
            table.add_section()
        table.add_row(*_cells(row, row.row != before, memory))
        before = row.row
    _screen.console(WIDTH).print(table)


def _cells(row: Measured, first: bool, memory: bool) -> list[Any]:
    who = row.side if row.ours else f"vs {row.side}"
    names = [_screen.text(word) for word in (row.row if first else "", who, row.way)]
    if row.failed:
        return [*names, _screen.text("wrong" if row.wrong else "failed", "red")]
    numbers = [_number(row.ms), _number(row.gb_per_s), _number(row.percent_of_copy)]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.0f}"
    end = [_bar(row.percent_of_copy), ratio, f"{row.apart:.0e}"]
    return [*names, *numbers, *end, *([extra] if memory else [])]


def _number(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _bar(percent: float) -> Any:
    from rich.bar import Bar

    share = 0.0 if math.isnan(percent) else min(percent, 100.0)
    return Bar(size=100, begin=0, end=share, width=BAR)


def print_dispatched(rows: Sequence[Dispatched]) -> None:
    """Print the cost of dispatch."""
    from rich.table import Table

    title = "nanoseconds of a small call, without array work"
    table = Table(title=_screen.text(title), title_justify="left")
    for heading in ("op", "backend"):
        table.add_column(heading)
    for heading in ("arrays", "selection", "validation", "whole call"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (row.selection_ns, row.validation_ns, row.call_ns)
        table.add_row(
            row.op, _screen.text(row.backend), str(row.arrays), *(f"{t:.0f}" for t in times)
        )
    _screen.console(WIDTH).print(table)
