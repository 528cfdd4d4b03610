"""Trials: one case on one backend, and its results held against the oracle's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance.answers import (
    Kept,
    condition,
    directions,
    distance,
    of_case,
    seams,
    size,
)
from mhc_conformance.cases import NARROW, Case, cases, data, dealt, declaration, numpy_dtype
from mhc_conformance.records import Comparison
from mhc_conformance.subject import Subject, several
from mhc_conformance.telling import quick
from mhc_conformance.tolerances import Quantity, rounds, tolerance

__all__ = ["Trial", "ordinary", "trials"]

Array = NDArray[Any]


class _Expected(NamedTuple):
    """One array as the oracle computes it, and how well the input determines it."""

    name: str
    value: Array
    dtype: str
    condition: float

    @property
    def size(self) -> float:
        """Return the size of the array, which errors are relative to."""
        return size(self.value)


def _compare(op: str, quantity: Quantity, where: str, got: Array, want: _Expected) -> Comparison:
    """Compare one array; its dtype and shape count too."""
    limit = tolerance(op, quantity, want.dtype, want.condition)
    where = f"{want.name} of {where}"
    if got.dtype != numpy_dtype(want.dtype) or got.shape != want.value.shape:
        have = f"{got.dtype} {got.shape}"
        return Comparison(
            where, math.nan, limit, f"is {have}; needs {want.dtype} {want.value.shape}"
        )
    return Comparison(where, distance(got.astype(np.float64), want.value) / want.size, limit)


def _compare_all(
    case: Case, quantity: Quantity, got: Sequence[Array], expected: Sequence[_Expected]
) -> Iterator[Comparison]:
    if len(got) != len(expected):
        problem = f"has {len(got)} arrays; needs {len(expected)}"
        yield Comparison(case.name, math.nan, 0.0, problem)
        return
    for one, want in zip(got, expected, strict=True):
        yield _compare(case.op, quantity, case.name, one, want)


@dataclass(frozen=True)
class Trial:
    """One case on one backend, with the oracle's answers to it."""

    subject: Subject
    case: Case
    dtype: str
    seed: int

    @property
    def primals(self) -> tuple[Array, ...]:
        return data(self.case, self.dtype, self.seed).primals

    @property
    def cotangents(self) -> tuple[Array, ...]:
        return data(self.case, self.dtype, self.seed).cotangents

    @property
    def function(self) -> Callable[..., Any]:
        return self.subject.function(self.case)

    def _seams(self) -> tuple[tuple[str, Kept], ...]:
        """Return the outputs as the backend rounded them, for an op that reads some so."""
        wanted = seams(self.case.op)
        if self.dtype not in NARROW:
            wanted.pop("h_rounded", None)  # h is an output that is not always asked for
        if not wanted:
            return ()
        declared = declaration(self.case.op)
        asked = (declared.outputs[output].asked for output in wanted.values())
        options = {**self.case.options, **{name: True for name in asked if name}}
        function = self.subject.forward(replace(self.case, static=tuple(options.items())))
        outputs = self.subject.give(function(*self.subject.take(self.primals)))
        named = dict(zip(declared.outputs_of(options), outputs, strict=True))
        return tuple((name, Kept(named[output])) for name, output in wanted.items())

    def _expected(self, quantity: Quantity) -> list[_Expected]:
        """Return the oracle's answers; the oracle answers each question once."""
        rounded = () if quantity == "second" else self._seams()
        values, others = of_case(self.case, self.dtype, self.seed, quantity, rounded)
        often = rounds(self.case.iterations)
        outputs = quantity == "forward"
        declared = declaration(self.case.op)
        kept = declared.outputs_of(self.case.options)
        names = list(kept) if outputs else [f"d {name}" for name in self.case.names]
        like = self.cotangents if outputs else self.primals
        expected = [
            _Expected(name, value, str(array.dtype), 1.0)
            for name, value, array in zip(names, values, like, strict=True)
        ]
        return [
            want._replace(condition=often * condition(want.value, other, self.dtype))
            for want, other in zip(expected, others, strict=True)
        ]

    def outputs(self) -> Any:
        """Return the op's outputs on the backend's own arrays."""
        if self.subject.together:
            return self._both()[0]
        return self.function(*self.subject.take(self.primals))

    def pulled(self) -> Any:
        """Return the gradients by the public vjp."""
        if self.subject.together:
            return self._both()[1]
        own, cotangents = self.subject.take(self.primals), self.subject.take(self.cotangents)
        return self.subject.vjp(self.case, own, cotangents)

    def _both(self) -> tuple[Any, Any]:
        """Return outputs and gradients from one program, which is compiled and run once."""
        kept, key = self.subject.kept, (self.case, self.dtype, self.seed)
        if key not in kept:
            own, cotangents = self.subject.take(self.primals), self.subject.take(self.cotangents)
            kept[key] = self.subject.both(self.case)(own, cotangents)
        return kept[key]

    def forward(self, got: Any) -> Iterator[Comparison]:
        """Compare outputs with the oracle's."""
        got = self.subject.give(got)
        yield from _compare_all(self.case, "forward", got, self._expected("forward"))

    def gradients(self, got: Any) -> Iterator[Comparison]:
        """Compare gradients with the oracle's."""
        got = self.subject.give(got)
        yield from _compare_all(self.case, "gradient", got, self._expected("gradient"))

    def called(
        self, how: str, primals: tuple[Any, ...], cotangents: tuple[Any, ...]
    ) -> Iterator[Comparison]:
        """Compare outputs and gradients on the backend's own arrays; ``how`` is in messages."""
        outputs, gradients = self.subject.both(self.case)(primals, cotangents)
        for comparison in (*self.forward(outputs), *self.gradients(gradients)):
            yield replace(comparison, where=f"{comparison.where}, {how}")

    def loss(self, function: Callable[..., Any], curved: bool = False) -> Callable[..., Any]:
        """Return sum(cotangent * output) as a function of the primals.

        A curved loss adds sum(cotangent * output^2 / 2), whose gradient depends on the outputs: so
        it also tests how a vjp differentiates through its cotangents.
        """
        own = self.subject.take(self.cotangents)  # here, where no compiler traces it

        def loss(*arrays: Any) -> Any:
            outputs = several(function(*arrays))
            parts = [
                (c * (o + o * o / 2) if curved else c * o).sum()
                for c, o in zip(own, outputs, strict=True)
            ]
            return sum(parts[1:], parts[0])

        return loss

    def second(self) -> Iterator[Comparison]:
        """Check the gradients' derivative along a direction, or the refusal to compute it."""
        refusal = self.subject.lacks("second")
        try:
            got = self.subject.give(self._hessian_vector())
        except Exception as error:
            if refusal is None:
                raise
            yield Comparison(self.case.name, 0.0, 0.0, self._unclear(error))
            return
        for one in _compare_all(self.case, "second", got, self._expected("second")):
            declared = f"gave numbers, where {self.subject.name} has no second derivatives, and"
            problem = f"{declared} {one.problem or 'wrong ones'}"
            yield one if one.passed or refusal is None else replace(one, problem=problem)

    def _hessian_vector(self) -> Any:
        grad, count = self.subject.transform("grad"), range(len(self.primals))
        along = self.subject.take(directions(self.primals, self.seed))
        gradients = grad(self.loss(self.function, curved=True), count)

        def slope(*arrays: Any) -> Any:
            parts = [(u * g).sum() for u, g in zip(along, gradients(*arrays), strict=True)]
            return sum(parts[1:], parts[0])

        return self.subject.composed(grad(slope, count))(*self.subject.take(self.primals))

    def _unclear(self, error: Exception) -> str:
        """Return why a refusal of second derivatives is unclear, or ""."""
        reason, says = self.subject.lacks("second") or "", str(error)
        others = [name for name in mhc_core.backends() if name != self.subject.name]
        remedies = (reason, *(repr(name) for name in others))
        if self.case.op in says and any(remedy in says for remedy in remedies):
            return ""
        raised = f"raised {type(error).__name__}: {error}"
        return f"{raised}; needs the op's name and the declared reason or another backend's name"


def trials(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Trial]:
    """Yield an op's cases that the backend accepts."""
    _, largest = subject.spec.sizes
    if subject.quick:
        found = iter((quick(op, largest),))
    else:
        found = dealt(op, dtype) if subject.deals else cases(op, dtype, subject.full)
    for case in found:
        if subject.accepts(case) and subject.wants(case):
            subject.trying = case.name
            yield Trial(subject, case, dtype, seed)


def ordinary(subject: Subject, op: str, dtype: str, seed: int) -> Trial:
    """Return one ordinary case, for checks that depend on neither sizes nor values."""
    return next(trials(subject, op, dtype, seed))
