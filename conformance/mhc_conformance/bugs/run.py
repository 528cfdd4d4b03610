"""The kit run on a backend with a bug."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import numpy as np

import mhc_core
from mhc_conformance.bugs.declaration import BUGS, PREFIX, Bug
from mhc_conformance.checks import check, grid
from mhc_conformance.records import Record
from mhc_conformance.subject import Subject
from mhc_core.discovery import backend_module
from mhc_core.selection import registered

__all__ = ["Outcome", "present", "run_bug"]

# Checks of structure that compare values too, in the most ordinary case: they fail along with
# forward or gradient where that case shows the bug.
ALONG = {"strided", "repeated", "host", "updated"}


@contextlib.contextmanager
def present(*backends: str | Bug) -> Generator[None]:
    """Register backends with a bug for a ``with`` block: bugs, or names that begin with ``bug:``.

    Names of other backends are ignored.

    Raises
    ------
    UnknownBackendError
        If no bug has the name; the message has the nearest one.
    BackendUnavailableError
        If the backend that a bug is put into is not available.
    """
    with contextlib.ExitStack() as stack:
        for one in backends:
            if isinstance(one, Bug):
                stack.enter_context(_registered(one))
            elif one.startswith(PREFIX) and one not in mhc_core.backends():
                stack.enter_context(_registered(_named(one)))
        yield


def _named(backend: str) -> Bug:
    name = backend.removeprefix(PREFIX)
    if name not in BUGS:
        from mhc_conformance import generated  # imports this package; and making all takes time

        if bug := generated.named(name):
            return bug
        near = get_close_matches(name, (*BUGS, *generated.MUTANTS), n=1)
        nearest = f"; the nearest is {PREFIX}{near[0]}" if near else ""
        raise mhc_core.UnknownBackendError(
            f"no bug is named {name!r}{nearest}; mhc conformance --mutations lists them all"
        )
    return BUGS[name]


@contextlib.contextmanager
def _registered(bug: Bug) -> Generator[None]:
    base = mhc_core.backends()[bug.library]
    if base.spec is None or base.reason is not None:
        raise mhc_core.BackendUnavailableError(f"{bug.backend} is in {bug.library}: {base.reason}")
    wrong = _Wrong(f"mhc_conformance.bugs.backends.{bug.name}", bug, backend_module(base.spec))
    spec = replace(
        base.spec,
        name=bug.backend,
        module=wrong.__name__,
        dtypes=tuple({"float32": None, bug.dtype: None}),  # in which it is exactly that bug
        automatic=False,
        neutral=False,  # it has code of its own now, whose sizes and constants are all tried
    )
    sys.modules[wrong.__name__] = wrong
    try:
        # what overflows or divides by zero here does so on purpose
        with registered(spec), np.errstate(all="ignore"):
            yield
    finally:
        del sys.modules[wrong.__name__]


class _Wrong(ModuleType):
    """A backend's module, but for a few functions."""

    def __init__(self, name: str, bug: Bug, base: Any) -> None:
        super().__init__(name, bug.what)
        self._base = base
        vars(self).update(bug.functions())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


@dataclass(frozen=True)
class Outcome:
    """The kit's result on one bug."""

    bug: Bug
    records: tuple[Record, ...] = ()
    reason: str = ""  # why the bug cannot be tried here

    @property
    def failed(self) -> tuple[Record, ...]:
        """Return the checks that fail, first the one that exists for this bug."""
        first = self.bug.fails[0]
        failed = [record for record in self.records if not record.passed]
        return tuple(sorted(failed, key=lambda record: record.kind != first))

    @property
    def message(self) -> str:
        """Return the kit's message about the bug."""
        return self.failed[0].detail if self.failed else ""

    @property
    def problem(self) -> str:
        """Return how the kit failed to catch the bug as it should, or "" if it did not fail."""
        if self.reason:
            return ""
        failed, named = {record.kind for record in self.failed}, set(self.bug.fails)
        along = ALONG if named & {"forward", "gradient"} else set[str]()
        if not named <= failed <= named | along:
            return f"fails {_list(failed)}; should fail {_list(self.bug.fails)}"
        if self.bug.says not in self.message:
            return f"does not say {self.bug.says!r}: {self.message}"
        return ""


def _list(kinds: Any) -> str:
    return ", ".join(sorted(kinds)) or "nothing"


def run_bug(bug: Bug, seed: int = 0) -> Outcome:
    """Run every check of the wrong op, in the bug's dtype, on a backend with that bug."""
    try:
        with present(bug):
            subject = Subject(bug.backend)
            return Outcome(bug, tuple(_checked(subject, bug, seed)))
    except mhc_core.BackendUnavailableError as error:
        return Outcome(bug, reason=str(error))


def _checked(subject: Subject, bug: Bug, seed: int) -> Iterator[Record]:
    for op, dtype, kind in grid(subject):
        # properties draw random inputs, so whether they find a bug varies
        if (op, dtype) == (bug.op, bug.dtype) and kind != "properties":
            yield check(subject, op, dtype, kind, seed)
