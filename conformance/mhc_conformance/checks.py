"""The checks: each holds one op of one backend, in one dtype, against the float64 oracle.

A check yields comparisons, result by result; a record keeps the worst of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance.cases import NARROW, SIZES, Case, cases, declaration
from mhc_conformance.properties import hold, lacks
from mhc_conformance.records import Comparison, Record, Skip
from mhc_conformance.subject import Subject, several
from mhc_conformance.telling import SECOND
from mhc_conformance.trials import Trial, ordinary, trials
from mhc_core.backend import DTYPES
from mhc_core.math import OPS
from mhc_core.selection import without_proofs

__all__ = [
    "CHECKS",
    "applies",
    "check",
    "comparisons",
    "dtypes_of",
    "everything",
    "grid",
    "skips",
]

Array = NDArray[Any]


def forward(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check every case's outputs: values, shapes and dtypes."""
    for trial in trials(subject, op, dtype, seed):
        yield from trial.forward(trial.outputs())


def gradient(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check every case's gradients through mhc_core.vjp."""
    for trial in trials(subject, op, dtype, seed):
        yield from trial.gradients(trial.pulled())


def grad(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check gradients through the library's own autodiff: of one case, or of all with --full."""
    for trial in itertools.islice(trials(subject, op, dtype, seed), None if subject.full else 1):
        own = subject.take(trial.primals)
        function = subject.transform("grad")(trial.loss(trial.function), range(len(own)))
        whole = subject.composed(function) if dtype in NARROW else function  # in one dtype each
        yield from trial.gradients(whole(*own))


def compile(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check the forward, and the gradient where there is one, inside the library's compiler.

    The case is one of few iterations: a compiler that unrolls them all takes half a minute for 20.
    """
    trial = ordinary(subject, op, dtype, seed)
    short = next((case for case in SECOND if case.op == op and subject.accepts(case)), None)
    if short is not None:
        subject.trying, trial = short.name, Trial(subject, short, dtype, seed)
    yield from _both(
        trial, trial.function, subject.lacks("grad") is None, subject.transform("compile")
    )


def vmap(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check forward and gradient, mapped over the first leading axis of arrays that have one."""
    trial = ordinary(subject, op, dtype, seed)
    declared = declaration(op)
    axes = [
        0 if _has_leading(declared, name, a) else None
        for name, a in zip(trial.case.names, trial.primals, strict=True)
    ]
    mapped = subject.transform("vmap")(trial.function, axes)
    yield from _both(trial, mapped, subject.lacks("grad") is None)


def _both(
    trial: Trial,
    function: Callable[..., Any],
    differentiates: bool,
    run: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Iterator[Comparison]:
    """Compare a function's outputs and, where there are any, its gradients, run as one function."""
    subject, own = trial.subject, trial.subject.take(trial.primals)
    grad = None
    if differentiates:
        grad = subject.transform("grad")(trial.loss(function), range(len(own)))

    def both(*arrays: Any) -> Any:
        return several(function(*arrays)), grad(*arrays) if grad else ()

    outputs, gradients = (run or subject.composed)(both)(*own)
    yield from trial.forward(outputs)
    if differentiates:
        yield from trial.gradients(gradients)


def _has_leading(op: Any, name: str, array: Array) -> bool:
    words = op.patterns[name][0]
    return words[0] == "..." and array.ndim >= len(words)


def checkpoint(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check forward and gradient when the backward recomputes the forward."""
    trial = ordinary(subject, op, dtype, seed)
    yield from _both(trial, subject.transform("checkpoint")(trial.function), True)


def second(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check Hessian-vector products, reverse over reverse, against differences of oracle gradients.

    A backend that declares not to have them must raise, and name the op and the remedy.
    """
    for case in [case for case in SECOND if case.op == op]:
        if subject.accepts(case):
            subject.trying = case.name
            yield from Trial(subject, case, dtype, seed).second()


def strided(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check inputs that are views: with gaps, or contiguous but starting at an odd element.

    The latter begin where no vector load may: first all inputs do, and then each of them alone,
    since a kernel that checks one address may forget another.
    """
    trial = ordinary(subject, op, dtype, seed)
    gapped = [
        tuple(a[..., ::2] for a in subject.take([np.repeat(a, 2, -1) for a in arrays]))
        for arrays in (trial.primals, trial.cotangents)
    ]
    yield from trial.called("every second number", *gapped)
    whole_blocks = [t for t in trials(subject, op, dtype, seed) if _in_blocks(t.case)]
    unmixed = (t for t in whole_blocks if not t.case.mixes)
    mixed = (t for t in whole_blocks if t.case.mixes)
    for one in (trial, *itertools.islice(mixed, 1), *itertools.islice(unmixed, 1)):
        subject.trying = one.case.name
        count = len(one.primals)
        both = (*one.primals, *one.cotangents)
        views, arrays = [_odd_view(subject, a) for a in both], subject.take(both)
        for chosen in (range(len(both)), *((at,) for at in range(len(both)))):
            given = [views[at] if at in chosen else arrays[at] for at in range(len(both))]
            what = "all" if len(chosen) > 1 else f"number {chosen[0]}"
            yield from one.called(
                f"{what} from an odd number on", tuple(given[:count]), tuple(given[count:])
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
    every = list(trials(subject, op, dtype, seed))
    unmixed = [one for one in every[2:] if not one.case.mixes]
    for trial in every[:1] if subject.deals else (*every[:2], *unmixed[:1]):
        subject.trying = trial.case.name
        own, cotangents = subject.take(trial.primals), subject.take(trial.cotangents)
        with mhc_core.no_grad():  # where backends may leave out what only a gradient needs
            yield from trial.forward(trial.function(*own))
        runs = [
            [
                *subject.give(trial.function(*own)),
                *subject.give(subject.vjp(trial.case, own, cotangents)),
            ]
            for _ in range(2)
        ]
        for first, second in zip(*runs, strict=True):
            same = first.tobytes() == second.tobytes()
            problem = "" if same else "differs between two runs on the same input"
            yield Comparison(trial.case.name, 0.0, 0.0, problem)


def host(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check NumPy inputs on a backend chosen by name: it accepts them and returns its own."""
    trial = ordinary(subject, op, dtype, seed)
    outputs = trial.function(*trial.primals)
    own = cast("type[object]", type(subject.take(trial.primals[:1])[0]))
    for output in several(outputs):
        if type(output) is not own:
            problem = f"gave a {type(output).__name__}; needs the backend's own {own.__name__}"
            yield Comparison(trial.case.name, math.nan, 0.0, problem)
    yield from trial.forward(outputs)
    gradients = subject.vjp(trial.case, trial.primals, trial.cotangents)
    yield from trial.gradients(gradients)


def updated(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Check overwriting inputs between two calls: the second sees new values, old results stay.

    Where arrays cannot be written to, others of the same kind take their place.
    """
    trial = ordinary(subject, op, dtype, seed)
    before = replace(trial, seed=seed + 1)
    given = (before.primals, before.cotangents)
    own = [subject.take([np.array(array) for array in both]) for both in given]

    def call(primals: Any, cotangents: Any) -> tuple[Any, tuple[Any, ...]]:
        return trial.function(*primals), subject.vjp(trial.case, primals, cotangents)

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
ONE_DTYPE = "float32"  # for checks of structure, which do not depend on rounding


def dtypes_of(kind: str, dtypes: Sequence[str]) -> list[str]:
    """Return the backend's dtypes in which a check runs."""
    one = ONE_DTYPE if ONE_DTYPE in dtypes else dtypes[0]
    made = {
        "forward": dtypes,
        "gradient": dtypes,
        "grad": (one, "bfloat16"),
        "strided": (one, "bfloat16"),  # vectors of narrow numbers have another length
        "properties": ("float64",) if "float64" in dtypes else (one,),  # with the least rounding
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
    if kind == "second":  # without second derivatives, it checks the error
        return None
    if kind == "properties":
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
    for mixer in sorted({mixer for op in OPS for case in cases(op) for mixer in case.mixers}):
        reason = subject.spec.refuses(subject.spec.ops[0], (), None, (mixer,))
        if reason is not None:
            yield Skip(subject.name, "all", "all", f"mixer={mixer}", reason)


def comparisons(
    subject: Subject, op: str, dtype: str, kind: str, seed: int = 0
) -> Iterator[Comparison]:
    """Yield a check's comparisons as they are made; an exception becomes the last, failed one."""
    subject.trying = op
    try:
        with without_proofs(), subject.dtype_context(dtype):
            yield from CHECKS[kind](subject, op, dtype, seed)
    except (Exception, SystemExit) as error:  # whatever a backend does, the run continues
        raised = f"raised {type(error).__name__}: {error}"
        yield Comparison(subject.trying, math.nan, math.nan, raised)


def check(subject: Subject, op: str, dtype: str, kind: str, seed: int = 0) -> Record:
    """Run one check and keep the worst of its comparisons."""
    found = list(comparisons(subject, op, dtype, kind, seed))
    if found and found[-1].problem:  # an exception is reported alone
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
    command = (
        f"mhc conformance {subject.name} --op {op} --dtype {dtype} --kind {kind} --seed {seed}"
    )
    return f"{op} {kind} {dtype} on {subject.name}: {worst.says}. Reproduce: {command}"
