"""Mutants: wrong backends made from the ops' declarations, each wrong in one argument.

For every static argument of every op, fields of a Variant included, and separately for forward and
vjp: the argument is replaced by a constant, swapped with another one, capped, floored, or right for
published values only. For every array: one with an entry per token is read as if all tokens shared
the first entry, and one that all tokens share is read as if each token had its own.

The kit must fail every mutant. A mutant that computes the same as the right backend for every input
is equivalent: it is in ``EQUIVALENT``, with the proof, and the kit must pass it.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any

import numpy as np

import mhc_core
from mhc_conformance.bugs import Bug, present, right, right_vjp
from mhc_conformance.cases import H_NORMED, MIXED, Case, accepted, cases, declaration
from mhc_conformance.checks import comparisons
from mhc_conformance.subject import Subject, several
from mhc_core import Variant
from mhc_core.backend import DTYPES
from mhc_core.math import OPS
from mhc_core.variants import check_variant

__all__ = ["EQUIVALENT", "MUTANTS", "Found", "Mutant", "named", "run_mutant"]

Path = tuple[str, ...]  # ("eps",), or ("variant", "norm_eps")
Static = dict[str, Any]
Change = Callable[[Any, Static], Any]  # of a value, among all static arguments of a call

SHAPING = ("mixer", "mixer_options")
"""The fields of a Variant that decide shapes, so that another value is an error and no mutant."""

FORWARD, VJP = "forward", "vjp"
CHECK_OF_HALF = {FORWARD: "forward", VJP: "gradient"}


# --- static arguments -------------------------------------------------------------------------


def paths(op: str) -> Iterator[Path]:
    """Return every static argument of an op, and the fields of those that are variants."""
    for name, check in declaration(op).static.items():
        if check is check_variant:
            yield from (
                (name, field.name) for field in fields(Variant) if field.name not in SHAPING
            )
        yield (name,)


def get(static: Static, path: Path) -> Any:
    """Return the value of a static argument, or of a field of one."""
    value = static[path[0]]
    return value if len(path) == 1 else getattr(value, path[1])


def put(static: Static, path: Path, value: Any) -> Static:
    """Return the static arguments with one of them changed."""
    changed = value if len(path) == 1 else replace(static[path[0]], **{path[1]: value})
    return {**static, path[0]: changed}


@cache
def published(op: str, path: Path) -> tuple[Any, ...]:
    """Return the published values of an argument: its default, and those of the variants."""
    variants = [v for v in vars(mhc_core).values() if isinstance(v, Variant)]
    if path == ("variant",):
        return tuple(variants)
    if len(path) == 2:
        found = [getattr(variant, path[1]) for variant in variants]
    else:
        default = inspect.signature(getattr(mhc_core, op)).parameters[path[0]].default
        found = [default] if default is not inspect.Parameter.empty else [_tried(op, path)[0]]
        found += [getattr(v, f"{op}_{path[0]}") for v in variants if hasattr(v, f"{op}_{path[0]}")]
    return tuple(dict.fromkeys(found))


def _tried(op: str, path: Path) -> list[Any]:
    """Return the values that an argument has in the kit's cases."""
    every = (case for dtype in DTYPES for case in cases(op, dtype))
    return list(dict.fromkeys(get(case.options, path) for case in every))


def _takes(op: str, path: Path, value: Any) -> bool:
    """Return whether the check of an argument, or of a variant's field, accepts a value."""
    if len(path) == 1:
        return bool(accepted(op, path[0], [value]))
    try:
        Variant(**{path[1]: value})
    except (TypeError, ValueError):
        return False
    return True


def _always(value: Any) -> Change:
    return lambda _, __: value


def _capped(at: Any) -> Change:
    return lambda value, _: min(value, at)


def _floored(at: Any) -> Change:
    return lambda value, _: max(value, at)


def _from(path: Path) -> Change:
    return lambda _, static: get(static, path)


def _instead(of: Any, given: Any) -> Change:
    return lambda value, _: given if value == of else value


