"""The suite that anyone runs on a backend, by subclassing one class."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import pytest

from mhc_conformance.checks import CHECKS, applies, check, everything
from mhc_conformance.subject import Subject
from mhc_core.math import OPS

__all__ = ["BackendConformance"]


class BackendConformance:
    """Every check of the kit on one backend, as pytest tests.

    Two lines make the suite of a backend::

        class TestMine(BackendConformance):
            backend = "mine"

    Each op is held against the float64 oracle in every dtype that the backend declares, forwards
    and gradients. A capability that the spec leaves out, be it an op, a dtype or a transform, is
    skipped with the spec's own reason; one that it declares and does not have fails.

    Attributes
    ----------
    backend
        The name of the backend.
    seed
        The seed of all inputs; a failure's message has the command that repeats it.
    ops
        The ops to check; all of them if empty.
    """

    backend: ClassVar[str]
    seed: ClassVar[int] = 0
    ops: ClassVar[Collection[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test per op, dtype and check, those left out included: they are skipped."""
        if "dtype" not in metafunc.fixturenames:
            return
        kind = metafunc.function.__name__.removeprefix("test_")
        found = [
            (op, dtype)
            for op, dtype, _, _ in everything(Subject(self.backend), kind)
            if op in (self.ops or OPS)
        ]
        metafunc.parametrize(("op", "dtype"), found)

    def _hold(self, op: str, dtype: str, kind: str) -> None:
        subject = Subject(self.backend)
        reason = applies(subject, op, dtype, kind)
        if reason:
            pytest.skip(reason)
        record = check(subject, op, dtype, kind, self.seed)
        assert record.passed, record.detail


def _test(kind: str) -> Any:
    def test(self: BackendConformance, op: str, dtype: str) -> None:
        self._hold(op, dtype, kind)  # pyright: ignore[reportPrivateUsage]

    test.__name__ = f"test_{kind}"
    test.__doc__ = CHECKS[kind].__doc__
    return test


for _kind in CHECKS:
    setattr(BackendConformance, f"test_{_kind}", _test(_kind))
