"""The laws of mHC, which hold for every input, tested on inputs that hypothesis chooses.

A law compares the backend's results with each other or with known values, not with the oracle.
hypothesis shrinks a failure to the simplest input that breaks the law. The same seed draws the same
inputs. Every law has two shapes, because a compiler takes seconds for each further one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from mhc_conformance import oracle
from mhc_conformance.cases import SMALL, STATICS, Case, Sizes, cases, data
from mhc_conformance.records import Comparison
from mhc_conformance.subject import Subject
from mhc_conformance.tolerances import DIFFERENCES, eps, tolerance
from mhc_core import PAPER
from mhc_core.backend import DTYPES

__all__ = ["PROPERTIES", "Property", "hold", "lacks"]

Array = NDArray[np.float64]
Order = NDArray[np.intp]

EXAMPLES = 15
SHAPES = (SMALL, Sizes((5,), 3, 5, "odd sizes"))
ONE = (Sizes((4,), 1, 6, "one stream"), Sizes((), 1, 3, "one stream, no leading axes"))
LOG = {"iterations": 20, "eps": 0.0, "first": "columns"}
CONDITION = 4.0  # of logits within LARGEST, whose roundings an exponential magnifies
LARGEST = 4.0


def lacks(subject: Subject, op: str, dtype: str) -> str | None:
    """Return why no property of an op can be tried, or None."""
    if find_spec("hypothesis") is None:
        return "hypothesis is not installed: pip install hypothesis"
    known = [law for law in PROPERTIES if op == law.op and dtype in law.dtypes]
    if not known:
        return "its one property, gradients equal to differences, needs float64"
    if not any(law.taken_by(subject) for law in known):
        return f"no property is tried at the sizes of {subject.name}"
    return None


def hold(subject: Subject, op: str, dtype: str, seed: int) -> Iterator[Comparison]:
    """Yield the worst comparison of each property of an op."""
    for law in _of(subject, op, dtype):
        yield _tried(law, subject, dtype, seed)


def _of(subject: Subject, op: str, dtype: str) -> list[Property]:
    laws = [law for law in PROPERTIES if op == law.op and dtype in law.dtypes]
    return [law for law in laws if law.taken_by(subject)]


# --- trying -----------------------------------------------------------------------------------


class _BrokenError(Exception):
    """An exception that carries the failed comparison out of hypothesis."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(comparison)
        self.comparison = comparison


def _tried(law: Property, subject: Subject, dtype: str, seed: int) -> Comparison:
    """Run a law on many inputs; return the worst comparison, or the simplest that fails."""
    import hypothesis as h
    from hypothesis import strategies as st

    worst = Comparison(law.name, 0.0, 1.0)

    @h.seed(seed)
    @h.settings(
        max_examples=EXAMPLES * (10 if subject.full else 1),
        deadline=None,
        database=None,
        phases=(h.Phase.generate, h.Phase.shrink),
        suppress_health_check=(h.HealthCheck.too_slow, h.HealthCheck.data_too_large),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=h.Verbosity.quiet,
    )
    @h.given(st.data())
    def each(drawn: Any) -> None:
        nonlocal worst
        for comparison in law.holds(Draws(subject, law, dtype, drawn.draw)):
            if not comparison.passed:
                raise _BrokenError(comparison)
            worst = max(worst, comparison, key=lambda one: one.badness)

    try:
        with _replayable():
            each()
    except _BrokenError as error:
        return error.comparison
    return worst


@contextlib.contextmanager
def _replayable() -> Generator[None]:
    """Keep hypothesis from drawing constants that it finds in the source of loaded modules.

    With them, a seed would draw other inputs when other modules are loaded, and hypothesis would
    leave a folder of them where the kit runs. It has no setting to turn this off. In versions whose
    method has another name, such as those before this feature, nothing is changed.
    """
    owner: Any = None
    with contextlib.suppress(ImportError):  # a separate, private module since 6.123
        owner = import_module("hypothesis.internal.conjecture.providers")
    owner, name = getattr(owner, "HypothesisProvider", None), "_maybe_draw_constant"
    kept = cast("Callable[..., Any] | None", getattr(owner, name, None))
    if kept is None:
        yield
        return
    setattr(owner, name, lambda *_, **__: None)  # pyright: ignore[reportUnknownLambdaType]
    try:
        yield
    finally:
        setattr(owner, name, kept)


