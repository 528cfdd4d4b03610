"""One run of the kit as a document: JSON for machines, JUnit for CI, HTML for people.

All three have the same content: every check and its outcome, every check left out and why, and
what a rerun needs: the command, the seed, the machine, its device and the versions.
"""

from __future__ import annotations

import datetime
import html
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple
from xml.etree import ElementTree

import mhc_core
from mhc_conformance.cases import numpy_dtype
from mhc_conformance.checks import CHECKS
from mhc_conformance.records import Record, Skip
from mhc_conformance.subject import Subject
from mhc_core import machine
from mhc_core.backend import DTYPES
from mhc_core.discovery import plugins
from mhc_core.math import OPS
from mhc_core.text import safe

__all__ = ["NUMERIC", "SUFFIXES", "LeftOut", "Report", "in_order", "left_out", "page", "worst"]

NUMERIC = {"forward": "forward", "gradient": "gradient", "grad": "gradient"}
"""The checks whose errors the matrix shows, each with its column, of two."""

SETTINGS = (
    "MHC_BACKEND",
    "MHC_DISABLE_PLUGINS",
    "MHC_MLX_DISABLE_METAL",
    "MHC_KERNEL_TUNING",
    "MLX_ENABLE_TF32",
)
FORMAT = 1  # of the JSON; goes up when a reader of the old one would misread it


# --- one run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The settings, machine and records of one run."""

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
        """Return how many checks passed, failed and were left out."""
        passed = sum(record.passed for record in self.records)
        failed = len(self.records) - passed
        return {"passed": passed, "failed": failed, "skipped": len(self.skips)}

    def as_dict(self) -> dict[str, Any]:
        """Return the whole run as a dict for JSON."""
        return {
            "format": FORMAT,
            "command": self.command,
            "date": self.date,
            "seconds": round(self.seconds, 1),
            "seed": self.seed,
            "machine": machine.machine(),
            "devices": devices(self.backends),
            "versions": versions(),
            "settings": _settings(),
            "not_here": _not_here(),
            "summary": self.summary,
            "records": [_safe(record.as_dict()) for record in self.records],
            "skipped": [asdict(skip) for skip in self.skips],
        }

    def spelled(self, suffix: str) -> str:
        """Return the report in the format that a file's suffix asks for."""
        return SUFFIXES[suffix.lower()](self)


def _safe(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "detail": safe(record["detail"])}


def worst(records: Iterable[Record]) -> Record | None:
    """Return the record with the largest error; any failed record comes before all that passed."""
    return max(records, key=lambda r: (not r.passed, r.error), default=None)


class LeftOut(NamedTuple):
    """The checks of one backend that were left out for one reason."""

    backend: str
    checks: str
    skipped: int
    reason: str


def left_out(skips: Iterable[Skip]) -> list[LeftOut]:
    """Group the checks that were left out: a backend with two ops has one line for all others."""
    groups: dict[tuple[str, str], list[Skip]] = {}
    for skip in skips:
        lacking = {
            f"{skip.backend} has no {skip.op}": "op",
            f"{skip.backend} has no {skip.dtype}": "dtype",
        }
        groups.setdefault((skip.backend, lacking.get(skip.reason, skip.reason)), []).append(skip)
    found: list[LeftOut] = []
    for (backend, reason), ones in groups.items():
        checks = ", ".join(dict.fromkeys(skip.kind for skip in ones))
        if reason in ("op", "dtype"):
            names = dict.fromkeys(getattr(skip, reason) for skip in ones)
            checks, reason = "all checks", f"{backend} has no {', '.join(names)}"
        found.append(LeftOut(backend, checks, len(ones), reason))
    return found


def in_order(records: Iterable[Record], backends: Sequence[str]) -> list[Record]:
    """Sort records by backend, op, dtype and check, whatever order they came in."""

    def place(record: Record) -> tuple[int, ...]:
        lists = (backends, (*OPS, "chain"), DTYPES, tuple(CHECKS))
        words = (record.backend, record.op, record.dtype, record.kind)
        return tuple(
            known.index(word) if word in known else len(known)
            for known, word in zip(lists, words, strict=True)
        )

    return sorted(records, key=place)


