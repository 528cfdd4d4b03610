"""Names the bug of an implementation, by trying known bugs on the oracle until one matches.

A suspect is a wrong oracle: one with another constant, or with one of its functions replaced. It is
named if its answers are those of the implementation in every case, in the cases that fail and in
those that hold, as near as the right answers would have to be. So a bug is not named because it is
likely, and of two bugs that would both fail a case the other cases decide.

The constants of all static arguments are tried, and the bugs of :mod:`mhc_conformance.bugs`;
here are those bugs whose gradients the oracle's tape can take, and those of gradients alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mhc_conformance import oracle
from mhc_conformance.autodiff import (
    Value,
    concatenate,
    exp,
    largest,
    maximum,
    node,
    straight_through,
    total,
    value,
    where,
)
from mhc_conformance.bugs import BUGS, Bug
from mhc_conformance.cases import NARROW, numpy_dtype
from mhc_conformance.generated import CONSTANTS, get, paths, put
from mhc_conformance.golden import Golden, Want
from mhc_conformance.subject import several
from mhc_conformance.tolerances import Quantity, eps

__all__ = ["PATCHES", "Observed", "Suspect", "name_bug", "suspects"]

Array = NDArray[Any]
Static = dict[str, Any]
Replaced = Callable[[Callable[..., Any]], Callable[..., Any]]
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
    """A wrong oracle: a bug's name, what it is, and the answers of one that has it."""

    name: str
    what: str
    answer: Answer


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
            answers = suspect.answer(one.golden, one.quantity)
        except (ValueError, IndexError, TypeError, FloatingPointError, np.linalg.LinAlgError):
            return False  # a wrong formula need not fit every case
    if answers is None or len(answers) != len(one.got):
        return False
    for want, got, answer in zip(one.wants, one.got, answers, strict=True):
        if got.shape != want.value.shape or answer.shape != got.shape:
            return False
        apart, right = _error(got, answer), want.error(got)
        limit = max(want.limit, _rounding(got))
        if not apart <= limit or (right > want.limit and not apart <= right / 3):
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

PATCHES: list[tuple[str, str, str, Replaced, str]] = []
"""Bugs by the oracle's function that they replace: name, what, function, replacement, which."""

Which = Literal["both", "backward"]


def patch(name: str, what: str, function: str, which: Which = "both") -> Callable[[Any], Any]:
    """Register a replacement of one of the oracle's functions; it gets the right one."""

    def register(replacement: Replaced) -> Replaced:
        PATCHES.append((name, what, function, replacement, which))
        return replacement

    return register


def _patched(one: Golden, backward: bool) -> Iterator[Suspect]:
    used = _reaches(one.case.op)
    for name, what, function, replacement, which in PATCHES:
        if function in used and (which == "both" or backward):
            says = what + " (in the backward)" * (backward and which == "both")
            yield Suspect(name, says, _with_patch(function, replacement))


def _reaches(op: str) -> set[str]:
    """Return the oracle's functions that an op calls, directly or not."""
    found: set[str] = set()
    left = [op]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        function = getattr(oracle, name, None)
        code = getattr(function, "__code__", None)
        if code is not None and inspect.getmodule(function) is oracle:
            left += code.co_names
    return found


@contextlib.contextmanager
def _replaced(function: str, replacement: Replaced) -> Generator[None]:
    right = getattr(oracle, function)
    wrong = replacement(right)
    setattr(oracle, function, wrong)
    if function in oracle.OPS:
        oracle.OPS[function] = wrong
    try:
        yield
    finally:
        setattr(oracle, function, right)
        if function in oracle.OPS:
            oracle.OPS[function] = right


def _with_patch(function: str, replacement: Replaced) -> Answer:
    def answer(one: Golden, quantity: Quantity) -> Sequence[Array]:
        def dressed(right: Callable[..., Any]) -> Callable[..., Any]:
            wrong = replacement(right)
            # the oracle reads the names of an op's arrays from its function
            wrong.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
            return wrong

        with _replaced(function, dressed):
            return _right(one, quantity, one.case.asked)

    return answer