@dataclass(frozen=True)
class Draws:
    """One example: what hypothesis chose, and the backend to try it on."""

    subject: Subject
    law: Property
    dtype: str
    draw: Callable[[Any], Any]

    def op(self, name: str, *arrays: Array, **static: Any) -> tuple[Array, ...]:
        """Return a public op's results on host arrays, as host arrays in float64."""
        own = self.subject.take([array.astype(self.dtype) for array in arrays])
        case = Case(name, self.law.name, SMALL, tuple(static.items()))
        outputs = self.subject.give(self.subject.forward(case)(*own))
        return tuple(output.astype(np.float64) for output in outputs)

    def one(self, *choices: Any) -> Any:
        """Choose one of several."""
        from hypothesis import strategies as st

        return self.draw(st.sampled_from(choices))

    def integer(self) -> int:
        """Choose a seed for numbers that only need to be different."""
        from hypothesis import strategies as st

        return self.draw(st.integers(0, 2**32 - 1))

    def array(self, *shape: int, low: float = -LARGEST, high: float = LARGEST) -> Array:
        """Choose an array: short numbers, often equal ones, zeros and the ends of the range."""
        from hypothesis import strategies as st
        from hypothesis.extra import numpy as of_numpy

        ends = st.sampled_from([low, high, 0.0, (low + high) / 4 + 1])
        numbers = ends | st.floats(low, high, width=32, allow_subnormal=False)
        return self.draw(of_numpy.arrays(np.float64, shape, elements=numbers))

    def order(self, n: int) -> Order:
        """Choose an order of n streams."""
        from hypothesis import strategies as st

        return np.array(self.draw(st.permutations(range(n))), np.intp)

    def sizes(self) -> Sizes:
        """Choose one of the law's shapes that the backend accepts."""
        return self.one(*self.law.taken_by(self.subject))

    def compare(
        self, what: str, got: Array, want: Array, size: float = 0.0, condition: float = 1.0
    ) -> Comparison:
        """Compare two results that both have rounding errors, relative to the largest number."""
        limit = 2 * tolerance(self.law.op, "forward", self.dtype, condition)
        size = size or float(np.abs(want).max(initial=0.0))
        return self.within(what, np.abs(got - want), limit, size)

    def within(self, what: str, off: Array, limit: Any, size: float = 1.0) -> Comparison:
        """Check every deviation against its own limit, and return the worst share of a limit."""
        share = off / np.broadcast_to(limit, off.shape) / (size or 1.0)
        worst = int(np.argmax(np.nan_to_num(share, nan=np.inf))) if off.size else 0
        error = float(off.ravel()[worst]) / (size or 1.0) if off.size else 0.0
        allowed = float(np.broadcast_to(limit, off.shape).ravel()[worst]) if off.size else 1.0
        return Comparison(f"{self.law.name}, {what},", error, allowed)


@dataclass(frozen=True)
class Property:
    """A law of one op, whose tolerance counts."""

    name: str
    op: str
    holds: Callable[[Draws], Iterator[Comparison]]
    dtypes: tuple[str, ...] = DTYPES
    shapes: tuple[Sizes, ...] = SHAPES

    def taken_by(self, subject: Subject) -> list[Sizes]:
        """Return the shapes that a backend accepts."""
        smallest, largest = subject.spec.sizes
        return [sizes for sizes in self.shapes if smallest <= sizes.n <= (largest or sizes.n)]


# --- Sinkhorn ---------------------------------------------------------------------------------


def _doubly_stochastic(d: Draws) -> Iterator[Comparison]:
    """Check that one axis sums to 1, the other to within what the iterations must have achieved.

    Each iteration brings the sums closer to equal, in Hilbert's metric d(s) = max log(s_i / s_j),
    by at least tanh(D / 4)^2 with D the diameter of the logits (Franklin and Lorenz, 1989).
    """
    first, iterations = d.one("columns", "rows"), d.one(20, 3)
    sizes = d.sizes()
    logits = d.array(*sizes.leading, sizes.n, sizes.n, low=-1, high=1)
    options = {"iterations": iterations, "eps": 0.0, "first": first}
    (matrix,) = d.op("sinkhorn", logits, **options)
    a, b = (-2, -1) if first == "columns" else (-1, -2)
    rounding = 8 * sizes.n * eps(d.dtype)
    yield d.within(f"{first} first", np.maximum(-matrix, 0), rounding)
    yield d.within(f"{first} first, last axis", np.abs(matrix.sum(axis=b) - 1), rounding)
    (once,) = oracle.forward("sinkhorn", (logits,), **{**options, "iterations": 1})
    logs = np.log(once.sum(axis=a))
    apart = logs.max(axis=-1, keepdims=True) - logs.min(axis=-1, keepdims=True)
    shrunk = np.tanh(_diameter(logits) / 4)[..., None] ** (2 * (iterations - 1)) * apart
    limit = np.expm1(shrunk) + rounding
    yield d.within(f"{first} first, other axis", np.abs(matrix.sum(axis=a) - 1), limit)


