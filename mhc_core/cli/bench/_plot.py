"""``--plot``: how close every row comes to the memory's own speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mhc_core.cli.bench._measure import Measured

__all__ = ["missing", "plot"]

BESIDE: Mapping[str, Any] = {"xytext": (3, 3), "textcoords": "offset points"}


def missing() -> str | None:
    """Say what a plot lacks here, or None."""
    there = find_spec("matplotlib")
    return None if there else "--plot needs matplotlib: pip install 'mhc-core[plot]'"


def plot(file: Path, rows: Sequence[tuple[Measured, int]], copy: Mapping[str, float]) -> None:
    """Draw the GB/s achieved over the bytes that a call must move, under the copy's line."""
    figures: Any = import_module("matplotlib.figure")  # no pyplot: it would look for a screen
    figure = figures.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    _draw_copies(axes, copy)
    timed = [(row, traffic) for row, traffic in rows if not row.failed]
    sides = list(dict.fromkeys((row.ours, row.side) for row, _ in timed))
    for k, side in enumerate(sides):
        mine = [(row, traffic / 1e6) for row, traffic in timed if (row.ours, row.side) == side]
        _draw_side(axes, k, mine, named=k == 0)
    axes.set(xscale="log", yscale="log", ylabel="GB/s achieved")
    axes.set_xlabel("MB that a call must move: every input once, every output once")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=150)


def _draw_side(axes: Any, k: int, mine: Sequence[tuple[Measured, float]], named: bool) -> None:
    """Draw a side's points, filled for ours; the first side's say which row they are."""
    first = mine[0][0]
    x, y = [megabytes for _, megabytes in mine], [row.gb_per_s for row, _ in mine]
    label = first.side if first.ours else f"vs {first.side}"
    colour = f"C{k % 10}"
    inside = colour if first.ours else "none"
    marker = "osD^vP*X"[k % 8]
    axes.scatter(x, y, marker=marker, edgecolors=colour, facecolors=inside, label=label)
    for row, megabytes in mine if named else ():
        axes.annotate(row.row, (megabytes, row.gb_per_s), fontsize=6, **BESIDE)


def _draw_copies(axes: Any, copy: Mapping[str, float]) -> None:
    for name, speed in copy.items():
        axes.axhline(speed / 1e9, linestyle="--", color="black", linewidth=1)
        label = f"copy, measured in this run ({name}): {speed / 1e9:.0f} GB/s"
        where = (0.01, speed / 1e9)
        axes.annotate(label, where, xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
