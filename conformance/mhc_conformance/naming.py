"""Names the bug of an implementation, by trying known bugs on the oracle until one matches.

A suspect is a wrong oracle: one with another constant, or with one of its functions replaced. It is
named if its answers are those of the implementation in every case, in the cases that fail and in
those that hold, as near as the right answers would have to be. So a bug is not named because it is
likely, and of two bugs that would both fail a case the other cases decide.

The bugs of :mod:`mhc_conformance.patches` are tried, the constants of all static arguments, and the
bugs of :mod:`mhc_conformance.bugs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhc_conformance import oracle
from mhc_conformance.answers import answers
from mhc_conformance.bugs import BUGS, Bug
from mhc_conformance.cases import NARROW, numpy_dtype
from mhc_conformance.generated import CONSTANTS, get, paths, put
from mhc_conformance.golden import Golden, Want
from mhc_conformance.patches import PATCHES, Patch, reaches
from mhc_conformance.subject import several
from mhc_conformance.tolerances import Quantity, eps

__all__ = ["UNEXPLAINED", "Observed", "Suspect", "name_bug", "suspects"]

Array = NDArray[Any]
Static = dict[str, Any]
Answer = Callable[[Golden, Quantity], "Sequence[Array] | None"]

UNEXPLAINED = "no known bug matches"
ROUNDINGS = 4
"""The number of roundings to a narrow dtype up to which a difference is rounding alone."""


@dataclass(frozen=True)
class Observed:
    """The answer of an implementation to one case."""

    golden: Golden
    quantity: Quantity
    wants: Sequence[Want]
    got: Sequence[Array]

    @property
    def wrong(self) -> bool:
        """Return whether an array is farther off than allowed."""
        return any(want.error(got) > want.limit for want, got in _pairs(self.wants, self.got))


@dataclass(frozen=True)
class Suspect:
    """A wrong oracle: a bug's name, what it is, and the answers of one that has it.

    ``limits`` returns how near others that have it must be, where roundings matter more to it than
    to the right one.
    """

    name: str
    what: str
    answer: Answer
    limits: Callable[[Golden, Quantity], Sequence[float]] | None = None


def _pairs(wants: Sequence[Want], got: Sequence[Array]) -> list[tuple[Want, Array]]:
    return list(zip(wants, got, strict=False))


def name_bug(observed: Sequence[Observed], forward_held: bool = True) -> str:
    """Return the name of the bug that explains what was observed of one op, or that none does.

    ``forward_held`` says that the forward is right, so that a bug of the backward is looked for.
    """
    failing = [one for one in observed if one.wrong]
    if not failing:
        return ""
    others = [one for one in observed if not one.wrong]
    first = failing[0].golden
    for suspect in suspects(first, failing[0].quantity, forward_held):
        if all(_explains(suspect, one) for one in (*failing, *others)):
            return f"{suspect.name}: {suspect.what}"
    return _described(failing)


def _explains(suspect: Suspect, one: Observed) -> bool:
    """Return whether a suspect's answers are those observed, and nearer than the right ones."""
    with np.errstate(all="ignore"):
        try:
            made = suspect.answer(one.golden, one.quantity)
        except (ValueError, IndexError, TypeError, FloatingPointError, np.linalg.LinAlgError):
            return False  # a wrong formula need not fit every case
    if made is None or len(made) != len(one.got):
        return False
    for at, (want, got, answer) in enumerate(zip(one.wants, one.got, made, strict=True)):
        if got.shape != want.value.shape or answer.shape != got.shape:
            return False
        apart, right = _error(got, answer), want.error(got)
        if want.dtype in NARROW:  # an answer is rounded as the implementation's is
            apart = min(apart, _error(got, answer.astype(numpy_dtype(want.dtype))))
        limit = max(want.limit, _rounding(got))
        if right > want.limit:
            if not apart <= right / 3:
                return False
            if apart > limit and suspect.limits is not None:
                limit = suspect.limits(one.golden, one.quantity)[at]
        if not apart <= limit:
            return False
    return True


def _error(got: Array, answer: Array) -> float:
    """Return the distance from an answer; what is not finite must be at the same places."""
    found, wanted = got.astype(np.float64), np.asarray(answer, np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(found)):
        return float("inf")
    if not finite.any():
        return 0.0
    size = float(np.abs(wanted[finite]).max()) or 1.0
    return float(np.abs(found[finite] - wanted[finite]).max()) / size


