"""Golden cases: inputs, the oracle's answers and what is allowed, without a backend.

They are for implementations that the kit cannot call: those of other projects, which
``mhc conformance --peers`` runs in processes of their own, and those in languages that cannot
import Python, which read them from files (:mod:`mhc_conformance.exchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhc_conformance.answers import answers, condition, distance, of_case, seams, size
from mhc_conformance.cases import (
    APART,
    NARROW,
    Case,
    Draw,
    Sizes,
    Static,
    data,
    declaration,
    default,
    with_variant,
)
from mhc_conformance.tolerances import Quantity, rounds, tolerance
from mhc_core import DEEPSEEK_V4, Variant
from mhc_core.checks import Check
from mhc_core.variants import check_variant

__all__ = ["Field", "Golden", "Want", "fits", "golden", "golden_cases", "static_of"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Want:
    """An array as the oracle computes it, and the largest relative error that is allowed."""

    name: str
    value: Array
    dtype: str
    limit: float

    def error(self, got: Array) -> float:
        """Return the error of an array relative to the largest number; inf for another shape."""
        if got.shape != self.value.shape:
            return float("inf")
        found = distance(got.astype(np.float64), self.value) / size(self.value)
        return float("inf") if np.isnan(found) else found


@dataclass(frozen=True)
class Golden:
    """One case in one dtype: its inputs, and what an implementation should make of them."""

    case: Case
    dtype: str
    seed: int

    @property
    def primals(self) -> tuple[Array, ...]:
        """Return the inputs."""
        return data(self.case, self.dtype, self.seed).primals

    @property
    def cotangents(self) -> tuple[Array, ...]:
        """Return a cotangent for each output."""
        return data(self.case, self.dtype, self.seed).cotangents

    @property
    def outputs(self) -> list[str]:
        """Return the names of the outputs."""
        return list(declaration(self.case.op).outputs_of(self.case.options))

    def names(self, quantity: Quantity) -> list[str]:
        """Return the names of a quantity's arrays."""
        return self.outputs if quantity == "forward" else self.case.names

    def want(self, quantity: Quantity, got: Mapping[str, Array] | None = None) -> list[Want]:
        """Return what is wanted, where ``got`` has the outputs that the op rounds and reads again.

        A narrow combine_pre reads its own x' as it rounded it, so what follows is judged from that.
        """
        rounded = self._rounded(got or {})
        if rounded:
            options = {**self.case.asked, **rounded}
            drawn = (self.primals, self.cotangents)
            values, moved = answers(self.case.op, quantity, *drawn, options, self.dtype, self.seed)
        else:
            values, moved = of_case(self.case, self.dtype, self.seed, quantity)
        like = self.cotangents if quantity == "forward" else self.primals
        limits = self.limits(quantity, values, moved)
        made = zip(self.names(quantity), values, like, limits, strict=True)
        return [Want(name, value, str(array.dtype), limit) for name, value, array, limit in made]

    def limits(
        self, quantity: Quantity, values: Sequence[Array], moved: Sequence[Array]
    ) -> list[float]:
        """Return the largest relative errors that are allowed, by answers to inputs moved a bit."""
        like = self.cotangents if quantity == "forward" else self.primals
        often = rounds(self.case.iterations)
        found: list[float] = []
        for value, other, array in zip(values, moved, like, strict=True):
            known = often * condition(value, other, self.dtype)
            found.append(tolerance(self.case.op, quantity, str(array.dtype), known))
        return found

    def reads(self, got: Mapping[str, Array]) -> bool:
        """Return whether what is wanted depends on outputs of an answer, as it rounded them."""
        return bool(self._rounded(got))

    def _rounded(self, got: Mapping[str, Array]) -> dict[str, Array]:
        if self.dtype not in NARROW:
            return {}
        read = seams(self.case.op).items()
        return {name: got[output] for name, output in read if output in got}


def golden(cases: Sequence[Case], dtypes: Sequence[str], seed: int = 0) -> Iterator[Golden]:
    """Yield the cases in each dtype, those of the fewest numbers first."""
    for dtype in dtypes:
        for case in sorted(cases, key=_amount):
            yield Golden(case, dtype, seed)


def _amount(case: Case) -> int:
    return int(np.prod(case.sizes.leading)) * case.sizes.n * case.sizes.C


