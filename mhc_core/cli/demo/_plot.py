"""``--plot``: the report's main figures as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from mhc_core.cli.demo._results import smooth

__all__ = ["missing", "plot"]

COLOURS = {"residual": "0.5", "HC": "C3", "mHC": "C0", "single-pass": "C2"}


def missing() -> str | None:
    """Return what a picture lacks here, or None."""
    there = find_spec("matplotlib")
    return None if there else "--plot needs matplotlib: pip install matplotlib"


def plot(file: Path, told: Mapping[str, Any]) -> bytes:
    """Draw loss, gradient norm, the gains and Sinkhorn's error."""
    figures: Any = import_module("matplotlib.figure")  # no pyplot: it would look for a screen
    figure = figures.Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).flat
    lines = (
        ("loss, nats a byte", "step", "loss", "linear"),
        ("norm of the gradient", "step", "norm", "log"),
        ("gain over the whole depth while training", "step", "looked_forward", "log"),
        ("gain of the signal, first layer to here", "layer", "gain_forward", "log"),
        ("gain of the gradient, last layer to here", "layer", "gain_backward", "log"),
    )
    for (title, across, key, scale), axes in zip(lines, panels, strict=False):
        for name, one in told["variants"].items():
            x = one["looked"] if key == "looked_forward" else range(1, len(one[key]) + 1)
            y = smooth(one[key]) if key == "loss" else one[key]
            axes.plot(x, _gaps(y), color=COLOURS[name], label=name)
        axes.set(title=title, xlabel=across, yscale=scale)
    axes = figure.axes[-1]
    for name, one in told["variants"].items():
        if one["sinkhorn"]:
            worst = [max(pair) for pair in zip(*one["sinkhorn"].values(), strict=True)]
            axes.plot(range(1, len(worst) + 1), worst, color=COLOURS[name], label=name)
    axes.set(title="error of H_res after t iterations", xlabel="t", yscale="log")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=130, format=file.suffix.lower().removeprefix("."))
    return drawn.getvalue()


def _gaps(numbers: list[float | None]) -> list[float]:
    return [float("nan") if number is None else number for number in numbers]