def _diameter(logits: Array) -> Array:
    """Return max (L_ik + L_jl - L_jk - L_il), which no normalisation changes."""
    apart = logits[..., :, None, :] - logits[..., None, :, :]
    return (apart.max(axis=-1) - apart.min(axis=-1)).max(axis=(-1, -2))


def _rows_and_columns_permute(d: Draws) -> Iterator[Comparison]:
    sizes = d.sizes()
    logits = d.array(*sizes.leading, sizes.n, sizes.n)
    rows, columns = d.order(sizes.n), d.order(sizes.n)
    options = {**LOG, "eps": d.one(0.0, 1e-6), "first": d.one("columns", "rows")}
    (plain,) = d.op("sinkhorn", logits, **options)
    (permuted,) = d.op("sinkhorn", logits[..., rows, :][..., columns], **options)
    want = plain[..., rows, :][..., columns]
    yield d.compare("rows and columns", permuted, want, condition=CONDITION)


def _constants_cancel(d: Draws) -> Iterator[Comparison]:
    """Check that constants on the lines of the axis normalised first, equal ones too, cancel."""
    sizes = d.sizes()
    logits = d.array(*sizes.leading, sizes.n, sizes.n)
    first = d.one("columns", "rows")
    options = {**LOG, "eps": d.one(0.0, 1e-6), "first": first}
    shape = (1, sizes.n) if first == "columns" else (sizes.n, 1)
    (plain,) = d.op("sinkhorn", logits, **options)
    (moved,) = d.op("sinkhorn", logits + d.array(*sizes.leading, *shape), **options)
    yield d.compare(f"{first} first", moved, plain, condition=CONDITION)


def _constants_in_mappings(d: Draws) -> Iterator[Comparison]:
    sizes = d.sizes()
    case, n = Case("mappings", "constants", sizes), sizes.n
    x, phi, scale, bias = data(replace(case, static=_PAPER), "float64", d.integer()).primals
    moved = bias + np.repeat([0.0, float(d.array(low=-LARGEST))], [2 * n, n * n])
    plain = d.op("mappings", x, phi, scale, bias, variant=PAPER)
    other = d.op("mappings", x, phi, scale, moved, variant=PAPER)
    for name, one, two in zip(("h_pre", "h_post", "h_res"), other, plain, strict=True):
        yield d.compare(name, one, two, condition=CONDITION)


def _one_by_one(d: Draws) -> Iterator[Comparison]:
    """Check that H_res of one stream is 1, whatever its logit."""
    leading = d.sizes().leading
    (h_res,) = d.op("sinkhorn", d.array(*leading, 1, 1, low=-100, high=100), **LOG)
    yield d.within("sinkhorn", np.abs(h_res - 1), eps(d.dtype))


# --- streams ----------------------------------------------------------------------------------


def _streams_permute(d: Draws) -> Iterator[Comparison]:
    """Check that streams have no order: permuting all that is per stream permutes the results."""
    leading, n, C, _ = d.sizes()
    x, y = d.array(*leading, n, C), d.array(*leading, C)
    weights, mixing = d.array(*leading, n), d.array(*leading, n, n)
    order = d.order(n)
    turned = x[..., order, :], weights[..., order], mixing[..., order, :][..., order]
    if d.law.op == "aggregate":
        (plain,), (permuted,) = d.op("aggregate", x, weights), d.op("aggregate", *turned[:2])
    else:
        (plain,) = d.op("combine", x, y, weights, mixing)
        (permuted,) = d.op("combine", turned[0], y, *turned[1:])
        plain = plain[..., order, :]
    yield d.compare("streams", permuted, plain, size=n * LARGEST**2)


def _streams_permute_in_pre(d: Draws) -> Iterator[Comparison]:
    sizes = d.sizes()
    n, C = sizes.n, sizes.C
    case = Case("pre", "streams permuted", sizes, _PAPER)
    x, phi, scale, bias = data(case, "float64", d.integer()).primals
    order = d.order(n)
    res = 2 * n + (order[:, None] * n + order).ravel()
    rows = np.concatenate([order, n + order, res])
    turned = phi.reshape(-1, n, C)[rows][:, order].reshape(phi.shape)
    h, h_post, h_res = d.op("pre", x, phi, scale, bias, variant=PAPER)
    permuted = d.op("pre", x[..., order, :], turned, scale, bias[rows], variant=PAPER)
    want = (h, h_post[..., order], h_res[..., order, :][..., order])
    for name, one, two in zip(("h", "h_post", "h_res"), permuted, want, strict=True):
        yield d.compare(name, one, two, condition=CONDITION)