def _rounding(got: Array) -> float:
    """Return the error of a result that is rounded to an array's dtype."""
    name = str(got.dtype)
    return eps(name) / 2 if name in NARROW else 0.0


def _described(failing: Sequence[Observed]) -> str:
    """Return what can be said of results that no known bug explains."""
    wrong = [
        (want, got)
        for one in failing
        for want, got in _pairs(one.wants, one.got)
        if want.error(got) > want.limit
    ]
    if any(not np.isfinite(got.astype(np.float64)).all() for _, got in wrong):
        return f"{UNEXPLAINED}: there are NaN or infinite numbers"
    dtype = failing[0].golden.dtype
    wide = [got for want, got in wrong if want.dtype not in NARROW]
    for narrow in (dtype, *NARROW):
        if narrow in NARROW and wide and all(_holds(got, narrow) for got in wide):
            return f"rounded: float32 results hold {narrow} numbers"
    if dtype in NARROW:
        roundings = int(np.ceil(max(want.error(got) for want, got in wrong) / (eps(dtype) / 2)))
        if roundings <= ROUNDINGS:
            return f"rounding: right to {roundings} roundings of {dtype}, where one is allowed"
    return UNEXPLAINED


def _holds(array: Array, dtype: str) -> bool:
    """Return whether every number of an array is one of a narrower dtype."""
    wide = array.astype(np.float64)
    return bool(np.array_equal(wide.astype(numpy_dtype(dtype)).astype(np.float64), wide))


# --- suspects ---------------------------------------------------------------------------------


def suspects(one: Golden, quantity: Quantity, forward_held: bool = True) -> Iterator[Suspect]:
    """Yield the suspects for an op, those of its static arguments first."""
    op = one.case.op
    backward = quantity == "gradient" and forward_held
    yield from _patched(one, backward)
    yield from _constants(one, backward)
    yield from _of_catalogue(op, quantity)
    if quantity == "gradient":
        yield from _zeros(one)


def _right(one: Golden, quantity: Quantity, options: Mapping[str, Any]) -> tuple[Array, ...]:
    if quantity == "forward":
        return oracle.forward(one.case.op, one.primals, **options)
    return oracle.gradients(one.case.op, one.primals, one.cotangents, **options)


# constants

ITERATIONS = (1, 3, 5, 10, 20)
SMALL = (0.0, 1e-20, 1e-12, 1e-10, 1e-8, float(np.finfo(np.float32).eps), 1e-6)


def _constants(one: Golden, backward: bool) -> Iterator[Suspect]:
    """Yield the oracle with another value of one static argument, or of a variant's field."""
    static = one.case.options
    there = [path for path in paths(one.case.op) if not _is_whole(static, path)]
    for path in there:
        name = path[-1]
        for says, change in _changes(static, path, there):
            what = f"{name} is {says}" + " in the backward" * backward
            yield Suspect(_named(path, says, backward), what, _with_constant(path, change))


def _named(path: tuple[str, ...], says: str, backward: bool) -> str:
    """Return the catalogue's name for a wrong constant, where it has one."""
    if backward:
        return "other-eps-backward" if "eps" in path[-1] else f"other-{path[-1]}-backward"
    known = {("pre_eps", "0"): "no-pre-eps", ("post_eps", "0"): "no-post-eps"}
    known[("res_transposed", "False")] = "comb-not-transposed"
    if ("sinkhorn_first" in path or "first" in path) and says == "the other":
        return "rows-first"
    return known.get((path[-1], says), f"other-{path[-1].replace('_', '-')}")


def _is_whole(static: Static, path: tuple[str, ...]) -> bool:
    return path == ("variant",) or (len(path) == 1 and path[0] == "n")


Change = Callable[[Static], Any]


