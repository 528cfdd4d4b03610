"""The JSON of a run: what was measured, on which machine, by which command."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from mhc_core import machine
from mhc_core.cli._command import with_places

__all__ = ["header", "record", "spelled"]

SCHEMA = 1
FILE_OPTIONS = ("--json", "--out", "--plot", "--report")


def record(mode: str, libraries: Sequence[str]) -> dict[str, Any]:
    """Return a new record, without paths, names of users or machines, or environment variables."""
    return {
        "schema": SCHEMA,
        "command": shlex.join(["mhc", "bench", *_arguments(sys.argv)]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "mode": mode,
        "machine": machine.machine(),
        "devices": machine.devices(tuple(libraries)),
        "versions": machine.versions(),
    }


def _arguments(argv: Sequence[str]) -> list[str]:
    """Return the command's own words, without the paths of files, which are private."""
    words = iter(with_places(argv[2:]) if argv[1:2] == ["bench"] else [])
    kept: list[str] = []
    for word in words:
        if word in FILE_OPTIONS:
            next(words, None)
        elif word.partition("=")[0] not in FILE_OPTIONS:
            kept.append(word)
    return kept


def header(made: Mapping[str, Any]) -> list[str]:
    """Return lines that name the machine and the versions."""
    hardware = made["machine"]
    lines = [f"{hardware['processor']}, {hardware['cores']} cores, {hardware['system']}"]
    lines += [f"{name}: {device}" for name, device in made["devices"].items()]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return [*lines, f"Python {hardware['python']}, {versions}"]


def spelled(made: Mapping[str, Any]) -> str:
    """Return a record as JSON."""
    return json.dumps(made, indent=2, allow_nan=False) + "\n"