# --- where ------------------------------------------------------------------------------------


def devices(backends: Sequence[str]) -> dict[str, str]:
    """Return the device of every backend's array library, as far as the library names it."""
    return {name: _device(name) for name in backends}


def _device(backend: str) -> str:
    try:
        subject = Subject(backend)
        library = subject.spec.array_types[0].partition(".")[0]
        found = machine.devices((library,))
        return found.get(library) or _device_of_array(subject)
    except Exception as error:  # a missing name must not lose the report
        return safe(f"unknown ({type(error).__name__}: {error})")


def _device_of_array(subject: Subject) -> str:
    import numpy as np

    (array,) = subject.take([np.zeros(1, numpy_dtype(subject.spec.dtypes[0]))])
    unsaid = "cpu" if type(array).__module__ == "numpy" else "unknown"  # as in NumPy before 2.0
    return str(getattr(array, "device", unsaid))


def versions() -> dict[str, str]:
    """Return the versions of Python, of the libraries that matter here, and of every plugin."""
    found = {"python": platform.python_version(), **machine.versions()}
    for plugin, _ in plugins():
        name, _, version = plugin.distribution.partition(" ")
        if name:
            found[name] = version
    return found


def _settings() -> dict[str, str]:
    return {name: safe(os.environ[name]) for name in SETTINGS if name in os.environ}


def _not_here() -> dict[str, str]:
    """Return the known backends that cannot run here, with the reasons."""
    known = mhc_core.backends().items()
    return {name: safe(one.reason) for name, one in known if one.reason is not None}


# --- formats ----------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """Return the whole run as JSON, to send in or to compare with another run."""
    return json.dumps(report.as_dict(), indent=1) + "\n"


def as_junit(report: Report) -> str:
    """Return the run as JUnit XML, a test case per check, as CI systems read it."""
    whole = report.as_dict()
    root = ElementTree.Element("testsuites", name=_plain(whole["command"]))
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
    named = {"name": _plain(name), "timestamp": report.date, **counts}
    suite = ElementTree.SubElement(root, "testsuite", named)
    about = ElementTree.SubElement(suite, "properties")
    for key, value in _facts(whole):
        ElementTree.SubElement(about, "property", name=_plain(key), value=_plain(value))
    for record in records:
        case = _case(suite, record)
        if not record.passed:
            what = f"off by {record.error:.3g}, allowed {record.tolerance:.3g}"
            failure = ElementTree.SubElement(case, "failure", message=what)
            failure.text = _plain(safe(record.detail))
    for skip in skips:
        ElementTree.SubElement(_case(suite, skip), "skipped", message=_plain(skip.reason))


def _case(suite: Any, one: Record | Skip) -> Any:
    name = _plain(f"{one.kind}[{one.dtype}]")
    named = {"classname": _plain(f"{one.backend}.{one.op}"), "name": name}
    return ElementTree.SubElement(suite, "testcase", named)


def _plain(text: str) -> str:
    """Return a text without control characters that XML forbids; backends may raise any text."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _facts(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return everything that describes a run, as rows of a name and a value."""
    facts = [(key, str(whole[key])) for key in ("command", "date", "seconds", "seed")]
    for group in ("machine", "devices", "versions", "settings", "not_here"):
        title = {"devices": "device of ", "not_here": "not here: "}.get(group, "")
        facts += [(f"{title}{key}", str(value)) for key, value in whole[group].items()]
    return facts


def as_html(report: Report) -> str:
    """Return the run as a self-contained HTML page, in the reader's colours, for any screen."""
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
    parts.append(
        "<h2>Where</h2>"
        + _table(("", ""), [[_escaped(word) for word in pair] for pair in _facts(whole)])
    )
    return page(title, "\n".join(filter(None, parts)))


