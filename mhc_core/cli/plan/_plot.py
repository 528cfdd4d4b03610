"""``--plot``: what a device keeps, over the size of a segment of recomputation."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from mhc_core.cli.plan._table import Shown, amount
from mhc_core.planning import Plan, total
from mhc_core.text import one_line

__all__ = ["missing", "plot"]


def missing() -> str | None:
    """Return what a plot lacks here, or None."""
    there = find_spec("matplotlib")
    return None if there else "--plot needs matplotlib: pip install matplotlib"


def plot(file: Path, shown: Shown, planned: Callable[[Plan, int], Plan]) -> bytes:
    """Draw a line a layout, its optimum marked, and beside it what each device sends."""
    figures: Any = import_module("matplotlib.figure")  # no pyplot: it would look for a screen
    figure = figures.Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    curves: dict[tuple[int, ...], list[Plan]] = {}
    for plan in shown.plans:
        sizes = range(1, plan.sublayers + 1)
        line = tuple(total(planned(plan, size).recomputed) for size in sizes)
        curves.setdefault(line, []).append(plan)
    for k, (line, plans) in enumerate(curves.items()):
        best, names = plans[0].optimum, ", ".join(plan.layout for plan in plans)
        sizes = range(1, len(line) + 1)
        label = f"{names}: least {amount(line[best - 1])} at R = {best}"
        left.plot(sizes, [size / 1e9 for size in line], color=f"C{k}", label=label)
        left.plot([best], [line[best - 1] / 1e9], "o", color=f"C{k}")
        without = total(plans[0].kept) / 1e9
        left.axhline(without, color=f"C{k}", linestyle=":", linewidth=1)
    left.set(xlabel="R, sublayers of a segment", ylabel="GB kept", xscale="log", yscale="log")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(_tick)
        axis.set_minor_formatter(_tick)
    left.set_title("kept with recomputation; dotted: without")
    names = [plan.layout for plan in shown.plans]
    right.bar(names, [plan.sent / 1e9 for plan in shown.plans], color="C7")
    right.set(ylabel="GB", title="sent by a device in a step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    title = f"{shown.name}: {shown.tokens} tokens, {shown.dtype}, {shown.devices} devices"
    figure.suptitle(one_line(title).replace("$", r"\$"))
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format=file.suffix.lower().removeprefix("."))
    return drawn.getvalue()


def _tick(value: float, _: int | None) -> str:
    """Return 2 and 20 rather than powers of ten; a logarithmic axis has marks at 2 and 5 too."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""
