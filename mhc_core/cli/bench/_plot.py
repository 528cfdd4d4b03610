"""``--plot``: how close every row comes to the memory's own speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from mhc_core.cli.bench._measure import Measured
from mhc_core.text import one_line

__all__ = ["Points", "missing", "plot"]

MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Points:
    """The contents of a picture.

    Attributes
    ----------
    title
        The text above it.
    rows
        The measured rows, each with the bytes that a call must move.
    copy
        Bytes a second of a copy, by library.
    """

    title: str
    rows: Sequence[tuple[Measured, int]]
    copy: Mapping[str, float]


def missing() -> str | None:
    """Return what a plot lacks here, or None."""
    there = find_spec("matplotlib")
    return None if there else "--plot needs matplotlib: pip install matplotlib"


def plot(file: Path, points: Points) -> bytes:
    """Draw the GB/s achieved over the bytes that a call must move, under the copy's line.

    Each row's number is shown at its points and, with the row's name, beside the picture.
    """
    figures: Any = import_module("matplotlib.figure")  # no pyplot: it would look for a screen
    figure = figures.Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots()
    timed = [(row, traffic) for row, traffic in points.rows if not row.failed]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(row.row for row, _ in timed), 1)}
    _draw_copies(axes, points.copy)
    for k, side in enumerate(dict.fromkeys((row.ours, row.side) for row, _ in timed)):
        mine = [(row, traffic / 1e6) for row, traffic in timed if (row.ours, row.side) == side]
        _draw_side(axes, k, mine)
    _number_points(axes, timed, numbers)
    axes.set(xscale="log", yscale="log", ylabel="GB/s achieved", title=_words(points.title))
    axes.set_xlabel("MB that a call must move: every input once, every output once")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_tick)  # 0.1, 1, 10 rather than powers of ten
    axes.grid(alpha=0.3)
    axes.margins(x=0.15, y=0.15)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    listed = "\n".join(f"{k}  {name}" for name, k in numbers.items())
    axes.text(1.02, 0, listed, transform=axes.transAxes, fontsize=8, va="bottom", in_layout=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format=file.suffix.lower().removeprefix("."))
    return drawn.getvalue()


def _tick(value: float, _: int | None) -> str:
    return f"{value:g}"


def _words(value: str) -> str:
    """Return text that Matplotlib does not read as a formula."""
    return one_line(value).replace("$", r"\$")


def _speed(gb_per_s: float) -> str:
    """Return a speed with its significant digits: 1.6 and 1.4 must not both read 2."""
    return f"{gb_per_s:.0f}" if gb_per_s >= 100 else f"{gb_per_s:.3g}"


def _draw_side(axes: Any, k: int, mine: Sequence[tuple[Measured, float]]) -> None:
    """Draw a side's points, filled if they are ours."""
    first = mine[0][0]
    x, y = [megabytes for _, megabytes in mine], [row.gb_per_s for row, _ in mine]
    label = _words(first.side if first.ours else f"vs {first.side}")
    colour = f"C{k % 10}"
    inside = colour if first.ours else "none"
    marker = MARKERS[k % len(MARKERS)]
    drawn = axes.scatter(x, y, marker=marker, edgecolors=colour, facecolors=inside)
    drawn.set_label(label if not label.startswith("_") else f" {label}")  # _x would not be shown


def _number_points(
    axes: Any, timed: Sequence[tuple[Measured, int]], numbers: Mapping[str, int]
) -> None:
    """Number every point; of two rows that move the same bytes, one is numbered left, one right."""
    columns: dict[int, list[str]] = {}
    for row, traffic in timed:
        column = columns.setdefault(traffic, [])
        column += [row.row] if row.row not in column else []
        left = columns[traffic].index(row.row) % 2
        axes.annotate(
            str(numbers[row.row]),
            (traffic / 1e6, row.gb_per_s),
            xytext=(-4 if left else 4, 3),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=6,
        )


def _draw_copies(axes: Any, copy: Mapping[str, float]) -> None:
    for k, (name, speed) in enumerate(copy.items()):
        axes.axhline(speed / 1e9, linestyle="--", color="black", linewidth=1)
        label = f"copy, measured in this run ({_words(name)}): {_speed(speed / 1e9)} GB/s"
        where = (0.01 + 0.5 * (k % 2), speed / 1e9)  # two copies are often as fast
        axes.annotate(label, where, xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