def _linear_in_y(d: Draws) -> Iterator[Comparison]:
    leading, n, C, _ = d.sizes()
    x, one, two = d.array(*leading, n, C), d.array(*leading, C), d.array(*leading, C)
    h_post, h_res = d.array(*leading, n), d.array(*leading, n, n)
    factor = d.one(-2.0, 0.5, 3.0)

    def combined(y: Array) -> Array:
        return d.op("combine", x, y, h_post, h_res)[0]

    want = combined(one) + factor * (combined(two) - combined(np.zeros_like(two)))
    yield d.compare("in y", combined(one + factor * two), want, size=4 * (n + 1) * LARGEST**2)


def _mean_preserved(d: Draws) -> Iterator[Comparison]:
    """Check that a doubly stochastic H_res, a mean of permutations, keeps the streams' mean."""
    leading, n, C, _ = d.sizes()
    x, y, h_post = d.array(*leading, n, C), d.array(*leading, C), d.array(*leading, n)
    parts = [np.eye(n)[d.order(n)] for _ in range(4)]
    weights = np.array(d.one((0.25, 0.25, 0.25, 0.25), (0.5, 0.25, 0.125, 0.125), (1, 0, 0, 0)))
    mixing = np.broadcast_to(np.tensordot(weights, parts, 1), (*leading, n, n))
    (mixed,) = d.op("combine", x, y, h_post, mixing)
    want = x.mean(axis=-2) + h_post.mean(axis=-1)[..., None] * y
    yield d.compare("of the streams", mixed.mean(axis=-2), want, size=LARGEST + LARGEST**2)


def _one_stream(d: Draws) -> Iterator[Comparison]:
    """Check that with one stream and H_post = 1, mHC is an ordinary residual connection."""
    leading, _, C, _ = d.sizes()
    x, y = d.array(*leading, 1, C), d.array(*leading, C)
    (added,) = d.op("combine", x, y, np.ones((*leading, 1)), np.ones((*leading, 1, 1)))
    yield d.compare("combine", added[..., 0, :], x[..., 0, :] + y, size=2 * LARGEST)


# --- gradients --------------------------------------------------------------------------------


def _gradients_are_slopes(d: Draws) -> Iterator[Comparison]:
    """Check the vjp along a random direction against central differences in float64."""
    case = _smooth_case(d.law.op)
    primals, cotangents = data(case, "float64", d.integer())
    rng = np.random.default_rng(d.integer())
    directions = [rng.normal(size=primal.shape) for primal in primals]
    pulled = d.subject.vjp(case, d.subject.take(primals), d.subject.take(cotangents))
    terms = [g * u for g, u in zip(d.subject.give(pulled), directions, strict=True)]

    def value(step: float) -> float:
        moved = [p + step * u for p, u in zip(primals, directions, strict=True)]
        outputs = d.op(case.op, *moved, **case.options)
        return math.fsum(float((c * o).sum()) for c, o in zip(cotangents, outputs, strict=True))

    slope = math.fsum(float(term.sum()) for term in terms)
    size = math.fsum(float(np.abs(term).sum()) for term in terms)
    off = np.array(abs(slope - _slope_at_0(value)))
    yield d.within(case.name, off, DIFFERENCES, size)


def _slope_at_0(value: Callable[[float], float], step: float = 2e-3) -> float:
    """Extrapolate central differences at two steps, which leaves an error of step**4."""
    coarse, fine = ((value(h) - value(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * fine - coarse) / 3


def _smooth_case(op: str) -> Case:
    """Return an op's most ordinary case; sinkhorn_knopp's never stops early: that is a jump."""
    if op == "sinkhorn_knopp":
        _, static = next(both for both in STATICS[op] if dict(both[1])["epsilon"] == 0)
        return Case(op, "never stopping", SMALL, static)
    return next(cases(op, "float64"))


_PAPER = (("variant", PAPER),)

PROPERTIES: Sequence[Property] = (
    Property("doubly stochastic within the iterations' own bound", "sinkhorn", _doubly_stochastic),
    Property("equivariant under permutations", "sinkhorn", _rows_and_columns_permute),
    Property("invariant to constants added to res logits", "sinkhorn", _constants_cancel),
    Property("the identity for n=1", "sinkhorn", _one_by_one, shapes=ONE),
    Property("invariant to a constant added to res logits", "mappings", _constants_in_mappings),
    Property("invariant under permutations of the streams", "aggregate", _streams_permute),
    Property("equivariant under permutations of the streams", "combine", _streams_permute),
    Property("equivariant under permutations of the streams", "pre", _streams_permute_in_pre),
    Property("linear in y", "combine", _linear_in_y),
    Property("the mean of the streams is preserved", "combine", _mean_preserved),
    Property("the identity for n=1", "combine", _one_stream, shapes=ONE),
    *(
        Property(
            "gradients equal central differences",
            op,
            _gradients_are_slopes,
            dtypes=("float64",),
            shapes=(SMALL,),
        )
        for op in oracle.OPS
    ),
)