def _small_is(given: float) -> Change:
    return lambda value, _: given if 0 < value < 1e-3 else value


def _nearest(values: Sequence[Any]) -> Change:
    """Return the published value nearest to a value that is not published."""
    return lambda value, _: min(values, key=lambda one: _distance(one, value))


def _distance(one: Any, other: Any) -> float:
    if isinstance(one, Variant):
        pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Variant)]
        return sum(a != b for a, b in pairs)
    return abs(one - other) if isinstance(one, (int, float)) else float(one != other)


CONSTANTS = (0.0, 1e-5, 1e-3, 0.1)  # hard-coded in implementations of the field
COUNTS = (1, 3, 32, 100)


def _of_a_number(op: str, path: Path, values: Sequence[float]) -> Iterator[tuple[str, Change]]:
    takes = partial(_takes, op, path)
    for value in filter(takes, dict.fromkeys((*values, *CONSTANTS))):
        yield f"always {value:g}", _always(value)
        if takes(math.nextafter(value, -math.inf)) and takes(math.nextafter(value, math.inf)):
            yield f"at least {value:g}", _floored(value)
            yield f"at most {value:g}", _capped(value)
        if value and takes(0.0):
            yield f"{value:g} for 0", _instead(0.0, value)
        if 0 < value < 1e-3:
            yield f"{value:g} for any below 1e-3", _small_is(value)
    for other in paths(op):
        if other != path and _category(op, other) == "number":
            yield f"{other[-1]}'s value", _from(other)


def _of_a_count(op: str, path: Path, values: Sequence[int]) -> Iterator[tuple[str, Change]]:
    takes = partial(_takes, op, path)
    for value in filter(takes, dict.fromkeys((*values, *COUNTS))):
        yield f"always {value}", _always(value)
        if takes(value - 1):
            yield f"at least {value}", _floored(value)
        if takes(value + 1):
            yield f"at most {value}", _capped(value)
    yield "one more", lambda value, _: value + 1
    yield "one less, if above 1", lambda value, _: max(1, value - 1)
    for other in paths(op):
        if other != path and _category(op, other) == "count":
            yield f"{other[-1]}'s value", _from(other)


def _of_a_choice(op: str, path: Path, _: Sequence[Any]) -> Iterator[tuple[str, Change]]:
    every = _tried(op, path)
    for value in every:
        yield f"always {value}", _always(value)
    following = dict(zip(every, (*every[1:], every[0]), strict=True))
    yield "another choice", lambda value, _: following[value]


def _of_bounds(*given: Any) -> Iterator[tuple[str, Change]]:
    low, high = next(value for value in given[2] if value is not None)
    yield "always None", _always(None)
    yield f"always {low:g} to {high:g}", _always((low, high))
    yield f"{low:g} to {high:g} for None", _instead(None, (low, high))
    yield "without the lower bound", lambda value, _: value and (-1e30, value[1])
    yield "without the upper bound", lambda value, _: value and (value[0], 1e30)
    yield "the bounds of the negative", lambda value, _: value and (-value[1], -value[0])


def _of_a_variant(*_: Any) -> Iterator[tuple[str, Change]]:
    return iter(())


CHANGES: Mapping[str, Callable[..., Iterator[tuple[str, Change]]]] = {
    "number": _of_a_number,
    "count": _of_a_count,
    "choice": _of_a_choice,
    "bounds": _of_bounds,
    "variant": _of_a_variant,  # its fields have mutants of their own
}


