"""Questions to a process that runs a project, which may end or hang at any of them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mhc_core.text import one_line, safe
from mhc_peers.declaration import Peer
from mhc_peers.targets import NotRunError, environment, interpreter
from mhc_peers.wire import Asked, Began, Found

__all__ = ["PATIENCE", "Answers", "ask"]

PATIENCE = 600.0
"""Seconds for an answer: a compiler may run before the first."""
STARTS = 4
"""The number of times that the process of a project is started before the rest is left."""

Answers = tuple[dict[int, Found], dict[str, Any]]


def ask(
    family: Sequence[Peer], asked: Mapping[str, Sequence[Asked]], checkouts: Mapping[str, Path]
) -> dict[str, Answers]:
    """Return the answers of each peer by their numbers, from a process that they share.

    A question at which the process ends, or that it does not answer in time, has that as its
    answer, and the others are asked in a new process. Raise NotRunError if none can be asked.
    """
    python = interpreter(family[0])
    around = environment(family[0], python, checkouts)
    answers: dict[str, Answers] = {
        peer.name: ({}, {"versions": {}, "device": "unknown"}) for peer in family
    }
    said = ""
    for _ in range(STARTS):
        left = _left(asked, answers)
        if not left:
            break
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "jobs").write_bytes(pickle.dumps(left))
            said = _run(python, around, Path(folder))
            last = _read(Path(folder, "results"), answers)
        if last is None:
            break  # before any question
        name, number = last
        answers[name][0].setdefault(number, Found(number, problem=said))
    if not any(found for found, _ in answers.values()) and any(asked.values()):
        raise NotRunError(said)
    for name, questions in _left(asked, answers):
        for one in questions:
            answers[name][0][one.number] = Found(one.number, unasked=said)
    return answers


def _left(
    asked: Mapping[str, Sequence[Asked]], answers: Mapping[str, Answers]
) -> list[tuple[str, list[Asked]]]:
    """Return the questions that have no answer yet."""
    left = {
        name: [one for one in questions if one.number not in answers[name][0]]
        for name, questions in asked.items()
    }
    return [(name, questions) for name, questions in left.items() if questions]


def _run(python: str, around: Mapping[str, str], folder: Path) -> str:
    """Run the questions in a folder; return how the process ended."""
    results = folder / "results"
    results.touch()
    command = [python, "-m", "mhc_peers.child", str(folder / "jobs"), str(results)]
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            command,
            env=dict(around),
            stdin=subprocess.DEVNULL,
            stdout=said,  # nothing that a project prints reaches the table
            stderr=said,
            cwd=folder,
            start_new_session=True,
        )
        try:
            code = _waited(process, results)
        finally:  # also at Ctrl-C; what it started ends with it
            _kill(process)
    if code is None:
        return f"there was no answer in {PATIENCE:.0f} s"
    if code < 0:
        return f"its process ended by {signal.Signals(-code).name}"
    lines = (folder / "said").read_text(errors="replace").strip().splitlines() or ["no message"]
    last = next((line for line in reversed(lines) if "Error" in line), lines[-1])
    return f"its process ended with code {code}: {one_line(safe(last))}"


def _waited(process: subprocess.Popen[bytes], results: Path) -> int | None:
    """Return the exit code of a process, or None if nothing came for too long."""
    size, since, wait = 0, time.monotonic(), 0.02
    while time.monotonic() - since < PATIENCE:
        try:
            return process.wait(wait)
        except subprocess.TimeoutExpired:
            wait = min(0.5, 1.5 * wait)
        if results.stat().st_size > size:
            size, since = results.stat().st_size, time.monotonic()
    return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _read(results: Path, answers: Mapping[str, Answers]) -> tuple[str, int] | None:
    """Take in what a process wrote; return the last question that it began."""
    last: tuple[str, int] | None = None
    with results.open("rb") as file:
        while (message := _message(file)) is not None:
            name, one = message
            found, about = answers[name]
            if isinstance(one, Found):
                found[one.number] = one
            elif isinstance(one, Began):
                last = name, one.number
            else:
                about.update(one)
    return last


def _message(file: IO[bytes]) -> tuple[str, Any] | None:
    try:
        return pickle.load(file)
    except (EOFError, pickle.UnpicklingError):  # the last is cut off where the process ended
        return None
