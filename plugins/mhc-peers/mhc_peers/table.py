"""The field's table: who agrees with the oracle, forwards and gradients, and why not."""

from __future__ import annotations

import datetime
import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mhc_conformance.report import page
from mhc_core import machine
from mhc_core.math import OPS
from mhc_peers.run import Ran, Verdict

__all__ = ["SUFFIXES", "Table"]

FORMAT = 1  # of the JSON; goes up when a reader of the old one would misread it
DTYPES = ("float32", "bfloat16")
QUANTITIES = ("forward", "gradient")
MARKS = {"holds": "good", "off": "bad", "cannot": "none", "not run": "none"}


@dataclass(frozen=True)
class Table:
    """One run: every peer's verdicts, with what it ran with."""

    command: str
    seed: int
    seconds: float
    ran: Sequence[Ran]
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
    )

    @property
    def verdicts(self) -> list[Verdict]:
        """Return every verdict."""
        return [one for ran in self.ran for one in ran.verdicts]

    @property
    def compared(self) -> list[str]:
        """Return the projects of which something was compared, each once."""
        told = [one for one in self.verdicts if one.outcome in ("holds", "off")]
        return list(dict.fromkeys(one.project for one in told))

    @property
    def with_gradients(self) -> list[str]:
        """Return the projects of which a gradient was compared."""
        told = [one for one in self.verdicts if one.outcome in ("holds", "off")]
        return list(dict.fromkeys(v.project for v in told if v.quantity == "gradient"))

    @property
    def summary(self) -> str:
        """Return the counts in a sentence."""
        counts = {mark: sum(v.outcome == mark for v in self.verdicts) for mark in MARKS}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "cannot")
        return (
            f"{len(self.compared)} projects, {len(self.with_gradients)} with gradients: {told} "
            f"(seed {self.seed}, {self.seconds:.0f} s)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the whole run as a dict for JSON."""
        return {
            "format": FORMAT,
            "command": self.command,
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "machine": machine.machine(),
            "projects": self.compared,
            "with_gradients": self.with_gradients,
            "peers": [
                {
                    "name": ran.peer.name,
                    "project": ran.peer.project,
                    "where": ran.peer.where,
                    "device": ran.device,
                    "versions": dict(ran.versions),
                    "not_run": ran.reason,
                }
                for ran in self.ran
            ],
            "verdicts": [one.as_dict() for one in self.verdicts if not _lacking(one)],
            "lacking": {
                ran.peer.name: list(dict.fromkeys(v.op for v in ran.verdicts if _lacking(v)))
                for ran in self.ran
            },
        }

    def spelled(self, suffix: str) -> str:
        """Return the table in the format of a file's suffix."""
        return SUFFIXES[suffix.lower()](self)

    def lines(self) -> list[tuple[str, str]]:
        """Return the table for a screen: lines of text, each with its mark."""
        found: list[tuple[str, str]] = []
        for ran in self.ran:
            about = ", ".join(f"{name} {number}" for name, number in ran.versions.items())
            found.append((f"{ran.peer.name} ({about or 'not run'})", "title"))
            if ran.reason:
                found.append((f"  not run: {ran.reason}", "none"))
                continue
            for op, dtype in _pairs(ran.verdicts):
                ones = [v for v in ran.verdicts if (v.op, v.dtype) == (op, dtype)]
                cells = " | ".join(_cell(one) for one in ones)
                bad = any(one.outcome == "off" for one in ones)
                found.append((f"  {op:<16} {dtype:<9} {cells}", "bad" if bad else "good"))
                found += [
                    (f"      {one.quantity}: {_why(one)}", "bad") for one in ones if _why(one)
                ]
        return found


def _lacking(one: Verdict) -> bool:
    """Return whether a peer has nothing of the kind: the table names such ops in one line."""
    return one.outcome == "cannot" and one.why == "it has no such op"


def _pairs(verdicts: Iterable[Verdict]) -> list[tuple[str, str]]:
    told = {(v.op, v.dtype) for v in verdicts if v.outcome != "cannot"}
    return [(op, dtype) for op in OPS for dtype in DTYPES if (op, dtype) in told]


def _cell(one: Verdict) -> str:
    if one.error is None:
        return one.outcome
    return f"{one.outcome:<5} {one.error:.0e}"


def _why(one: Verdict) -> str:
    if one.outcome == "not run":
        return one.why
    if one.outcome != "off":
        return ""
    times = f"{one.times:.3g} times what is allowed, " if one.times else ""
    return f"{times}smallest case: {one.where}. {one.why}"


# --- formats ----------------------------------------------------------------------------------


def as_json(table: Table) -> str:
    """Return the table as JSON."""
    return json.dumps(table.as_dict(), indent=1) + "\n"


def as_html(table: Table) -> str:
    """Return the table as a page: implementations by ops, then every disagreement explained."""
    ops = [op for op in OPS if any(v.op == op and v.outcome != "cannot" for v in table.verdicts)]
    heads = ("implementation", *ops)
    rows: list[list[str]] = []
    for ran in table.ran:
        for dtype in DTYPES:
            ones = [v for v in ran.verdicts if v.dtype == dtype]
            if any(v.outcome != "cannot" for v in ones):
                name = f"{_text(ran.peer.name)}<br><small>{dtype}</small>"
                rows.append([name, *(_marks(v for v in ones if v.op == op) for op in ops)])
    parts = [f"<h1>{_text(table.summary)}</h1>"]
    parts.append(
        "<p>Largest relative error, forward | gradient, against the float64 oracle of mhc-core. "
        "- is an op, a dtype or a gradient that an implementation does not have.</p>"
    )
    parts.append(_table(heads, rows))
    broken = {ran.peer.name for ran in table.ran if ran.reason}
    off = [
        one
        for one in table.verdicts
        if one.outcome == "off" or (one.outcome == "not run" and one.peer not in broken)
    ]
    if off:
        heads = ("implementation", "what", "times allowed", "smallest case that fails", "why")
        parts.append("<h2>Disagreements</h2>" + _table(heads, map(_disagreement, off)))
    reasons = [(ran.peer.name, ran.reason) for ran in table.ran if ran.reason]
    reasons += [
        (one.peer, f"{one.op} {one.dtype} {one.quantity}: {one.why}")
        for one in table.verdicts
        if one.outcome == "cannot" and not _lacking(one) and not one.why.startswith("it takes")
    ]
    if reasons:
        rows = [[_text(cell) for cell in pair] for pair in dict.fromkeys(reasons)]
        parts.append("<h2>Not run, or not comparable</h2>" + _table(("", "because"), rows))
    parts.append("<h2>Versions</h2>" + _table(("", "where", "versions"), map(_about, table.ran)))
    facts = {"command": table.command, "date": table.date, **machine.machine()}
    rows = [[_text(name), _text(what)] for name, what in facts.items()]
    parts.append("<h2>Where</h2>" + _table(("", ""), rows))
    return page("The field's implementations of mHC", "\n".join(parts))


def _disagreement(one: Verdict) -> list[str]:
    what = f"{one.op} {one.dtype} {one.quantity}"
    times = f"{one.times:.3g}" if one.times else ""
    return [_text(cell) for cell in (one.peer, what, times, one.where, one.why)]


def _about(ran: Ran) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in ran.versions.items())
    device = f" on {ran.device}" if ran.device else ""
    return [_text(cell) for cell in (ran.peer.name, ran.peer.where, versions + device)]


def _marks(verdicts: Iterable[Verdict]) -> str:
    by_quantity = {one.quantity: one for one in verdicts}
    cells = [_mark(by_quantity.get(quantity)) for quantity in QUANTITIES]
    return "" if all(cell == "-" for cell in cells) else " | ".join(cells)


def _mark(one: Verdict | None) -> str:
    if one is None or (one.outcome == "cannot"):
        return "-"
    text = one.outcome if one.error is None else f"{one.error:.0e}"
    return f'<span class="{MARKS[one.outcome]}" title="{_text(one.why)}">{_text(text)}</span>'


def _text(text: Any) -> str:
    return html.escape(str(text))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of cells; a narrow screen shows each row as a list of its own."""
    labels = [_text(text) for text in heads]
    head = "".join(f"<th>{label}</th>" for label in labels)
    body = "".join(
        f"<tr><th>{row[0]}</th>"
        + "".join(
            f'<td data-head="{label}">{cell}</td>'
            for label, cell in zip(labels[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


SUFFIXES: dict[str, Callable[[Table], str]] = {".json": as_json, ".html": as_html}
"""The formats of a table, by the suffix of its file."""