def _changes(
    static: Static, path: tuple[str, ...], there: Sequence[tuple[str, ...]]
) -> Iterator[tuple[str, Change]]:
    current = get(static, path)
    if isinstance(current, bool):
        yield "False", lambda _: False
        yield "True", lambda _: True
    elif isinstance(current, int):
        for by in (-1, 1):
            says = "one less" if by < 0 else "one more"
            yield says, lambda given, by=by: max(1, get(given, path) + by)
        for number in ITERATIONS:
            yield str(number), lambda _, number=number: number
    elif isinstance(current, float):
        for number in dict.fromkeys((*SMALL, *CONSTANTS, 1.0, 2.0)):
            yield f"{number:g}", lambda _, number=number: number
        for other in there:
            if other != path and isinstance(get(static, other), float):
                yield f"that of {other[-1]}", lambda given, other=other: get(given, other)
    elif isinstance(current, str):
        for pair in (("columns", "rows"), ("softmax", "exp"), ("sum", "mean")):
            if current in pair:
                yield "the other", _other_of(path, pair)
    elif path[-1] == "sinkhorn_clamp":
        yield "none", lambda _: None
        yield "30", lambda _: (-30.0, 30.0)


def _other_of(path: tuple[str, ...], pair: tuple[str, str]) -> Change:
    return lambda given: pair[int(get(given, path) == pair[0])]


def _with_constant(path: tuple[str, ...], change: Change) -> Answer:
    def answer(one: Golden, quantity: Quantity) -> Sequence[Array]:
        static = put(one.case.options, path, change(one.case.options))
        return _right(one, quantity, {**one.case.asked, **static})

    return answer


# the catalogue

ON_FLOAT32 = 1e-6


def _of_catalogue(op: str, quantity: Quantity) -> Iterator[Suspect]:
    """Yield the catalogue's bugs of this op, which are code on NumPy arrays."""
    check = "forward" if quantity == "forward" else "gradient"
    for bug in BUGS.values():
        if bug.op == op and check in bug.fails:
            yield Suspect(bug.name, bug.what, _as_bug(bug))


def _as_bug(bug: Bug) -> Answer:
    def answer(one: Golden, quantity: Quantity) -> Sequence[Array] | None:
        functions, case = bug.functions(), one.case
        if quantity == "forward":
            if case.op not in functions:
                return None
            primals = tuple(np.array(primal) for primal in case.placed(one.primals))
            made = several(functions[case.op](*primals, **case.options))
            return [np.asarray(output) for output in made if output is not None]
        if "vjp" not in functions:
            return None
        placed = case.placed(one.primals)
        made = functions["vjp"](case.op, placed, one.cotangents, **case.options)
        return [np.asarray(gradient) for gradient in made if gradient is not None]

    return answer


# gradients that are not there


def _zeros(one: Golden) -> Iterator[Suspect]:
    """Yield the right gradients with some of them zero."""
    for name in one.case.names:
        yield Suspect(
            "zero-gradient", f"the gradient of {name} is zero", _with_zero(frozenset((name,)))
        )
    for name in one.case.names:
        others = frozenset(one.case.names) - {name}
        what = f"all gradients but that of {name} are zero"
        yield Suspect("zero-gradient", what, _with_zero(others))


def _with_zero(names: frozenset[str]) -> Answer:
    def answer(one: Golden, quantity: Quantity) -> Sequence[Array]:
        right = _right(one, quantity, one.case.asked)
        return [
            np.zeros_like(array) if name in names else array
            for name, array in zip(one.case.names, right, strict=True)
        ]

    return answer


# functions of the oracle replaced


def _patched(one: Golden, backward: bool) -> Iterator[Suspect]:
    used = reaches(one.case.op)
    for each in PATCHES:
        if used & each.replacements.keys() and (each.which == "both" or backward):
            says = each.what + " (in the backward)" * (backward and each.which == "both")
            yield Suspect(each.name, says, _with_patch(each), _limits_with(each))


def _with_patch(patch: Patch) -> Answer:
    def answer(one: Golden, quantity: Quantity) -> Sequence[Array]:
        with patch.present():
            return _right(one, quantity, one.case.asked)

    return answer


def _limits_with(patch: Patch) -> Callable[[Golden, Quantity], Sequence[float]]:
    def limits(one: Golden, quantity: Quantity) -> Sequence[float]:
        drawn = (one.primals, one.cotangents)
        with patch.present():
            found = answers(one.case.op, quantity, *drawn, one.case.asked, one.dtype, one.seed)
        return one.limits(quantity, *found)

    return limits
