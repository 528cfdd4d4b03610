"""The oracle's answers to a case, and how well its input determines them.

Every answer is computed twice: for the input, and for the input moved by one rounding. The distance
between the two is the condition, which multiplies the tolerance.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhc_conformance import oracle
from mhc_conformance.cases import Case, data
from mhc_conformance.tolerances import Quantity, eps

__all__ = ["Kept", "answers", "condition", "directions", "distance", "of_case", "seams", "size"]

Array = NDArray[Any]

STEP = 2e-3  # step of the float64 differences that second derivatives are compared with


def directions(primals: Sequence[Array], seed: int) -> tuple[Array, ...]:
    """Draw the vector of a Hessian-vector product."""
    rng = np.random.default_rng([seed, len(primals)])
    return tuple(rng.normal(size=primal.shape).astype(primal.dtype) for primal in primals)


def _hessian_vector(
    case: Case, primals: Sequence[Array], cotangents: Sequence[Array], along: Sequence[Array]
) -> tuple[Array, ...]:
    """Return differences of the oracle's gradients of sum(c (o + o^2 / 2)); the error is step^4."""
    in_float64 = [primal.astype(np.float64) for primal in primals]

    def gradients(step: float) -> tuple[Array, ...]:
        pairs = zip(in_float64, along, strict=True)
        at = [primal + step * u.astype(np.float64) for primal, u in pairs]
        outputs = oracle.forward(case.op, at, **case.asked)
        pulled = [c * (1 + o) for c, o in zip(cotangents, outputs, strict=True)]
        return oracle.gradients(case.op, at, pulled, **case.asked)

    def difference(step: float) -> list[Array]:
        pairs = zip(gradients(step), gradients(-step), strict=True)
        return [(ahead - behind) / (2 * step) for ahead, behind in pairs]

    pairs = zip(difference(STEP), difference(STEP / 2), strict=True)
    return tuple((4 * fine - coarse) / 3 for coarse, fine in pairs)


_SEAMS = {"x_rounded": "x", "h_rounded": "h_raw"}


def seams(op: str) -> dict[str, str]:
    """Return the outputs that an op rounds and reads again, by the oracle's names for them."""
    named = inspect.signature(oracle.OPS[op]).parameters
    return {name: output for name, output in _SEAMS.items() if name in named}


class Kept:
    """An array as a dictionary key, equal to any other array with the same bytes."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self._key = (array.tobytes(), array.shape, str(array.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@lru_cache(maxsize=128)  # of one op's cases: many checks and backends are held against the same
def of_case(
    case: Case,
    dtype: str,
    seed: int,
    quantity: Quantity,
    rounded: tuple[tuple[str, Kept], ...] = (),
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return :func:`answers` to a case; ``rounded`` has arrays as the backend rounded them."""
    options = {**case.asked, **{name: kept.array for name, kept in rounded}}
    drawn = data(case, dtype, seed)
    if quantity != "second":
        return answers(case.op, quantity, *drawn, options, dtype, seed)
    along = directions(drawn.primals, seed)

    def ask(primals: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, ...]:
        return _hessian_vector(case, primals, cotangents, along)

    return _twice(ask, drawn, dtype, seed)


def answers(
    op: str,
    quantity: Quantity,
    primals: Sequence[Array],
    cotangents: Sequence[Array],
    options: Mapping[str, Any],
    dtype: str,
    seed: int = 0,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the oracle's answers, and how far they move when the input moves by one rounding."""

    def ask(primals: Sequence[Array], cotangents: Sequence[Array]) -> tuple[Array, ...]:
        if quantity == "forward":
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
    return 1 + distance(moved, value) / size(value) / _rounding(dtype)


def size(value: Array) -> float:
    """Return the size of an array, which errors are relative to."""
    return float(np.abs(value[~np.isnan(value)]).max(initial=0.0)) or 1.0


def _rounding(dtype: str) -> float:
    """Return the size of one rounding in the computation."""
    return eps("float64" if dtype == "float64" else "float32")


def _moved(rng: np.random.Generator, array: Array, rounding: float) -> Array:
    """Move every number by up to one rounding."""
    factors = 1 + rounding * rng.uniform(-1, 1, array.shape)
    return array.astype(np.float64) * factors


def distance(one: Array, other: Array) -> float:
    """Return the largest difference: 0 where both are NaN, NaN where only one is."""
    alike = np.isnan(one) & np.isnan(other)
    return float(np.abs(np.where(alike, 0.0, one - other)).max(initial=0.0))
