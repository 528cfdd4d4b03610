"""The checks: each holds one op of one backend, in one dtype, against the float64 oracle.

A check yields comparisons, result by result; a record keeps the worst of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance import oracle
from mhc_conformance.cases import SIZES, Case, cases, data, declaration, numpy_dtype
from mhc_conformance.subject import Subject, several
from mhc_conformance.telling import SECOND, quick
from mhc_conformance.tolerances import Kind, eps, rounds, tolerance
from mhc_core.backend import DTYPES
from mhc_core.math import OPS
from mhc_core.selection import without_proofs

__all__ = [
    "CHECKS",
    "Comparison",
    "Record",
    "Skip",
    "answers",
    "applies",
    "check",
    "comparisons",
    "condition",
    "everything",
    "grid",
    "size",
    "skips",
]

Array = NDArray[Any]

STEP = 2e-3  # of the differences in float64 that second derivatives are held to


@dataclass(frozen=True)
class Record:
    """The outcome of one check."""

    backend: str
    op: str
    dtype: str
    kind: str
    error: float
    tolerance: float
    passed: bool
    cases: int
    seed: int
    detail: str = ""  # of the worst comparison that failed

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which has no NaN: an error that is not finite becomes null."""
        record = asdict(self)
        for name in ("error", "tolerance"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        return record


@dataclass(frozen=True)
class Skip:
    """A check that a backend declares not to hold, and why."""

    backend: str
    op: str
    dtype: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A comparison of one array with the oracle's."""

    where: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the comparison holds; an error that is NaN does not."""
        return not self.problem and self.error <= self.tolerance

    @property
    def says(self) -> str:
        """Return which array it is, and its problem or its error."""
        what = self.problem or f"is off by {self.error:.3g}, allowed {self.tolerance:.3g}"
        return f"{self.where} {what}"

    @property
    def badness(self) -> float:
        """Return the rank for sorting: the share of the tolerance that is used up."""
        if self.problem or math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else self.error


# --- comparing --------------------------------------------------------------------------------


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


def _compare(op: str, kind: Kind, where: str, got: Array, want: _Expected) -> Comparison:
    """Compare one array; its dtype and shape count too."""
    limit = tolerance(op, kind, want.dtype, want.condition)
    where = f"{want.name} of {where}"
    if got.dtype != numpy_dtype(want.dtype) or got.shape != want.value.shape:
        have = f"{got.dtype} {got.shape}"
        return Comparison(
            where, math.nan, limit, f"is {have}; needs {want.dtype} {want.value.shape}"
        )
    return Comparison(where, _distance(got.astype(np.float64), want.value) / want.size, limit)


def _compare_all(
    case: Case, kind: Kind, got: Sequence[Array], expected: Sequence[_Expected]
) -> Iterator[Comparison]:
    if len(got) != len(expected):
        problem = f"has {len(got)} arrays; needs {len(expected)}"
        yield Comparison(case.name, math.nan, 0.0, problem)
        return
    for one, want in zip(got, expected, strict=True):
        yield _compare(case.op, kind, case.name, one, want)


@dataclass(frozen=True)
class _Trial:
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
        return self.subject.function(self.case.op, self.case.options)

    def _seam(self) -> _Kept | None:
        """Return the streams as the backend rounded them, for an op that reads them so, or None."""
        if self.case.op != "combine_pre":
            return None
        outputs = self.subject.give(self.function(*self.subject.take(self.primals)))
        return _Kept(outputs[0])

    def _expected(self, kind: Kind) -> list[_Expected]:
        """Return the oracle's answers; the oracle answers each question once."""
        seam = None if kind == "second" else self._seam()
        values, others = _kept_answers(self.case, self.dtype, self.seed, kind, seam)
        often = rounds(self.case.iterations)
        outputs = kind == "forward"
        declared = declaration(self.case.op)
        names = list(declared.outputs) if outputs else [f"d {name}" for name in declared.arrays]
        like = self.cotangents if outputs else self.primals
        expected = [
            _Expected(name, value, str(array.dtype), 1.0)
            for name, value, array in zip(names, values, like, strict=False)
        ]
        return [
            want._replace(condition=often * condition(want.value, other, self.dtype))
            for want, other in zip(expected, others, strict=True)
        ]

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
        outputs = self.function(*primals)
        gradients = self.subject.vjp(self.case.op, primals, cotangents, self.case.options)
        for comparison in (*self.forward(outputs), *self.gradients(gradients)):
            yield replace(comparison, where=f"{comparison.where}, {how}")

    def loss(self, function: Callable[..., Any], curved: bool = False) -> Callable[..., Any]:
        """Return sum(cotangent * output) as a function of the primals.

        A curved one has sum(cotangent * output^2 / 2) beside it, whose gradient depends on the
        outputs: what a vjp makes of cotangents that are being differentiated counts too.
        """
        own = self.subject.take(self.cotangents)  # outside, where no compiler traces it

        def loss(*arrays: Any) -> Any:
            outputs = several(function(*arrays))
            parts = [
                (c * (o + o * o / 2) if curved else c * o).sum()
                for c, o in zip(own, outputs, strict=True)
            ]
            return sum(parts[1:], parts[0])

        return loss

    def native_gradients(self, wrap: Callable[[Any], Any] | None = None) -> Any:
        """Return the gradients by the library's own grad."""
        argnums = range(len(self.primals))
        loss = self.loss(wrap(self.function) if wrap else self.function)
        return self.subject.transform("grad")(loss, argnums)(*self.subject.take(self.primals))

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
        along = self.subject.take(_directions(self.primals, self.seed))
        gradients = grad(self.loss(self.function, curved=True), count)

        def slope(*arrays: Any) -> Any:
            parts = [(u * g).sum() for u, g in zip(along, gradients(*arrays), strict=True)]
            return sum(parts[1:], parts[0])

        return grad(slope, count)(*self.subject.take(self.primals))

    def _unclear(self, error: Exception) -> str:
        """Return why a refusal of second derivatives is unclear, or ""."""
        reason, says = self.subject.lacks("second") or "", str(error)
        others = [name for name in mhc_core.backends() if name != self.subject.name]
        remedies = (reason, *(repr(name) for name in others))
        if self.case.op in says and any(remedy in says for remedy in remedies):
            return ""
        raised = f"raised {type(error).__name__}: {error}"
        return f"{raised}; needs the op's name and the declared reason or another backend's name"


def _directions(primals: Sequence[Array], seed: int) -> tuple[Array, ...]:
    """Draw the vector of a Hessian-vector product."""
    rng = np.random.default_rng([seed, len(primals)])
    return tuple(rng.normal(size=primal.shape).astype(primal.dtype) for primal in primals)


def _hessian_vector(
    case: Case, primals: Sequence[Array], cotangents: Sequence[Array], along: Sequence[Array]
) -> tuple[Array, ...]:
    """Return differences of the oracle's gradients of sum(c (o + o^2 / 2)); the error is step^4."""
    wide = [primal.astype(np.float64) for primal in primals]

    def gradients(step: float) -> tuple[Array, ...]:
        at = [primal + step * u.astype(np.float64) for primal, u in zip(wide, along, strict=True)]
        outputs = oracle.forward(case.op, at, **case.options)
        pulled = [c * (1 + o) for c, o in zip(cotangents, outputs, strict=True)]
        return oracle.gradients(case.op, at, pulled, **case.options)

    def difference(step: float) -> list[Array]:
        pairs = zip(gradients(step), gradients(-step), strict=True)
        return [(ahead - behind) / (2 * step) for ahead, behind in pairs]

    pairs = zip(difference(STEP), difference(STEP / 2), strict=True)
    return tuple((4 * narrow - wide) / 3 for wide, narrow in pairs)


class _Kept:
    """An array as a dictionary key, equal to any other array with the same bytes."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._key = (array.tobytes(), array.shape, str(array.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kept) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _answers(
    case: Case, dtype: str, seed: int, kind: Kind, rounded: _Kept | None = None
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    options = {**case.options, **({"x_rounded": rounded.array} if rounded else {})}
    drawn = data(case, dtype, seed)
    if kind != "second":
        return answers(case.op, kind, *drawn, options, dtype, seed)
    along = _directions(drawn.primals, seed)

    def ask(primals: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, ...]:
        return _hessian_vector(case, primals, cotangents, along)

    return _twice(ask, drawn, dtype, seed)


def answers(
    op: str,
    kind: Kind,
    primals: Sequence[Array],
    cotangents: Sequence[Array],
    options: Mapping[str, Any],
    dtype: str,
    seed: int = 0,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the oracle's answers, and how far they move when the input moves by one rounding."""

    def ask(primals: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, ...]:
        if kind == "forward":
            return oracle.forward(op, primals, **options)
        return oracle.gradients(op, primals, cotangents, **options)

    return _twice(ask, (primals, cotangents), dtype, seed)


def _twice(
    ask: Callable[[Sequence[Array], Sequence[Array]], tuple[Array, ...]],
    drawn: tuple[Sequence[Array], Sequence[Array]],
    dtype: str,
    seed: int,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    rng = np.random.default_rng(seed)
    primals, cotangents = (
        [_moved(rng, array, _rounding(dtype)) for array in arrays] for arrays in drawn
    )
    return ask(*drawn), ask(primals, cotangents)


def condition(value: Array, moved: Array, dtype: str) -> float:
    """Return 1 plus the number of roundings that a result moves by when its input moves by one."""
    return 1 + _distance(moved, value) / size(value) / _rounding(dtype)


def size(value: Array) -> float:
    """Return the size of an array, which errors are relative to."""
    return float(np.abs(value[~np.isnan(value)]).max(initial=0.0)) or 1.0


# of one op's cases: many checks, and many backends in turn, are held against the same answers
_kept_answers = lru_cache(maxsize=128)(_answers)


def _rounding(dtype: str) -> float:
    """Return the size of one rounding in the computation."""
    return eps("float64" if dtype == "float64" else "float32")


def _moved(rng: np.random.Generator, array: Array, rounding: float) -> Array:
    """Move every number by up to one rounding."""
    wide = array.astype(np.float64)
    return wide * (1 + rounding * rng.uniform(-1, 1, wide.shape))


def _distance(one: Array, other: Array) -> float:
    """Return the largest difference: 0 where both are NaN, NaN where only one is."""
    alike = np.isnan(one) & np.isnan(other)
    return float(np.abs(np.where(alike, 0.0, one - other)).max(initial=0.0))


def _trials(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[_Trial]:
    smallest, largest = subject.spec.sizes
    for case in [quick(op)] if subject.quick else cases(op, dtype, subject.full):
        if smallest <= case.sizes.n <= (largest or case.sizes.n) and subject.wants(case):
            subject.trying = case.name
            yield _Trial(subject, case, dtype, seed)


def _simple(subject: Subject, op: str, dtype: str, seed: int) -> _Trial:
    """Return one ordinary case, for checks that depend on neither sizes nor values."""
    return next(_trials(subject, op, dtype, seed))


# --- the checks -------------------------------------------------------------------------------


def forward(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check every case's outputs: values, shapes and dtypes."""
    for trial in _trials(subject, op, dtype, seed):
        yield from trial.forward(trial.function(*subject.take(trial.primals)))


def gradient(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check every case's gradients through mhc_core.vjp."""
    for trial in _trials(subject, op, dtype, seed):
        primals, cotangents = subject.take(trial.primals), subject.take(trial.cotangents)
        yield from trial.gradients(subject.vjp(op, primals, cotangents, trial.case.options))


def grad(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check gradients through the library's own autodiff: of one case, or of all with --full."""
    for trial in itertools.islice(_trials(subject, op, dtype, seed), None if subject.full else 1):
        yield from trial.gradients(trial.native_gradients())


def compile(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check the forward, and the gradient where there is one, inside the library's compiler."""
    trial = _simple(subject, op, dtype, seed)
    compiled = subject.transform("compile")
    own = subject.take(trial.primals)
    yield from trial.forward(compiled(trial.function)(*own))
    if subject.lacks("grad") is None:
        argnums = range(len(own))
        whole = subject.transform("grad")(trial.loss(trial.function), argnums)
        yield from trial.gradients(compiled(whole)(*own))


def vmap(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check forward and gradient, mapped over the first leading axis of arrays that have one."""
    trial = _simple(subject, op, dtype, seed)
    declared = declaration(op)
    names = list(declared.arrays)[: len(trial.primals)]
    axes = [
        0 if _has_leading(declared, name, a) else None
        for name, a in zip(names, trial.primals, strict=True)
    ]
    mapped = subject.transform("vmap")(trial.function, axes)
    yield from trial.forward(mapped(*subject.take(trial.primals)))
    if subject.lacks("grad") is None:

        def instead(_: Any) -> Any:
            return mapped

        yield from trial.gradients(trial.native_gradients(instead))


def _has_leading(op: Any, name: str, array: Array) -> bool:
    words = op.patterns[name][0]
    return words[0] == "..." and array.ndim >= len(words)


def checkpoint(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check forward and gradient when the backward recomputes the forward."""
    trial = _simple(subject, op, dtype, seed)
    wrapped = subject.transform("checkpoint")
    yield from trial.forward(wrapped(trial.function)(*subject.take(trial.primals)))
    yield from trial.gradients(trial.native_gradients(wrapped))


def second(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check Hessian-vector products, reverse over reverse, against differences of oracle gradients.

    A backend that declares not to have them must raise, and name the op and the remedy.
    """
    smallest, largest = subject.spec.sizes
    for case in [case for case in SECOND if case.op == op]:
        if smallest <= case.sizes.n <= (largest or case.sizes.n):
            subject.trying = case.name
            yield from _Trial(subject, case, dtype, seed).second()


def strided(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check inputs that are views: with gaps, or contiguous but starting at an odd element.

    The latter begin where no vector load may: first all inputs do, and then each of them alone,
    since a kernel that checks one address may forget another.
    """
    trial = _simple(subject, op, dtype, seed)
    gapped = [
        tuple(a[..., ::2] for a in subject.take([np.repeat(a, 2, -1) for a in arrays]))
        for arrays in (trial.primals, trial.cotangents)
    ]
    yield from trial.called("every second number", *gapped)
    trials = [trial]
    whole_blocks = (t for t in _trials(subject, op, dtype, seed) if _in_blocks(t.case))
    trials += itertools.islice(whole_blocks, 1)
    for trial in trials:
        count = len(trial.primals)
        both = (*trial.primals, *trial.cotangents)
        views, arrays = [_odd_view(subject, a) for a in both], subject.take(both)
        for chosen in (range(len(both)), *((at,) for at in range(len(both)))):
            mixed = [views[at] if at in chosen else arrays[at] for at in range(len(both))]
            what = "all" if len(chosen) > 1 else f"number {chosen[0]}"
            yield from trial.called(
                f"{what} from an odd number on", tuple(mixed[:count]), tuple(mixed[count:])
            )


def _in_blocks(case: Case) -> bool:
    """Return whether C is in whole blocks of 32, as in real models: kernels branch on that."""
    return case.sizes.C % 32 == 0 and 0 not in case.sizes.leading


def _odd_view(subject: Subject, array: Array) -> Any:
    """Return a contiguous view that begins at element 1 of a longer array."""
    (flat,) = subject.take([np.concatenate([np.zeros(1, array.dtype), array.reshape(-1)])])
    return flat[1:].reshape(array.shape)


def repeated(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check that two runs give the same bits, forward and gradient, and a no_grad run is right."""
    for trial in itertools.islice(_trials(subject, op, dtype, seed), 2):
        own, cotangents = subject.take(trial.primals), subject.take(trial.cotangents)
        with mhc_core.no_grad():  # where backends may leave out what only a gradient needs
            yield from trial.forward(trial.function(*own))
        runs = [
            [
                *subject.give(trial.function(*own)),
                *subject.give(subject.vjp(op, own, cotangents, trial.case.options)),
            ]
            for _ in range(2)
        ]
        for first, second in zip(*runs, strict=True):
            same = first.tobytes() == second.tobytes()
            problem = "" if same else "differs between two runs on the same input"
            yield Comparison(trial.case.name, 0.0, 0.0, problem)


def host(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check NumPy inputs on a backend chosen by name: it accepts them and returns its own."""
    trial = _simple(subject, op, dtype, seed)
    outputs = trial.function(*trial.primals)
    own = cast("type[object]", type(subject.take(trial.primals[:1])[0]))
    for output in several(outputs):
        if type(output) is not own:
            problem = f"gave a {type(output).__name__}; needs the backend's own {own.__name__}"
            yield Comparison(trial.case.name, math.nan, 0.0, problem)
    yield from trial.forward(outputs)
    gradients = subject.vjp(op, trial.primals, trial.cotangents, trial.case.options)
    yield from trial.gradients(gradients)


def updated(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check overwriting inputs between two calls: the second sees new values, old results stay.

    Where arrays cannot be written to, others of the same kind take their place.
    """
    trial = _simple(subject, op, dtype, seed)
    before = replace(trial, seed=seed + 1)
    given = (before.primals, before.cotangents)
    own = [subject.take([np.array(array) for array in both]) for both in given]

    def call(primals: Any, cotangents: Any) -> tuple[Any, tuple[Any, ...]]:
        return trial.function(*primals), subject.vjp(op, primals, cotangents, trial.case.options)

    outputs, gradients = call(*own)
    first = (*several(outputs), *gradients)
    kept = _bytes(subject, first)
    after = (subject.take(trial.primals), subject.take(trial.cotangents))
    outputs, gradients = call(
        *(tuple(map(_overwritten, *both)) for both in zip(own, after, strict=True))
    )
    for comparison in (*trial.forward(outputs), *trial.gradients(gradients)):
        yield replace(comparison, where=f"{comparison.where}, second values")
    changed = "changed when the inputs were written over"
    problem = "" if _bytes(subject, first) == kept else changed
    yield Comparison(f"a result of {trial.case.name}", 0.0, 0.0, problem)
    for index, result in enumerate(first):
        problem = ""
        try:
            _overwritten(result, 0)
        except ValueError as error:
            problem = f"cannot be written to: {error}"
        if _bytes(subject, first[index + 1 :]) != kept[index + 1 :]:
            problem = "changed when another result was written over"
        yield Comparison(f"a result of {trial.case.name}", 0.0, 0.0, problem)


def _bytes(subject: Subject, arrays: Sequence[Any]) -> list[bytes]:
    return [array.tobytes() for array in subject.give(arrays)]


def _overwritten(array: Any, values: Any) -> Any:
    try:
        array[...] = values
    except TypeError:  # JAX's arrays never change
        return values
    return array


def properties(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check laws that hold for any input, on inputs that hypothesis chooses."""
    from mhc_conformance.properties import hold

    return hold(subject, op, dtype, seed)


Check = Callable[[Subject, str, str, int], Iterator[Comparison]]

CHECKS: Mapping[str, Check] = {
    "forward": forward,
    "gradient": gradient,
    "grad": grad,
    "compile": compile,
    "vmap": vmap,
    "checkpoint": checkpoint,
    "second": second,
    "strided": strided,
    "repeated": repeated,
    "host": host,
    "updated": updated,
    "properties": properties,
}
ONE_DTYPE = "float32"  # of the checks that look at structure and not at rounding


def dtypes_of(kind: str, dtypes: Sequence[str]) -> list[str]:
    """Return those of a backend's dtypes in which a check is made."""
    one = ONE_DTYPE if ONE_DTYPE in dtypes else dtypes[0]
    made = {
        "forward": dtypes,
        "gradient": dtypes,
        "grad": (one, "bfloat16"),
        "strided": (one, "bfloat16"),  # narrow numbers make other vectors
        "properties": ("float64",) if "float64" in dtypes else (one,),  # the rounding is not it
    }
    return [dtype for dtype in dtypes if dtype in made.get(kind, (one,))]


def applies(subject: Subject, op: str, dtype: str, kind: str) -> str | None:
    """Return why a check does not apply, or None where it must hold."""
    if op not in subject.spec.ops:
        return f"{subject.name} has no {op}"
    if dtype not in subject.spec.dtypes:
        return f"{subject.name} has no {dtype}"
    if kind in ("checkpoint", "second") and subject.lacks("grad"):
        return subject.lacks("grad")
    if kind == "second":  # where it is declared not to be there, an error must be
        return None
    if kind == "properties":
        from mhc_conformance.properties import lacks

        return lacks(subject, op, dtype)
    return subject.lacks(kind)


def everything(subject: Subject, *kinds: str) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield every (op, dtype, kind) that exists, with the reason if it does not apply."""
    declared = subject.spec.dtypes
    others = [dtype for dtype in DTYPES if dtype not in declared]
    for kind in kinds or CHECKS:
        tried = dtypes_of(kind, declared) + (others if kind in ("forward", "gradient") else [])
        for op in OPS:
            for dtype in tried:
                yield op, dtype, kind, applies(subject, op, dtype, kind)


def grid(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """Yield every (op, dtype, kind) that the backend declares to hold."""
    for op, dtype, kind, reason in everything(subject):
        if reason is None:
            yield op, dtype, kind


def skips(subject: Subject) -> Iterator[Skip]:
    """Yield every check that is left out, with the reason that the backend declares."""
    for op, dtype, kind, reason in everything(subject):
        if reason is not None:
            yield Skip(subject.name, op, dtype, kind, reason)
    for n in sorted({sizes.n for sizes in SIZES}):
        reason = subject.spec.refuses(subject.spec.ops[0], (), n)
        if reason is not None:
            yield Skip(subject.name, "all", "all", f"n={n}", reason)


def comparisons(
    subject: Subject, op: str, dtype: str, kind: str, seed: int = 0
) -> Iterator[Comparison]:
    """Yield a check's comparisons as they are made; an exception becomes the last, failed one."""
    subject.trying = op
    try:
        with without_proofs(), subject.dtype_context(dtype):
            yield from CHECKS[kind](subject, op, dtype, seed)
    except (Exception, SystemExit) as error:  # whatever a backend does, the report goes on
        raised = f"raised {type(error).__name__}: {error}"
        yield Comparison(subject.trying, math.nan, math.nan, raised)


def check(subject: Subject, op: str, dtype: str, kind: str, seed: int = 0) -> Record:
    """Run one check and keep the worst of its comparisons."""
    found = list(comparisons(subject, op, dtype, kind, seed))
    if found and found[-1].problem:  # where it raised, nothing else is said
        found = found[-1:]
    if not found:
        found = [Comparison(op, math.nan, math.nan, f"has no case with {subject.spec.sizes=}")]
    worst = max(found, key=lambda comparison: comparison.badness)
    return Record(
        backend=subject.name,
        op=op,
        dtype=dtype,
        kind=kind,
        error=worst.error,
        tolerance=worst.tolerance,
        passed=worst.passed,
        cases=len(found),
        seed=seed,
        detail="" if worst.passed else _detail(subject, op, dtype, kind, seed, worst),
    )


def _detail(subject: Subject, op: str, dtype: str, kind: str, seed: int, worst: Comparison) -> str:
    again = f"mhc conformance {subject.name} --op {op} --dtype {dtype} --kind {kind} --seed {seed}"
    return f"{op} {kind} {dtype} on {subject.name}: {worst.says}. Again: {again}"