# --- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """The part of an op that an implementation has, from which its cases follow.

    Attributes
    ----------
    op
        The op.
    released
        The published variant that it computes.
    fixed
        Static arguments, or fields of the variant, that are constants of its own; and
        ``"shared"``, ``"unmixed"`` or ``"narrow"`` as fields of the case, and ``"alone"`` for one
        that takes no leading axes.
    free
        Those that it takes as arguments; a tuple of names is one argument for all of them.
    sizes
        A function of n and C to the reason why it does not take them, or None.
    """

    op: str
    released: Variant = DEEPSEEK_V4
    fixed: Mapping[str, Any] | None = None
    free: tuple[str | tuple[str, ...], ...] = ()
    sizes: Callable[[int, int], str | None] = lambda n, C: None


SIZES = (
    Sizes((1, 1), 2, 3, "few numbers, to show"),
    Sizes((1, 2), 4, 8, "ordinary"),
    Sizes((2, 3), 4, 37, "channels with a tail"),
    Sizes((1, 5), 7, 12, "more streams, an odd number"),
    Sizes((1, 33), 4, 64, "more tokens"),
)
FLAGS = ("shared", "unmixed", "narrow")
ALONE = "alone"
"""The flag of an implementation that takes one matrix, and no leading axes."""
OTHER: Mapping[str, Any] = {
    "iterations": 3,
    "max_iterations": 3,
    "epsilon": 0.02,
    "eps": 0.1,
    "log_space": False,
}
"""Another value of each static argument, large enough to show on any input."""


def golden_cases(field: Field) -> list[Case]:
    """Return the cases of an op for an implementation that has not all of it.

    Its constants are varied as far as it takes them, all at once, since in released models several
    are equal; and there are logits beyond exp's range, streams as small as an eps, and gradients as
    large as real ones.
    """
    taken = [sizes for sizes in SIZES if field.sizes(sizes.n, sizes.C) is None]
    if (field.fixed or {}).get(ALONE):
        taken = [sizes._replace(leading=()) for sizes in taken]
    statics = static_of(field)
    flags: dict[str, Any] = {name: bool((field.fixed or {}).get(name)) for name in FLAGS}
    pairs = [(label, static, sizes) for label, static in statics[:1] for sizes in taken]
    pairs += [(label, static, sizes) for label, static in statics[1:] for sizes in taken[:2]]
    found = [
        Case(field.op, label, sizes, _sized(field.op, sizes, static), **flags)
        for label, static, sizes in pairs
    ]
    ordinary = found[min(1, len(found) - 1)]
    found += [
        replace(ordinary, label=f"{ordinary.label}, {label}", draws=draws)
        for label, draws in _special(field.op)
    ]
    found.append(replace(ordinary, label=f"{ordinary.label}, large gradients", gradient_scale=1e4))
    return found


def _special(op: str) -> Iterator[tuple[str, tuple[tuple[str, Draw], ...]]]:
    declared = declaration(op)
    mixed = any(out.mixed for out in declared.outputs.values())
    for name, says in (("logits", ""), ("matrix", ""), ("h_res_raw", ""), ("bias", "mixed")):
        if name in declared.arrays and (says != "mixed" or mixed):
            yield "logits beyond exp's range", ((name, _normal(60.0)),)
    if "logits" in declared.arrays:
        yield "all logits equal", (("logits", _normal(0.0)),)
    if "x" in declared.arrays and "phi" in declared.arrays:
        yield "small streams", (("x", _normal(1e-3)),)


def _normal(scale: float) -> Draw:
    return lambda rng, shape: rng.normal(0.0, 1.0, shape) * scale


def _sized(op: str, sizes: Sizes, static: Static) -> Static:
    return (("n", sizes.n), *static) if "n" in declaration(op).static else static


def static_of(field: Field) -> list[tuple[str, Static]]:
    """Return the static arguments of the cases: published, all apart, and one iteration."""
    declared = declaration(field.op).static
    if check_variant in declared.values():
        return _variants(field)
    return _arguments(field, declared)


def _variants(field: Field) -> list[tuple[str, Static]]:
    own = {
        name: value for name, value in (field.fixed or {}).items() if name not in (*FLAGS, ALONE)
    }
    published = replace(field.released, **own)
    apart: dict[str, Any] = {}
    for argument in field.free:
        names = (argument,) if isinstance(argument, str) else argument
        apart |= dict.fromkeys(names, getattr(APART, names[0]))
    found = [("published", published)]
    if apart:
        found.append(("constants apart", replace(published, **apart)))
    if "sinkhorn_iterations" in apart:
        found.append(("one iteration", replace(published, sinkhorn_iterations=1)))
    return [(label, with_variant(field.op, variant)) for label, variant in found]


def _arguments(field: Field, declared: Mapping[str, Check]) -> list[tuple[str, Static]]:
    own, free = field.fixed or {}, {*field.free}
    names = [name for name in declared if name != "n"]
    usual = {name: own.get(name, default(field.op, name, None)) for name in names}
    for name, value in usual.items():
        if value is None or (name == "eps" and value == 0 and name in free):
            usual[name] = {"iterations": 20, "how": "sum"}.get(name, 1e-6)
    found = [("published" if names else "plain", usual)]
    apart = {name: OTHER[name] for name in names if name in free}
    if apart:
        found.append(("arguments apart", {**usual, **apart}))
    for name in ("iterations", "max_iterations"):
        if name in apart:
            found.append(("one iteration", {**usual, name: 1}))
    return [(label, tuple(static.items())) for label, static in found]


def fits(wants: Sequence[Want], got: Sequence[Array], slack: float = 1.0) -> bool:
    """Return whether every array is as near as allowed, or ``slack`` times that."""
    return len(wants) == len(got) and all(
        want.error(one) <= slack * want.limit for want, one in zip(wants, got, strict=True)
    )
