"""One run of the kit as a document: JSON for machines, JUnit for CI, HTML for people.

All three say the same: every check and its outcome, every check left out and why, and what is
needed to see it again: the command, the seed, the machine, its device and the versions.
"""

from __future__ import annotations

import datetime
import html
import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mhc_core
from mhc_conformance.cases import numpy_dtype
from mhc_conformance.checks import Record, Skip
from mhc_conformance.subject import Subject
from mhc_core._registry import ENTRY_POINTS
from mhc_core.cli import _machine

__all__ = ["NUMERIC", "SUFFIXES", "Report", "reasons", "worst"]

NUMERIC = {"forward": "forward", "gradient": "gradient", "grad": "gradient"}
"""The checks whose errors the matrix shows, and in which of its two columns."""

SETTINGS = (
    "MHC_BACKEND",
    "MHC_DISABLE_PLUGINS",
    "MHC_MLX_DISABLE_METAL",
    "MHC_METAL_TUNING",
    "MLX_ENABLE_TF32",
)
FORMAT = 1  # of the JSON; goes up when a reader of the old one would misread it


# --- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What was run, where, and what came of it."""

    command: str
    seed: int
    seconds: float
    backends: Sequence[str]
    records: Sequence[Record]
    skips: Sequence[Skip]
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
    )

    @property
    def summary(self) -> dict[str, int]:
        """How many checks passed, failed and were left out."""
        passed = sum(record.passed for record in self.records)
        failed = len(self.records) - passed
        return {"passed": passed, "failed": failed, "skipped": len(self.skips)}

    def as_dict(self) -> dict[str, Any]:
        """Give all of it for JSON."""
        return {
            "format": FORMAT,
            "command": self.command,
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "machine": _machine.machine(),
            "devices": devices(self.backends),
            "versions": versions(),
            "settings": _settings(),
            "not_here": _not_here(),
            "summary": self.summary,
            "records": [_safe(record.as_dict()) for record in self.records],
            "skipped": [asdict(skip) for skip in self.skips],
        }

    def write(self, path: Path) -> None:
        """Write it in the format that the file's suffix asks for."""
        path.write_text(SUFFIXES[path.suffix.lower()](self), encoding="utf-8")


def _safe(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "detail": _machine.safe(record["detail"])}


def worst(records: Iterable[Record]) -> Record | None:
    """Give the record with the largest error; one that failed goes before all that passed."""
    return max(records, key=lambda r: (not r.passed, r.error), default=None)


def reasons(skips: Iterable[Skip]) -> Mapping[tuple[str, str, str], int]:
    """Count the checks that were left out, by backend, check and reason."""
    return Counter((skip.backend, skip.kind, skip.reason) for skip in skips)


# --- where ------------------------------------------------------------------------------------


def devices(backends: Sequence[str]) -> dict[str, str]:
    """Name the device of every backend's array library, as far as the library tells."""
    return {name: _device(name) for name in backends}


def _device(backend: str) -> str:
    try:
        subject = Subject(backend)
        library = subject.spec.array_types[0].partition(".")[0]
        found = _machine.devices((library,))
        return found.get(library) or _device_of_array(subject)
    except Exception as error:  # a report is not lost for want of a name
        return _machine.safe(f"unknown ({type(error).__name__}: {error})")


def _device_of_array(subject: Subject) -> str:
    import numpy as np

    (array,) = subject.take([np.zeros(1, numpy_dtype(subject.spec.dtypes[0]))])
    return str(getattr(array, "device", "unknown"))


def versions() -> dict[str, str]:
    """Give the versions of Python, of what matters here, and of every plugin."""
    found = {"python": platform.python_version(), **_machine.versions()}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        if point.dist is not None:
            found[point.dist.name] = point.dist.version
    return found


def _settings() -> dict[str, str]:
    return {name: _machine.safe(os.environ[name]) for name in SETTINGS if name in os.environ}


def _not_here() -> dict[str, str]:
    """Say which known backends cannot run here, and why."""
    known = mhc_core.backends().items()
    return {name: _machine.safe(one.reason) for name, one in known if one.reason is not None}


# --- formats ----------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """Give the whole run for machines: what to send in, and to compare with another's."""
    return json.dumps(report.as_dict(), indent=1) + "\n"


def as_junit(report: Report) -> str:
    """Give a test case per check, as CI systems read them."""
    whole = report.as_dict()
    root = ElementTree.Element("testsuites", name=whole["command"])
    for name in report.backends:
        _suite(root, name, report, whole)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(root: Any, name: str, report: Report, whole: Mapping[str, Any]) -> None:
    records = [record for record in report.records if record.backend == name]
    skips = [skip for skip in report.skips if skip.backend == name]
    counts = {
        "tests": str(len(records) + len(skips)),
        "failures": str(sum(not record.passed for record in records)),
        "skipped": str(len(skips)),
    }
    named = {"name": name, "timestamp": report.date, **counts}
    suite = ElementTree.SubElement(root, "testsuite", named)
    about = ElementTree.SubElement(suite, "properties")
    for key, value in _facts(whole):
        ElementTree.SubElement(about, "property", name=_plain(key), value=_plain(value))
    for record in records:
        case = _case(suite, record)
        if not record.passed:
            what = f"off by {record.error:.3g}, allowed {record.tolerance:.3g}"
            failure = ElementTree.SubElement(case, "failure", message=what)
            failure.text = _plain(_machine.safe(record.detail))
    for skip in skips:
        ElementTree.SubElement(_case(suite, skip), "skipped", message=_plain(skip.reason))