def _category(op: str, path: Path) -> str:
    """Return a static argument's key in ``CHANGES``, by the type of its published values."""
    values = published(op, path)
    one = values[0]
    if any(isinstance(value, tuple) for value in values):
        return "bounds"
    if isinstance(one, Variant):
        return "variant"
    if isinstance(one, (bool, str)):
        return "choice"
    return "count" if isinstance(one, int) else "number"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One half of an op, forward or vjp, with one argument replaced.

    Attributes
    ----------
    op
        The op that is wrong.
    argument
        The argument that is replaced.
    what
        What replaces it.
    half
        ``"forward"`` or ``"vjp"``.
    tells
        Whether a case can reveal it; on other cases the mutant calls the op unchanged.
    wrong
        The wrong forward, or the wrong vjp, with the op's name ahead of its arguments.
    """

    op: str
    argument: str
    what: str
    half: str
    tells: Callable[[Case], bool]
    wrong: Callable[..., Any]

    @property
    def name(self) -> str:
        """Return the name that users write after ``bug:``."""
        words = f"{self.op} {self.half} {self.argument} {self.what}"
        return "-".join("".join(c if c.isalnum() or c in "._-" else " " for c in words).split())

    @property
    def proof(self) -> str:
        """Return the proof that the mutant is equivalent to the right backend, or ""."""
        one = (self.op, self.argument, self.half)
        return EQUIVALENT.get(one) or EQUIVALENT.get((*one, self.what), "")


def _of_static_arguments(op: str) -> Iterator[Mutant]:
    for path, half in itertools.product(paths(op), CHECK_OF_HALF):
        values = published(op, path)
        changes = list(CHANGES[_category(op, path)](op, path, values))
        if _category(op, path) != "choice":
            changes.append(("right for published values alone", _nearest(values)))
        for what, any_change in changes:
            change = _where_accepted(op, path, any_change)
            yield Mutant(
                op=op,
                argument=".".join(path),
                what=what,
                half=half,
                tells=_shown_by(path, change),
                wrong=_with_static(half, path, change),
            )


def _where_accepted(op: str, path: Path, change: Change) -> Change:
    """Return a change that leaves a value alone where the declared check refuses the new one."""

    def checked(value: Any, static: Static) -> Any:
        new = change(value, static)
        return new if new == value or _takes(op, path, new) else value

    return checked


def _shown_by(path: Path, change: Change) -> Callable[[Case], bool]:
    def tells(case: Case) -> bool:
        static = case.options
        return change(get(static, path), static) != get(static, path)

    return tells


def _with_static(half: str, path: Path, change: Change) -> Callable[..., Any]:
    call = _forward if half == FORWARD else right_vjp

    def wrong(*arguments: Any, **static: Any) -> Any:
        changed = put(static, path, change(get(static, path), static))
        return call(*arguments, **changed)

    return wrong


def _forward(op: str, *arrays: Any, **static: Any) -> Any:
    return right(op)(*arrays, **static)


# --- arrays: of each token, or shared by all ------------------------------------------------------


FIRST = "the first token's for all"


def _of_arrays(op: str) -> Iterator[Mutant]:
    for index, (name, patterns) in enumerate(declaration(op).patterns.items()):
        axes = _axes(patterns[0])
        if patterns[0][0] == "...":
            yield _of_array(op, name, FIRST, FORWARD, _each(index, axes, _first_for_all))
            yield _of_array(op, name, FIRST, VJP, _each(index, axes, _first_for_all))
            what = "a gradient summed over the tokens"
            yield _of_array(op, name, what, VJP, _each(index, axes, _summed))
        if patterns[-1][0] != "...":
            what = "shared, read as one for each token"
            yield _of_array(op, name, what, FORWARD, _shared(index, axes, _zeros_after_first), True)
            yield _of_array(op, name, what, VJP, _shared(index, axes, _zeros_after_first), True)
            what = "shared, with the gradient of one token"
            yield _of_array(op, name, what, VJP, _shared(index, axes, _of_one_token), True)


def _of_array(
    op: str, name: str, what: str, half: str, wrong: Callable[..., Any], shared: bool = False
) -> Mutant:
    patterns = declaration(op).patterns[name]

    def tells(case: Case) -> bool:
        there = name not in case.absent
        alternative = patterns[-1 if case.shared else 0]
        return there and math.prod(case.sizes.leading) > 1 and shared == (alternative[0] != "...")

    return Mutant(op=op, argument=name, what=what, half=half, tells=tells, wrong=wrong)


def _each(index: int, axes: int, spoil: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op that is wrong where an array has one entry per token."""

    def wrong(op: str, *arguments: Any, **static: Any) -> Any:
        array = _arrays(arguments)[index : index + 1]
        one: Any = array[0] if array else None
        per_token = one is not None and one.ndim > axes and one.size > 0
        called = spoil if per_token else _unspoiled
        return called(op, index, axes, arguments, static)

    return wrong


