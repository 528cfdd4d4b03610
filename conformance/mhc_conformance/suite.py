"""The suite that anyone runs on a backend, by subclassing one class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import pytest

from mhc_conformance.checks import CHECKS, applies, check, everything
from mhc_conformance.mixers import MIXER_CHECKS, backends_of, curved_by, ran_by
from mhc_conformance.records import Comparison
from mhc_conformance.subject import Subject
from mhc_core.math import OPS

__all__ = ["BackendConformance", "MixerConformance"]


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


class MixerConformance:
    """Every check of the kit on one mixer, as pytest tests: three lines make the suite of a mixer.

    ::

        class TestMine(MixerConformance):
            mixer = "mine"

    What the mixer declares must hold: the number of its logits, its start and, where it says so,
    that H_res is doubly stochastic. Its vjp must equal differences of its forward. Every backend
    here that runs it must compute the same mappings and the same first and second gradients as
    NumPy in float64.

    Attributes
    ----------
    mixer
        The name of the mixer.
    options
        The options to check it with; its defaults if empty.
    seed
        The seed of all inputs.
    """

    mixer: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    seed: ClassVar[int] = 0

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test per check, and one per backend."""
        if "backend" in metafunc.fixturenames:
            metafunc.parametrize("backend", backends_of(self.mixer))
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", MIXER_CHECKS)

    def test_mixer(self, kind: str) -> None:
        """Hold the mixer to its declaration, its laws and its slopes."""
        _all_pass(MIXER_CHECKS[kind](self.mixer, self.options, self.seed))

    def test_backend(self, backend: str) -> None:
        """Hold a backend's mappings and gradients to NumPy's."""
        _all_pass(ran_by(backend, self.mixer, self.options, self.seed))

    def test_second(self, backend: str) -> None:
        """Hold a backend's second derivatives to differences of NumPy's gradients."""
        _all_pass(curved_by(backend, self.mixer, self.options, self.seed))


def _all_pass(comparisons: Iterable[Comparison]) -> None:
    failed = [one.says for one in comparisons if not one.passed]
    assert not failed, "\n".join(failed)
