"""The parent's side of the separate process in which kernels are tried."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CHILD", "Found", "prove"]

CHILD = "mhc_backends.proof.child"
"""The module whose ``main`` runs in the process."""

KILLED = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")  # sent by others: no kernel is at fault

# The interpreter is started alone, so that no json.py in the current folder comes first, and gets
# the path of the process that asks, so that both import the same.
_PROGRAM = """
import json, site, sys
request = json.loads(sys.stdin.buffer.read())
if request["user_site"]:
    site.addsitedir(request["user_site"])
sys.path[:] = request["path"]
from importlib import import_module
import_module(request["child"]).main(request)
"""


class Found(NamedTuple):
    """The outcome of running a kind of call.

    Attributes
    ----------
    reason
        None if everything passed, else what failed.
    classes
        The outcome of each class of launches: held, failed or not tried.
    final
        Whether another run cannot change the outcome.
    timed_out
        Whether it did not end by itself.
    """

    reason: str | None
    classes: dict[str, str]
    final: bool
    timed_out: bool = False


def prove(kind: Any, launcher: str, compiled: bool, limit: float, child: str = CHILD) -> Found:
    """Run a kind of call's kernels in a separate process, which ends within the limit."""
    reason = _no_interpreter()
    if reason:
        return Found(reason, {}, False)
    op, dtypes, n = kind
    request = {
        "op": op,
        "dtypes": dtypes,
        "n": n,
        "launcher": launcher,
        "child": child,
        "compiled": compiled,
        "limit": limit + 10,  # it ends itself if this process is gone by then
        "path": [folder for folder in sys.path if isinstance(folder, str)],  # pyright: ignore[reportUnnecessaryIsInstance]
        "user_site": site.getusersitepackages() if site.ENABLE_USER_SITE else None,
    }
    try:
        started = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that it ends with all that it may have started
        )
    except (OSError, ValueError) as error:
        return Found(f"no process can be started to try it in ({error})", {}, False)
    try:
        told, said = started.communicate(json.dumps(request).encode(), limit)
    except subprocess.TimeoutExpired:
        told, at = _far(_end(started))
        return Found(f"trying it timed out after {limit:g} s{at}", told, False, timed_out=True)
    except BaseException:  # such as Ctrl-C
        _end(started)
        raise
    return _judge(started.returncode, told, said)


def _no_interpreter() -> str | None:
    """Return why no Python can be started from here, or None."""
    if getattr(sys, "frozen", False) or not sys.executable:
        return "this application has no Python interpreter of its own to try it in"
    name = Path(sys.executable).name
    if not name.lower().startswith(("python", "pypy")):  # it would start the application once more
        return f"sys.executable is {name!r}, not a Python interpreter to try it in"
    return None


def _end(child: subprocess.Popen[bytes]) -> bytes:
    """Kill a process and all that it started, and return its output."""
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        return child.communicate(timeout=5)[0]
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:  # one may hang in a driver
        return getattr(error, "output", None) or b""


# ---- its output ----------------------------------------------------------------------------------


def _judge(code: int, told: bytes, said: bytes) -> Found:
    """Return the outcome from a process's output and exit."""
    classes, at = _far(told)
    last = (_lines(told) or [{}])[-1]
    if "proven" in last:
        return Found(None, classes, True)
    if "fault" in last:
        return Found(str(last["fault"]), classes, True)
    how = f"code {code}"
    if code < 0:
        how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    reason = f"the process that tried it ended with {how}{at}"
    if how in KILLED:
        return Found(reason, classes, False)
    words = said.decode(errors="replace").strip().splitlines()
    return Found(f"{reason}: {words[-1][:300]}" if words else reason, classes, True)


def _far(told: bytes) -> tuple[dict[str, str], str]:
    """Return the outcome of each class of launches, and where the process ended."""
    classes: dict[str, str] = {}
    at, trying = "", ""
    for line in _lines(told):
        for words, state in (("classes", "not tried"), ("held", "held"), ("failed", "failed")):
            classes |= dict.fromkeys(map(str, line.get(words, ())), state)
        at = f" at {line['at']}" if "at" in line else at
        trying = str(line.get("trying", ""))
    if trying:  # which ended the process
        classes[trying] = "failed"
    return classes, at


def _lines(told: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for line in told.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # the last may have been cut off
            said: Any = json.loads(line)
            found += [said] if isinstance(said, dict) else []
    return found