def _shared(index: int, axes: int, spoil: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op that is wrong where the tokens share an array."""

    def wrong(op: str, *arguments: Any, **static: Any) -> Any:
        arrays = _arrays(arguments)
        there = len(arrays) > index and arrays[index] is not None
        shared = there and arrays[index].ndim == axes and arrays[0].size > 0
        called = spoil if shared else _unspoiled
        return called(op, index, axes, arguments, static)

    return wrong


def _is_vjp(arguments: tuple[Any, ...]) -> bool:
    """Return whether the arrays are primals and cotangents, rather than those of a forward."""
    return isinstance(arguments[0], tuple)


def _arrays(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[0] if _is_vjp(arguments) else arguments


def _with(arguments: tuple[Any, ...], index: int, array: Any) -> tuple[Any, ...]:
    arrays = list(_arrays(arguments))
    arrays[index] = array
    return (tuple(arrays), *arguments[1:]) if _is_vjp(arguments) else tuple(arrays)


def _call(op: str, arguments: tuple[Any, ...], static: Static) -> Any:
    return (right_vjp if _is_vjp(arguments) else _forward)(op, *arguments, **static)


def _unspoiled(op: str, index: int, axes: int, arguments: Any, static: Static) -> Any:
    return _call(op, arguments, static)


def _flat(array: Any, axes: int) -> Any:
    """Return a view with the tokens along one axis, of size 1 for an array without tokens."""
    return array.reshape(-1, *array.shape[array.ndim - axes :])


def _first_for_all(op: str, index: int, axes: int, arguments: Any, static: Static) -> Any:
    """Call an op so that it reads the first token's entry for every token."""
    array = _arrays(arguments)[index]
    first: Any = _flat(array, axes)[0]
    for_all: Any = np.broadcast_to(first, array.shape)
    return _call(op, _with(arguments, index, np.array(for_all)), static)


def _summed(op: str, index: int, axes: int, arguments: Any, static: Static) -> Any:
    """Call a vjp and return, for each token, the gradient summed over all tokens."""
    gradients = list(_call(op, arguments, static))
    total = _flat(gradients[index], axes).astype(np.float64).sum(axis=0)
    summed = np.broadcast_to(total, gradients[index].shape)
    gradients[index] = summed.astype(gradients[index].dtype)
    return tuple(gradients)


def _zeros_after_first(op: str, index: int, axes: int, arguments: Any, static: Static) -> Any:
    """Call an op as if a shared array had zeros at all tokens but the first."""
    array = _arrays(arguments)[index]
    right_one = _call(op, arguments, static)
    other = _call(op, _with(arguments, index, np.zeros_like(array)), static)
    if _is_vjp(arguments):
        return _mixed_gradients(op, right_one, other)
    outputs = (several(right_one), several(other), declaration(op).outputs.values())
    mixed = tuple(
        None if one is None else _first_then(one, two, _axes(out.shape.split()))
        for one, two, out in zip(*outputs, strict=True)
    )
    return mixed if isinstance(right_one, tuple) else mixed[0]


def _mixed_gradients(op: str, right_one: Any, other: Any) -> Any:
    """Return per-token gradients right for the first token alone; shared ones wrong altogether."""
    found: list[Any] = []
    for patterns, one, two in zip(
        declaration(op).patterns.values(), right_one, other, strict=False
    ):
        axes = _axes(patterns[0])
        per_token = one is not None and one.ndim > axes
        found.append(_first_then(one, two, axes) if per_token else two)
    return tuple(found)


def _axes(words: Sequence[str]) -> int:
    """Return the number of an array's own axes, without those of the tokens."""
    return len(words) - (words[0] == "...")


def _first_then(one: Any, other: Any, axes: int) -> Any:
    """Return the first token of one array and the other tokens of another."""
    mixed = np.array(other)
    _flat(mixed, axes)[:1] = _flat(one, axes)[:1]
    return mixed


def _of_one_token(op: str, index: int, axes: int, arguments: Any, static: Static) -> Any:
    """Call a vjp whose gradient of a shared array leaves out all tokens but the first."""
    primals, cotangents = arguments
    gradients = list(right_vjp(op, primals, cotangents, **static))
    outputs = declaration(op).outputs.values()
    alone = tuple(
        None if c is None else _first_then(c, np.zeros_like(c), _axes(out.shape.split()))
        for c, out in zip(cotangents, outputs, strict=True)
    )
    gradients[index] = right_vjp(op, primals, alone, **static)[index]
    return tuple(gradients)


# --- mixers -----------------------------------------------------------------------------------


def _of_mixers(op: str) -> Iterator[Mutant]:
    """Yield the mutants of the mixers, in the op that has no other part than the mappings."""
    if op != "mappings":
        return
    for name, variant in MIXED.items():
        if name != variant.mixer:
            continue
        changed: dict[tuple[str, str], Callable[..., Any] | None] = {
            (FORWARD, "H_res transposed"): _turned,
            (VJP, "the transposed cotangent"): _of_the_turned,
            (FORWARD, "logits in reverse order"): _reversed,
            (VJP, "no gradient of its logits"): _without_logits,
        }
        for option, declared in variant.made_by.options.items():
            for half in (FORWARD, VJP):
                changed[half, f"always {option}={declared.default}"] = _with_default(option, half)
        for (half, what), wrong in changed.items():
            if wrong is not None:
                yield Mutant(
                    op=op,
                    argument=f"mixer {name}",
                    what=what,
                    half=half,
                    tells=_mixed_by(name, what),
                    wrong=wrong,
                )


def _mixed_by(name: str, what: str) -> Callable[[Case], bool]:
    def tells(case: Case) -> bool:
        variant = case.options["variant"]
        same = any(what == f"always {option}={value}" for option, value in variant.mixer_options)
        return variant.mixer == name and not same

    return tells


def _turned(op: str, *arrays: Any, **static: Any) -> Any:
    *others, h_res = _forward(op, *arrays, **static)
    return (*others, np.ascontiguousarray(np.swapaxes(h_res, -1, -2)))


def _of_the_turned(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    *others, g = cotangents
    return right_vjp(op, primals, (*others, np.swapaxes(g, -1, -2)), **static)


def _reversed(op: str, x: Any, phi: Any, scale: Any, bias: Any, **static: Any) -> Any:
    order = [*range(2 * x.shape[-2]), *reversed(range(2 * x.shape[-2], len(bias)))]
    return _forward(op, x, phi[order], scale, bias[order], **static)


def _without_logits(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    *others, g = cotangents
    return right_vjp(op, primals, (*others, np.zeros_like(g)), **static)


def _with_default(option: str, half: str) -> Callable[..., Any] | None:
    """Return an op that ignores an option, unless the option decides the logits."""
    call = _forward if half == FORWARD else right_vjp

    def wrong(*arguments: Any, variant: Variant) -> Any:
        options = {k: v for k, v in dict(variant.mixer_options).items() if k != option}
        return call(*arguments, variant=replace(variant, mixer_options=tuple(options.items())))

    return None if option in SHAPES_LOGITS else wrong


SHAPES_LOGITS = ("s",)
"""The options of which another value is an error, as the logits would not fit."""


# --- all of them ------------------------------------------------------------------------------

MUTANTS: Mapping[str, Mutant] = {
    mutant.name: mutant
    for op in OPS
    for mutant in (*_of_static_arguments(op), *_of_arrays(op), *_of_mixers(op))
}

_UNUSED = (
    "post_scale",
    "post_eps",
    "sinkhorn_iterations",
    "sinkhorn_eps",
    "sinkhorn_first",
    "sinkhorn_start",
    "sinkhorn_clamp",
    "res_transposed",
)
EQUIVALENT: Mapping[tuple[str, ...], str] = {
    # (op, argument, half), or with what replaces it too: proof
    **{
        ("head", f"variant.{field}", half): (
            "head is sum_i w_i x_i with w = sigmoid(z) + pre_eps and z from phi, scale, bias and "
            "norm_eps: there is no H_post and no H_res in it"
        )
        for field in _UNUSED
        for half in CHECK_OF_HALF
    },
    ("mappings", "variant.pre_eps", VJP): (
        "H_pre = sigmoid(z) + pre_eps, and its derivative by z is sigmoid's own"
    ),
    **{
        (op, "variant.post_eps", VJP): (
            "H_post = post_scale sigmoid(z) + post_eps is an output that no other output depends "
            "on, and its derivative by z is sigmoid's own times post_scale"
        )
        for op in ("mappings", "pre", "pre_residual", "combine_pre", *H_NORMED)
    },
    **{
        (
            "mappings",
            "mixer kromhc",
            *which,
        ): "a Kronecker product of symmetric matrices is symmetric"
        for which in ((FORWARD, "H_res transposed"), (VJP, "the transposed cotangent"))
    },
    **{
        (op, "h_raw", VJP): "where h_raw is not asked for, its cotangent is None, which says it too"
        for op in H_NORMED
    },
    ("expand", "n", VJP): "dh is the sum of the cotangent's streams, whose shape says how many",
    **{
        (op, name, VJP, FIRST): f"{op} is linear in {name} alone: its vjp reads no entry of it"
        for op, name in (("expand", "h"), ("contract", "x"))
    },
}
"""The proofs of mutants that compute the same as the right backend for every input."""


@dataclass(frozen=True)
class Found:
    """The kit's result on one mutant: the first comparison that fails, or none."""

    mutant: Mutant
    message: str = ""
    tried: int = 0  # comparisons of cases that can reveal it

    @property
    def problem(self) -> str:
        """Return how the kit failed to catch the mutant, or "" if it caught what can be caught."""
        if self.mutant.proof:
            return f"was caught, against the proof: {self.message}" if self.message else ""
        if self.message:
            return ""
        return "passes the whole kit" if self.tried else "no case of the kit could tell"


def run_mutant(mutant: Mutant, seed: int = 0) -> Found:
    """Run a mutant's check on the cases that can reveal it, until one fails."""
    tried = 0
    for dtype in ("float32", "float64"):  # float64 separates numbers that float32 does not
        bug = _bug(mutant, dtype)
        with present(bug):
            subject = Subject(bug.backend)
            subject.wants = mutant.tells
            for one in comparisons(subject, mutant.op, dtype, CHECK_OF_HALF[mutant.half], seed):
                tried += 1
                if not one.passed:
                    return Found(mutant, one.says, tried)
    return Found(mutant, "", tried)


def named(name: str) -> Bug | None:
    """Return a mutant as one of the kit's bugs, which ``mhc conformance bug:NAME`` runs."""
    return _bug(MUTANTS[name], "float64") if name in MUTANTS else None


def _bug(mutant: Mutant, dtype: str) -> Bug:
    half: Any = (
        {"forward": partial(mutant.wrong, mutant.op)}
        if mutant.half == FORWARD
        else {"vjp": mutant.wrong}
    )
    return Bug(
        name=mutant.name,
        what=f"{mutant.argument} of {mutant.op}'s {mutant.half}: {mutant.what}",
        op=mutant.op,
        fails=(CHECK_OF_HALF[mutant.half],),
        says="",
        dtype=dtype,
        shipped=False,
        **half,
    )