def page(title: str, body: str) -> str:
    """Return a self-contained HTML page, in the reader's colours, for any screen."""
    return _PAGE.format(title=_escaped(title), style=_STYLE, body=body)


def _escaped(text: Any) -> str:
    return html.escape(_plain(str(text)))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table of cells; a narrow screen shows each row as a list of its own."""
    labels = [_escaped(text) for text in heads]
    head = "".join(f"<th>{label}</th>" for label in labels)
    head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    body: list[str] = []
    for first, *others in rows:
        cells = zip(labels[1:], others, strict=True)
        told = "".join(f'<td data-head="{label}">{cell}</td>' for label, cell in cells)
        body.append(f"<tr><th>{first}</th>{told}</tr>")
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _failure(record: Record) -> str:
    what, _, command = safe(record.detail).partition(" Reproduce: ")
    below = f"<pre>{_escaped(command)}</pre>" if command else ""
    return f'<div class="failure"><p>{_escaped(what)}</p>{below}</div>'


def _matrix(name: str, records: Sequence[Record]) -> str:
    mine = [record for record in records if record.backend == name and record.op != "chain"]
    dtypes = [dtype for dtype in DTYPES if any(record.dtype == dtype for record in mine)]
    rows: list[list[str]] = []
    for op in sorted({record.op for record in mine}):
        of_op = [record for record in mine if record.op == op]
        cells = [_errors([r for r in of_op if r.dtype == dtype]) for dtype in dtypes]
        rows.append([_escaped(op), *cells, _others(of_op)])
    what = "worst error, forward | gradient, against the float64 oracle"
    heading = f"<h2>{_escaped(name)}</h2><p>{what}</p>"
    return heading + _table(("op", *dtypes, "other checks"), rows) if rows else ""


def _errors(records: Sequence[Record]) -> str:
    shown: list[str] = []
    for column in ("forward", "gradient"):
        one = worst(r for r in records if NUMERIC.get(r.kind) == column)
        text = f"{one.error:.0e}" if one else "-"
        shown.append(f'<span class="{_outcome(one)}">{text}</span>')
    return " | ".join(shown)


def _outcome(record: Record | None) -> str:
    return "none" if record is None else "good" if record.passed else "bad"


def _others(records: Sequence[Record]) -> str:
    cells = [
        f'<span class="{_outcome(record)}">{_escaped(record.kind)}</span>'
        for record in records
        if record.kind not in NUMERIC
    ]
    return " ".join(cells)


def _chain(records: Sequence[Record]) -> str:
    rows = [
        (
            _escaped(r.backend),
            _escaped(r.kind),
            f'<span class="{_outcome(r)}">{r.error:.0e}</span>',
            f"{r.tolerance:.0e}",
        )
        for r in records
        if r.op == "chain"
    ]
    heads = ("backend", "check", "distance", "allowed")
    return "<h2>A text model against NumPy in float64</h2>" + _table(heads, rows) if rows else ""


def _skipped(skips: Sequence[Skip]) -> str:
    rows = [[_escaped(cell) for cell in group] for group in left_out(skips)]
    heads = ("backend", "checks", "skipped", "because")
    return "<h2>Skipped</h2>" + _table(heads, rows) if rows else ""


SUFFIXES = {".json": as_json, ".html": as_html, ".xml": as_junit, ".junit": as_junit}
"""The formats of a report, by the suffix of its file."""

_STYLE = """
:root { color-scheme: light dark; --good: #116329; --bad: #b3261e; --line: #8884; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --good: #7ee29a; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td { font-variant-numeric: tabular-nums; } tbody th { font-weight: 600; }
@media (min-width: 64rem) { tbody th, td { overflow-wrap: normal; } }
@media (max-width: 63.99rem) { /* no room for all columns: a row becomes a list */
  thead { display: none; } table, tbody, tr, th, td { display: block; }
  tr { border-bottom: 1px solid var(--line); padding: .3rem 0; }
  th, td { border: 0; padding: .1rem 0; }
  td[data-head]:not([data-head=""])::before { content: attr(data-head) ": "; opacity: .7; }
}
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