def _as(dtype: str, array: Value) -> Value:
    """Round a value to a dtype; the gradient passes."""
    narrow = array.data.astype(numpy_dtype(dtype)).astype(np.float64)
    return straight_through(array, narrow)


def _stopped(array: Value) -> Value:
    """Return a value without a gradient."""
    return value(array.data)


def _axes(first: str) -> tuple[int, int]:
    return (-2, -1) if first == "columns" else (-1, -2)


# --- Sinkhorn ---------------------------------------------------------------------------------


@patch("extra-pass", "an extra normalising pass at the end", "sinkhorn")
def _extra_pass(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = right(logits, iterations, eps, first)
        return matrix / (total(matrix, _axes(first)[0]) + eps)

    return sinkhorn


@patch("missing-pass", "the last normalising pass is missing", "sinkhorn")
def _missing_pass(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = _axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a) + eps
        for axis in (b, a) * (iterations - 1):
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("exp-for-softmax", "exp where softmax + eps belongs", "sinkhorn")
def _exp_start(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = _axes(first)
        matrix = exp(logits - largest(logits, a))
        for axis in (a, b) * iterations:
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("no-start-eps", "no eps is added to the softmax that starts Sinkhorn", "sinkhorn")
def _plain_start(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = _axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a)
        for axis in (b, *(a, b) * (iterations - 1)):
            matrix = matrix / (total(matrix, axis) + eps)
        return matrix

    return sinkhorn


@patch("no-divisor-eps", "eps is added to the softmax alone, not to the divisors", "sinkhorn")
def _start_alone(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        a, b = _axes(first)
        matrix = exp(logits - largest(logits, a))
        matrix = matrix / total(matrix, a) + eps
        for axis in (b, *(a, b) * (iterations - 1)):
            matrix = matrix / total(matrix, axis)
        return matrix

    return sinkhorn


def _floored(floor: float) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            matrix = exp(logits - largest(logits, _axes(first)[0]))
            for axis in _axes(first) * iterations:
                matrix = matrix / maximum(total(matrix, axis), floor)
            return matrix

        return sinkhorn

    return replacement


for _floor in (1e-12, 1e-10, 1e-8, 1e-6, 1e-5):
    patch(
        "sums-floored",
        f"a line's sum is raised to {_floor:g}, where the log domain has no floor",
        "sinkhorn",
    )(_floored(_floor))


def _masked(floor: float) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            a, b = _axes(first)
            matrix = exp(logits - largest(logits, a))
            for _ in range(iterations):
                for axis, otherwise in ((a, 1.0), (b, 0.0)):
                    sums = total(matrix, axis)
                    there = sums.data > floor
                    safe = where(there, sums, value(np.ones_like(sums.data)))
                    matrix = matrix * where(there, 1.0 / safe, value(otherwise + 0 * sums.data))
            return matrix

        return sinkhorn

    return replacement


def _masked_unsafely(floor: float) -> Replaced:
    """Return the masked Sinkhorn whose gradient is 0 * inf where a line is 0."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        masked = _masked(floor)(right)

        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            made = masked(logits, iterations, eps, first)
            a, _ = _axes(first)
            shifted = np.float32(logits.data - logits.data.max(a, keepdims=True))
            columns = np.exp(shifted).sum(-1 if a == -2 else -2, keepdims=True)
            unsafe = (columns == 0).any(axis=(-1, -2), keepdims=True)
            lost = np.where(unsafe, np.nan, 1.0)
            return node("where", made.data, (made,), lambda g: (np.asarray(g) * lost,))

        return sinkhorn

    return replacement


for _floor in (1e-5, 1e-6, 0.1):
    patch(
        "faint-lines-masked",
        f"first lines that sum to {_floor:g} or less stay as they are, and second ones become 0",
        "sinkhorn",
    )(_masked(_floor))
    patch(
        "nan-where-masked",
        f"where(sum > {_floor:g}, 1 / sum, ...) has a NaN gradient where a line is 0",
        "sinkhorn",
    )(_masked_unsafely(_floor))


@patch("stops-early", "Sinkhorn stops once both errors are under 1e-6", "sinkhorn")
def _stops(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        turned = logits if first == "rows" else logits.swapaxes(-1, -2)
        matrix = oracle.sinkhorn_knopp(turned, iterations, 1e-6)
        return matrix if first == "rows" else matrix.swapaxes(-1, -2)

    return sinkhorn


def _iterated_in(dtype: str) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
            a, b = _axes(first)
            matrix = exp(logits - largest(logits, a))
            matrix = _as(dtype, matrix / total(matrix, a) + eps)
            for axis in (b, *(a, b) * (iterations - 1)):
                matrix = _as(dtype, matrix / _as(dtype, total(matrix, axis) + eps))
            return matrix

        return sinkhorn

    return replacement


for _dtype in NARROW:
    patch(f"sinkhorn-in-{_dtype}", f"Sinkhorn run in {_dtype}", "sinkhorn")(_iterated_in(_dtype))


@patch("h-res-transposed", "H_res comes out transposed", "sinkhorn")
def _turned(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        return right(logits, iterations, eps, first).swapaxes(-1, -2)

    return sinkhorn


@patch("softmax-for-sinkhorn", "one softmax in place of Sinkhorn", "sinkhorn")
def _softmax(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = exp(logits - largest(logits, -1))
        return matrix / total(matrix, -1)

    return sinkhorn


@patch(
    "final-matrix-backward",
    "a Sinkhorn backward that uses the final matrix for every iteration",
    "sinkhorn",
    "backward",
)
def _final_matrix(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        matrix = right(logits, iterations, eps, first).data
        a, b = _axes(first)

        def pull(g: Array) -> tuple[Array]:
            carried = matrix * g
            for axis in (b, a) * iterations:
                carried = carried - matrix * carried.sum(axis=axis, keepdims=True)
            return (carried,)

        return node("sinkhorn", matrix, (logits,), pull)

    return sinkhorn


@patch("no-gradient-of-h-res", "no gradient passes through H_res", "sinkhorn", "backward")
def _constant_h_res(right: Callable[..., Value]) -> Callable[..., Value]:
    def sinkhorn(logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"):
        return _stopped(right(logits, iterations, eps, first))

    return sinkhorn


# --- the projection ---------------------------------------------------------------------------


def _normed(x: Value, phi: Value, variant: Any) -> tuple[Value, Value, Value]:
    """Return the streams as rows, what phi makes of them, and their root mean square."""
    tokens, size = int(np.prod(x.shape[:-2])), x.shape[-2] * x.shape[-1]
    vec = x.reshape(tokens, size)
    root = (total(vec * vec, -1) / size + variant.norm_eps) ** 0.5 + variant.norm_root_eps
    return vec, vec @ phi.swapaxes(0, 1), root


@patch("rms-over-c", "RMS over C instead of nC", "project")
def _over_c(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        n, C = x.shape[-2:]
        root = (total(x * x, -1) / C + variant.norm_eps) ** 0.5
        vec = (x / root).reshape(int(np.prod(x.shape[:-2])), n * C)
        return (vec @ phi.swapaxes(0, 1)).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("phi-columns", "columns of phi in the wrong order", "project")
def _columns(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        n, C = x.shape[-2:]
        swapped = phi.reshape(phi.shape[0], n, C).swapaxes(1, 2).reshape(*phi.shape)
        return right(x, swapped, variant)

    return project


@patch("eps-on-the-root", "norm_eps is added to the root, not under it", "project")
def _on_root(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        vec, made, _ = _normed(x, phi, variant)
        root = (total(vec * vec, -1) / vec.shape[-1]) ** 0.5 + variant.norm_eps
        return (made / root).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("sum-for-mean", "the sum of squares in place of their mean", "project")
def _sum_of_squares(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        vec, made, _ = _normed(x, phi, variant)
        root = (total(vec * vec, -1) + variant.norm_eps) ** 0.5
        return (made / root).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("no-norm", "phi is applied to streams that are not normalised", "project")
def _unnormed(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        return _normed(x, phi, variant)[1].reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("no-gradient-of-norm", "no gradient passes through the norm", "project", "backward")
def _constant_norm(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        _, made, root = _normed(x, phi, variant)
        return (made / _stopped(root)).reshape(*x.shape[:-2], phi.shape[0])

    return project


def _product_in(dtype: str, round_normed: bool) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def project(x: Value, phi: Value, variant: Any) -> Value:
            vec, _, root = _normed(x, phi, variant)
            left = _as(dtype, vec / root) if round_normed else _as(dtype, vec) / root
            made = left @ _as(dtype, phi).swapaxes(0, 1)
            made = _as(dtype, made) if round_normed else made
            return made.reshape(*x.shape[:-2], phi.shape[0])

        return project

    return replacement


for _dtype in NARROW:
    patch(
        f"projection-in-{_dtype}",
        f"normalised streams, phi and their product are rounded to {_dtype}",
        "project",
    )(_product_in(_dtype, round_normed=True))


@patch("projection-in-tf32", "phi's product in TF32", "project")
def _tf32(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        vec, _, root = _normed(x, phi, variant)
        made = _in_tf32(vec) @ _in_tf32(phi).swapaxes(0, 1)
        return (made / root).reshape(*x.shape[:-2], phi.shape[0])

    return project


def _in_tf32(array: Value) -> Value:
    bits = array.data.astype(np.float32).view(np.int32)
    nearest = ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(np.float32)
    return straight_through(array, nearest.astype(np.float64))


# --- mappings ---------------------------------------------------------------------------------


def _changed(which: int, change: Callable[[Value], Value]) -> Replaced:
    """Return mappings with one of its three outputs changed."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def mappings(x: Value, phi: Value, scale: Value, bias: Value, variant: Any) -> Any:
            made = list(right(x, phi, scale, bias, variant))
            if made[which] is not None:
                made[which] = change(made[which])
            return tuple(made)

        return mappings

    return replacement


def _half(h: Value) -> Value:
    return h / 2.0


def _transposed(h: Value) -> Value:
    return h.swapaxes(-1, -2)


patch("no-post-scale", "H_post is half of what it should be", "mappings")(_changed(1, _half))
patch("h-res-transposed", "H_res comes out transposed", "mappings")(_changed(2, _transposed))
for _dtype in NARROW:
    for _which, _name in enumerate(("H_pre", "H_post", "H_res")):
        patch("mappings-rounded", f"{_name} rounded to {_dtype}", "mappings")(
            _changed(_which, lambda h, dtype=_dtype: _as(dtype, h))
        )
for _which, _name in enumerate(("H_pre", "H_post", "H_res")):
    patch(
        f"no-gradient-of-{_name.lower().replace('_', '-')}",
        f"no gradient passes through {_name}",
        "mappings",
        "backward",
    )(_changed(_which, _stopped))


def _given(change: Callable[[int, Value, Value, int], tuple[Value, Value]]) -> Replaced:
    """Return mappings that get another scale or bias."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def mappings(x: Value, phi: Value, scale: Value, bias: Value, variant: Any) -> Any:
            n = x.shape[-2]
            scale, bias = change(n, scale, bias, bias.shape[0])
            return right(x, phi, scale, bias, variant)

        return mappings

    return replacement


def _scale_at(index: int, instead: int) -> Callable[[int, Value, Value, int], tuple[Value, Value]]:
    def change(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
        order = list(range(scale.shape[0]))
        order[index] = instead
        return concatenate([scale[at : at + 1] for at in order], 0), bias

    return change


for _index, _instead in ((1, 0), (0, 1), (2, 1), (2, 0), (1, 2)):
    _group = ("pre", "post", "res")
    patch(
        "wrong-scale",
        f"the scale of {_group[_instead]} is used for {_group[_index]}",
        "mappings",
    )(_given(_scale_at(_index, _instead)))


def _no_bias(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
    return scale, bias * np.where(np.arange(m) < 2 * n, 1.0, 0.0)


def _no_bias_at_all(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
    return scale, bias * 0.0


patch("no-bias", "no bias in the logits of H_res", "mappings")(_given(_no_bias))
patch("no-bias", "no bias", "mappings")(_given(_no_bias_at_all))


# --- streams ----------------------------------------------------------------------------------


@patch("h-res-transposed", "H_res is applied transposed", "combine")
def _other_way(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return right(x, y, h_post, None if h_res is None else h_res.swapaxes(-1, -2))

    return combine


@patch("h-res-ignored", "the streams are not mixed", "combine")
def _unmixed(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return x + h_post[..., None] * y[..., None, :]

    return combine


@patch("no-residual", "the streams are left out", "combine")
def _no_streams(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return h_post[..., None] * y[..., None, :] + 0.0 * x

    return combine


@patch("h-post-ignored", "the layer's output is added without H_post", "combine")
def _no_post(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return right(x, y, h_post * 0.0 + 1.0, h_res)

    return combine


def _combined_in(dtype: str) -> Replaced:
    """Return combine whose mappings, products and sum are rounded, as are its gradients."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def rounded(array: Value) -> Value:
            return _both_ways(dtype, array)

        def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
            added = rounded(rounded(h_post)[..., None] * y[..., None, :])
            return (x if h_res is None else rounded(rounded(h_res) @ x)) + added

        return combine

    return replacement


def _both_ways(dtype: str, array: Value) -> Value:
    """Round a value to a dtype, and its gradient too, as a cast in the library does."""

    def narrow(data: Array) -> Array:
        return data.astype(numpy_dtype(dtype)).astype(np.float64)

    return node("cast", narrow(array.data), (array,), lambda g: (narrow(np.asarray(g)),))


for _dtype in NARROW:
    patch(
        "mappings-narrow",
        f"H_post, H_res and each product are rounded to {_dtype}",
        "combine",
    )(_combined_in(_dtype))


@patch("mean-for-sum", "the mean over the streams in place of their sum", "aggregate")
def _mean(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, h_pre) / x.shape[-2]

    return aggregate


@patch(
    "no-gradient-of-h-pre",
    "no gradient passes through H_pre to the mappings",
    "aggregate",
    "backward",
)
def _constant_h_pre(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, _stopped(h_pre))

    return aggregate


def _collapsed_in(dtype: str) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def aggregate(x: Value, h_pre: Value) -> Value:
            h_pre = _both_ways(dtype, h_pre)
            made: Value | None = None
            for stream in range(x.shape[-2]):
                part = _as(dtype, h_pre[..., stream, None] * x[..., stream, :])
                made = part if made is None else _as(dtype, made + part)
            assert made is not None
            return made

        return aggregate

    return replacement


for _dtype in NARROW:
    patch("aggregate-narrow", f"H_pre and each product are rounded to {_dtype}", "aggregate")(
        _collapsed_in(_dtype)
    )


# --- norms and gates --------------------------------------------------------------------------


@patch("no-norm-weight", "the weight of the norm is left out", "rms_norm")
def _no_weight(right: Callable[..., Value]) -> Callable[..., Value]:
    def rms_norm(x: Value, weight: Value, eps: float) -> Value:
        return right(x, weight * 0.0 + 1.0, eps)

    return rms_norm


@patch("eps-on-the-root", "eps is added to the root, not under it", "rms_norm")
def _norm_on_root(right: Callable[..., Value]) -> Callable[..., Value]:
    def rms_norm(x: Value, weight: Value, eps: float) -> Value:
        return x / ((total(x * x, -1) / x.shape[-1]) ** 0.5 + eps) * weight

    return rms_norm


@patch("sum-for-mean", "the sum over the streams in place of their mean", "gated")
def _gates_summed(right: Callable[..., Any]) -> Callable[..., Any]:
    def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Any:
        h, u = right(x, norm, down, up, eps)
        return h * float(x.shape[-2]), u

    return gated


@patch("weight-not-shifted", "the norm's weight is used without the 1 that is added", "gated")
def _unshifted(right: Callable[..., Any]) -> Callable[..., Any]:
    def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Any:
        return right(x, norm - 1.0, down, up, eps)

    return gated