def _case(suite: Any, one: Record | Skip) -> Any:
    named = {"classname": _plain(f"{one.backend}.{one.op}"), "name": f"{one.kind}[{one.dtype}]"}
    return ElementTree.SubElement(suite, "testcase", named)


def _plain(text: str) -> str:
    """Leave out the control characters that no XML may have; a backend may raise any text."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _facts(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give all that describes a run, line by line."""
    facts = [(key, str(whole[key])) for key in ("command", "date", "seconds", "seed")]
    for group in ("machine", "devices", "versions", "settings", "not_here"):
        title = {"devices": "device of ", "not_here": "not here: "}.get(group, "")
        facts += [(f"{title}{key}", str(value)) for key, value in whole[group].items()]
    return facts


def as_html(report: Report) -> str:
    """Give a page that stands by itself, in the reader's colours, on any screen."""
    whole = report.as_dict()
    counts = report.summary
    title = f"{', '.join(report.backends)}: " + ", ".join(f"{v} {k}" for k, v in counts.items())
    parts = [f'<h1 class="{"bad" if counts["failed"] else "good"}">{_escaped(title)}</h1>']
    failed = [record for record in report.records if not record.passed]
    if failed:
        parts.append("<h2>Failed</h2>" + "".join(map(_failure, failed)))
    parts += [_matrix(name, report.records) for name in report.backends]
    parts.append(_chain(report.records))
    parts.append(_skipped(report.skips))
    parts.append("<h2>Where</h2>" + _table(("", ""), [_row(pair) for pair in _facts(whole)]))
    return _PAGE.format(title=_escaped(title), style=_STYLE, body="\n".join(filter(None, parts)))


def _escaped(text: Any) -> str:
    return html.escape(_plain(str(text)))


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in cells) + "</tr>"


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    head = "".join(f"<th>{_escaped(text)}</th>" for text in heads)
    head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return f'<div class="wide"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _failure(record: Record) -> str:
    what, _, again = _machine.safe(record.detail).partition(" Again: ")
    command = f"<pre>{_escaped(again)}</pre>" if again else ""
    return f'<div class="failure"><p>{_escaped(what)}</p>{command}</div>'


def _matrix(name: str, records: Sequence[Record]) -> str:
    mine = [record for record in records if record.backend == name and record.op != "chain"]
    dtypes = list(dict.fromkeys(record.dtype for record in mine))
    rows: list[str] = []
    for op in sorted({record.op for record in mine}):
        of_op = [record for record in mine if record.op == op]
        cells = [_errors([r for r in of_op if r.dtype == dtype]) for dtype in dtypes]
        rows.append(f"<tr><th>{_escaped(op)}</th>{''.join(cells)}{_others(of_op)}</tr>")
    what = "worst error, forward | gradient, against the float64 oracle"
    heading = f"<h2>{_escaped(name)}</h2><p>{what}</p>"
    return heading + _table(("op", *dtypes, "other checks"), rows) if rows else ""


def _errors(records: Sequence[Record]) -> str:
    shown: list[str] = []
    for column in ("forward", "gradient"):
        one = worst(r for r in records if NUMERIC.get(r.kind) == column)
        text = f"{one.error:.0e}" if one else "-"
        shown.append(f'<span class="{_outcome(one)}">{text}</span>')
    return f"<td>{' | '.join(shown)}</td>"


def _outcome(record: Record | None) -> str:
    return "none" if record is None else "good" if record.passed else "bad"


def _others(records: Sequence[Record]) -> str:
    cells = [
        f'<span class="{_outcome(record)}">{_escaped(record.kind)}</span>'
        for record in records
        if record.kind not in NUMERIC
    ]
    return f"<td>{' '.join(cells)}</td>"


def _chain(records: Sequence[Record]) -> str:
    rows = [
        f"<tr><th>{_escaped(r.backend)}</th><td>{_escaped(r.kind)}</td>"
        f'<td class="{_outcome(r)}">{r.error:.0e}</td><td>{r.tolerance:.0e}</td></tr>'
        for r in records
        if r.op == "chain"
    ]
    heads = ("backend", "", "distance", "allowed")
    return "<h2>A text model against NumPy in float64</h2>" + _table(heads, rows) if rows else ""


def _skipped(skips: Sequence[Skip]) -> str:
    rows = [
        _row((name, kind, str(count), reason))
        for (name, kind, reason), count in reasons(skips).items()
    ]
    heads = ("backend", "check", "skipped", "because")
    return "<h2>Skipped</h2>" + _table(heads, rows) if rows else ""


SUFFIXES = {".json": as_json, ".html": as_html, ".xml": as_junit, ".junit": as_junit}
"""The formats of a report, by the suffix of its file."""

_STYLE = """
:root { color-scheme: light dark; --good: #116329; --bad: #b3261e; --line: #8884; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --good: #7ee29a; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; } tbody th { font-weight: 600; white-space: nowrap; }
@media (max-width: 40rem) { th, td { padding: .2rem .3rem; } } /* a phone has the reasons too */
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 700; }
.failure { border-left: 4px solid var(--bad); padding-left: .8rem; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
