"""The plan on the screen, a column a layout, and as a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mhc_core.cli import _screen
from mhc_core.planning import Model, Plan, Quantity, total

__all__ = ["Shown", "Speeds", "amount", "show"]

UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


class Speeds(NamedTuple):
    """GB/s of a device's memory and of its link, or None."""

    memory: float | None
    link: float | None


@dataclass(frozen=True)
class Shown:
    """A model, a step, its plans, a layout each, and why there is none for the other layouts."""

    name: str
    model: Model
    tokens: int
    devices: int
    dtype: str
    plans: Sequence[Plan]
    refused: Sequence[str]
    speeds: Speeds

    def seconds(self, plan: Plan) -> dict[str, float]:
        """Return the seconds that traffic and communication take, where speeds are known."""
        times = {"traffic": (plan.moved, self.speeds.memory)}
        times["communication"] = (plan.sent, self.speeds.link)
        return {name: size / speed / 1e9 for name, (size, speed) in times.items() if speed}

    def record(self) -> dict[str, Any]:
        """Return all numbers, in bytes and seconds."""
        model = self.model
        return {
            "model": self.name,
            "layers": model.layers,
            "C": model.channels,
            "n": model.n,
            "m": model.columns,
            "single_pass": model.single_pass,
            "tokens": self.tokens,
            "devices": self.devices,
            "dtype": self.dtype,
            "bandwidth_gb_per_s": self.speeds.memory,
            "link_gb_per_s": self.speeds.link,
            "layouts": {plan.layout: self._record(plan) for plan in self.plans},
            "left_out": list(self.refused),
        }

    def _record(self, plan: Plan) -> dict[str, Any]:
        def listed(quantities: Sequence[Quantity]) -> list[dict[str, Any]]:
            return [one._asdict() for one in quantities]

        return {
            "T": plan.tokens,
            "L": plan.sublayers,
            "C": plan.channels,
            "parameters": listed(plan.parameters),
            "kept": listed(plan.kept),
            "recompute": {
                "segment": plan.segment,
                "optimum": plan.optimum,
                "auto": _auto(self.model, plan),
                "kept": listed(plan.recomputed),
            },
            "traffic": listed(plan.traffic),
            "communication": [asdict(one) for one in plan.communication],
            "seconds": self.seconds(plan),
        }


def _auto(model: Model, plan: Plan) -> int:
    """Return the segment that a ``HyperConnectedStack(recompute="auto")`` takes."""
    from mhc_backends.nn_common import segment

    return segment("auto", model.n, plan.sublayers)


def amount(size: float) -> str:
    """Return bytes in the largest unit that leaves at least 1, to three digits."""
    k = 0
    while size >= 999.5 and k < len(UNITS) - 1:
        size, k = size / 1000, k + 1
    return f"{size:.3g} {UNITS[k]}"


def show(shown: Shown) -> None:
    """Print the table, the formulas and what their letters mean."""
    from rich.table import Table

    model = shown.model
    title = (
        f"{shown.name}: {model.layers} layers, n={model.n}, C={model.channels}, "
        f"m={model.columns}; {shown.tokens} tokens in {shown.dtype} on {shown.devices} devices; "
        "each device, a training step"
    )
    table = Table(title=_screen.text(title), title_justify="left")
    table.add_column("bytes", overflow="fold")
    for plan in shown.plans:
        table.add_column(plan.layout, justify="right", no_wrap=True)
    for section in _sections(shown):
        for cells in section:
            table.add_row(*map(_screen.text, cells))
        table.add_section()
    _screen.console().print(table)
    for line in (*shown.refused, *_formulas(shown)):
        _screen.say(line)


def _sections(shown: Shown) -> Iterator[list[tuple[str, ...]]]:
    plans = shown.plans
    yield [
        ("T, tokens", *(f"{plan.tokens}" for plan in plans)),
        ("L, sublayers", *(f"{plan.sublayers}" for plan in plans)),
        ("C, channels", *(f"{plan.channels}" for plan in plans)),
    ]
    yield _rows([plan.parameters for plan in plans])
    kept = [plan.kept for plan in plans]
    yield [*_rows(kept), ("kept without recomputation", *map(amount, map(total, kept)))]
    recomputed = [plan.recomputed for plan in plans]
    yield [
        ("R, sublayers of a segment", *(f"{plan.segment}" for plan in plans)),
        ("  the optimum", *(f"{plan.optimum}" for plan in plans)),
        ("  HyperConnectedStack's auto", *(f"{_auto(shown.model, plan)}" for plan in plans)),
        *_rows(recomputed),
        ("kept with recomputation", *map(amount, map(total, recomputed))),
    ]
    traffic = [plan.traffic for plan in plans]
    yield [*_rows(traffic), ("memory traffic", *(amount(plan.moved) for plan in plans))]
    yield [*_transfers(plans), ("sent to others", *(amount(plan.sent) for plan in plans))]
    times = [shown.seconds(plan) for plan in plans]
    yield [
        (f"seconds of {what}, at {speed:.4g} GB/s", *(f"{one[what]:.3g}" for one in times))
        for what, speed in zip(("traffic", "communication"), shown.speeds, strict=True)
        if speed
    ]


def _rows(columns: Sequence[Sequence[Quantity]]) -> list[tuple[str, ...]]:
    return [
        (f"  {cells[0].name}", *(amount(cell.size) for cell in cells))
        for cells in zip(*columns, strict=True)
    ]


def _transfers(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(one.name for plan in plans for one in plan.communication)
    rows: list[tuple[str, ...]] = []
    for name in names:
        found = [[one for one in plan.communication if one.name == name] for plan in plans]
        cells = (amount(some[0].sent) if some else "-" for some in found)
        rows.append((f"  {name}", *cells))
    return rows


def _formulas(shown: Shown) -> Iterator[str]:
    yield "formulas: s is the bytes of a number of the streams, D the devices"
    several = len(shown.plans) > 1
    first = shown.plans[0]
    for quantities in (first.parameters, first.kept, first.recomputed, first.traffic):
        for one in quantities:
            yield f"  {one.name} = {one.formula}"
    said: set[str] = set()
    for plan in shown.plans:
        for one in plan.communication:
            line = f"  {one.name} = {one.formula}"
            if line not in said:
                said.add(line)
                yield f"{line}  ({one.count} x {one.kind} of {amount(one.size)})"
    yield (
        "The layers themselves and an optimizer's state are not counted. Recomputation runs the "
        "forward again, with its traffic and communication."
    )
    if several:
        yield "Where devices differ, the fullest is shown."
