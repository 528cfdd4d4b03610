"""Cases in which a wrong constant changes the result, and cases at the ends of float32's range.

In every released model some constants are equal, and most are too small to change the result on an
ordinary input: a backend that confuses two of them, or hard-codes one, computes the same there.
Here all static arguments of an op differ, from each other and from all published values, and the
inputs have the size at which each of them changes the result: streams whose mean square is as large
as norm_eps, gates that are nearly closed, lines of H_res that are faint or converge slowly.

An op without a case in ``BY_HAND`` gets cases from its declaration. They suffice for an argument
whose value changes results on ordinary inputs in float64. An argument such as the eps of a norm or
the iterations of Sinkhorn needs a case by hand, with inputs on which it does.
:mod:`mhc_conformance.generated` makes the wrong backends that these cases must fail.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhc_conformance.cases import (
    APART,
    EITHER,
    H_NORMED,
    MAPPED,
    PROJECTED,
    SMALL,
    TAIL,
    Case,
    Draw,
    Sizes,
    Static,
    around,
    cases,
    chosen,
    declaration,
    with_variant,
)
from mhc_core import DEEPSEEK_V4, PAPER, Variant, math
from mhc_core.variants import check_variant

__all__ = ["BOUND", "CASES", "SECOND", "quick"]

Array = NDArray[Any]
Draws = tuple[tuple[str, Draw], ...]

WIDE = ("float32", "bfloat16", "float64")  # float16 ends at 65504
SLOW = 130  # iterations: more than any loop is likely to be unrolled to
PLAIN = ("float32",)


def _normal(scale: float, shift: float = 0.0) -> Draw:
    return lambda rng, shape: rng.normal(shift, scale, shape)


def _zero(_: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


# --- all constants apart ----------------------------------------------------------------------

MIDDLE = Variant(
    norm_eps=3e-5,
    pre_eps=4e-4,
    post_scale=5e-4,
    post_eps=2e-4,
    sinkhorn_iterations=33,
    sinkhorn_eps=2e-3,
    sinkhorn_first="columns",
    sinkhorn_clamp=(-2.0, 0.5),
    res_transposed=False,
)
LITTLE = Variant(
    norm_eps=2e-21,
    pre_eps=2e-7,
    post_scale=3.0,
    post_eps=3e-7,
    sinkhorn_iterations=SLOW,
    sinkhorn_eps=4e-7,
    sinkhorn_first="rows",
    res_transposed=False,
)
NOTHING = replace(PAPER, norm_eps=0.0, post_scale=0.0)  # all of its numbers are 0


def _triangle(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw logits with one triangle at exp(-60): Sinkhorn then converges only as 1 / t.

    The result's entries in that triangle come from eps alone.
    """
    n = shape[-1]
    return rng.normal(0, 0.5, shape) - 60 * np.tril(np.ones((n, n)), -1)


def _biases(pre: float, res: Draw) -> Draw:
    """Draw biases: H_pre's gates at sigmoid(pre), H_post's open, H_res's from ``res``."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        (size,) = shape
        n = int(np.sqrt(size + 1)) - 1  # of n * n + 2 * n
        if n * n + 2 * n != size:  # head's biases, one for each stream
            return rng.normal(pre, 0.5, shape)
        gates = rng.normal([[pre], [0.0]], 0.5, (2, n))
        return np.concatenate([gates.ravel(), res(rng, (n, n)).ravel()])

    return draw


def _of_size(size: float) -> Draws:
    return (("x", _normal(size)), ("y", _normal(size)))


SLOWLY: Draws = (("logits", _triangle), ("matrix", _triangle), ("h_res_raw", _triangle))

# in addition to APART, one of the variants of every op
SMALLER: Sequence[tuple[str, Variant, Draws]] = (
    (
        "middling constants, all apart",
        MIDDLE,
        (*_of_size(5e-3), ("bias", _biases(-8, _normal(1)))),
    ),
    (
        "little constants, all apart",
        LITTLE,
        (*_of_size(4e-11), ("bias", _biases(-16, _triangle))),
    ),
)


# In the last, the streams are so small beside the norm's output that H_res does not show.
NORMS = (("large", 0.4, 1.0, SLOW), ("middling", 3e-5, 5e-3, 33), ("little", 2e-21, 4e-11, 7))


MOST = Sizes((2,), 130, 3, "n past any number of streams that is likely to be written down")


def _static(**values: Any) -> Static:
    return tuple(values.items())


BY_HAND: Sequence[Case] = (
    *(
        Case(op, label, SMALL, with_variant(op, variant, h_norm_eps=eps), draws, dtypes=PLAIN)
        for op in PROJECTED
        for (label, variant, draws), eps in zip(SMALLER, (6e-5, 5e-21), strict=True)
    ),
    # an eps outside of the norm's root, by formulas alone: kernels have none
    *(
        Case(
            op,
            f"{label}, norm_root_eps",
            SMALL,
            with_variant(op, replace(variant, norm_root_eps=root), h_norm_eps=eps, h_raw=True),
            draws,
            dtypes=("float64",),
            usual=("float64",),
        )
        for op in PROJECTED
        for label, variant, root, eps, draws in (
            ("large", APART, 0.3, 0.25, ()),
            ("middling", MIDDLE, 7e-4, 6e-5, SMALLER[0][2]),
            ("little", LITTLE, 6e-9, 5e-21, SMALLER[1][2]),
        )
    ),
    # nearly closed gates: with phi = 0 and no cotangent of x, only they carry the streams' gradient
    *(
        Case(
            op,
            label,
            SMALL,
            with_variant(op, variant, h_norm_eps=variant.norm_eps),
            (("phi", _zero), ("bias", _biases(-16, _normal(1)))),
            dtypes=PLAIN,
            quiet=("x",),
        )
        for label, variant, ops in (
            ("closed gates", LITTLE, ("pre", "combine_pre", "head", *H_NORMED)),
            ("closed gates, no eps", NOTHING, PROJECTED),
        )
        for op in ops
    ),
    # Sinkhorn alone: more iterations than the usual 20, on inputs that have not converged by then
    *(
        Case("sinkhorn", label, SMALL, _static(iterations=iterations, eps=eps, first=first), draws)
        for label, iterations, eps, first, draws in (
            (f"{SLOW} iterations, eps=0", SLOW, 0.0, "rows", SLOWLY),
            (f"{SLOW} iterations, little eps", SLOW, 4e-7, "columns", SLOWLY),
            ("middling eps", 7, 2e-3, "rows", ()),
            ("large eps", 33, 0.3, "columns", ()),
        )
    ),
    Case("static_mappings", f"{SLOW} iterations", SMALL, _static(iterations=SLOW), SLOWLY),
    *(
        Case(
            "sinkhorn_knopp",
            f"{SLOW} iterations, log_space={log_space}",
            SMALL,
            _static(max_iterations=SLOW, epsilon=0.0, log_space=log_space),
            SLOWLY,
        )
        for log_space in (True, False)
    ),
    Case(
        "sinkhorn_knopp",
        "a large epsilon, and at most 2 iterations",
        SMALL,
        _static(max_iterations=2, epsilon=0.3, log_space=False),
    ),
    *(
        Case(
            "sinkhorn_knopp",
            f"epsilon={epsilon}, which float32 does not come to",
            SMALL,
            _static(max_iterations=60, epsilon=epsilon, log_space=True),
            (("matrix", _normal(1)),),
            dtypes=("float64",),
            usual=("float64",),
        )
        for epsilon in (1e-9, 0.0)
    ),
    Case("expand", "more streams than models have", MOST, _static(n=MOST.n)),
    # the norms, and static_layer's norm together with Sinkhorn
    *(
        Case(op, f"{label} eps", SMALL, _static(eps=eps), _of_size(size), dtypes=PLAIN)
        for op in ("rms_norm", "gated_pre", "gated_head")
        for label, eps, size, _ in NORMS
    ),
    *(
        Case(
            "static_layer",
            f"{label} eps, {iterations} iterations",
            SMALL,
            _static(eps=eps, iterations=iterations),
            (*_of_size(size), *SLOWLY),
            dtypes=PLAIN,
        )
        for label, eps, size, iterations in NORMS
    ),
)


COUNTS = (7, 33, SLOW, 2)
NUMBERS = (0.3, 4e-7, 3e-4, 0.0)


def _declared(op: str) -> Iterator[Case]:
    """Yield cases in which all static arguments differ, if any is a count or a number.

    Each takes all values of ``COUNTS`` or ``NUMBERS`` that its check accepts, and one below and one
    above its default.
    """
    names = [name for name in declaration(op).static if name != "n"]
    values = {
        name: chosen(op, name, (*COUNTS, *around(op, name)), (*NUMBERS, *around(op, name)))
        for name in names
    }
    if all(isinstance(value, (bool, str)) for some in values.values() for value in some):
        return
    for at in range(max(map(len, values.values()))):
        static: dict[str, Any] = {}
        for shift, (name, some) in enumerate(values.items()):
            turned = [some[(at + shift + step) % len(some)] for step in range(len(some))]
            new = (one for one in turned if one not in static.values())
            static[name] = next(new, turned[0])
        label = ", ".join(f"{name}={value}" for name, value in static.items())
        yield Case(op, label, SMALL, _static(**static), dtypes=WIDE, usual=("float32", "float64"))


CONSTANTS: Sequence[Case] = (
    *BY_HAND,
    *(case for op in math.OPS if op not in {case.op for case in BY_HAND} for case in _declared(op)),
)


# --- the ends of float32's range --------------------------------------------------------------

BOUND = 1e18
"""The largest size of streams that are compared with the oracle, forward and gradient."""

NORMED = (
    *((op, with_variant(op, DEEPSEEK_V4, h_raw=True)) for op in PROJECTED),
    *((op, _static(eps=1e-5)) for op in ("rms_norm", "gated_pre", "gated_head")),
    ("static_layer", _static(eps=1e-5, iterations=20)),
)


def _up_to(bound: float) -> Draw:
    """Draw numbers between half the bound and the bound, of both signs."""
    return lambda rng, shape: rng.uniform(bound / 2, bound, shape) * rng.choice([-1.0, 1.0], shape)


def _far_apart(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw logits of 3e38 at a permutation, -3e38 elsewhere: the difference overflows float32."""
    n = shape[-1]
    return 3e38 * (2 * np.eye(n)[rng.permutation(n)] - 1) * np.ones(shape)


def _far_below(first: str) -> Draw:
    """Return a draw of logits with one line that underflows once the other lines are normalised.

    Only the differences within that line then matter.
    """

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        n = shape[-1]
        logits = -2e38 * np.ones(shape)
        logits[..., np.maximum(1, np.arange(n)), np.arange(n)] = 3e38  # one in each column
        logits[..., 0, :] = -1e38 * (1 + 2 * rng.permutation(n) / n)
        return logits if first == "columns" else np.swapaxes(logits, -1, -2)

    return draw


def _one_for_both(_: str) -> Draw:
    return _far_apart


HUGE: Sequence[tuple[str, Callable[[str], Draw]]] = (
    ("logits of 3e38 and -3e38", _one_for_both),
    ("a line below all floats", _far_below),
)


def _at(sizes: Sizes, op: str) -> Static:
    """Return the static arguments with which an op is tried at one of the size classes."""
    return next(case.static for case in cases(op) if case.sizes == sizes)


RANGE: Sequence[Case] = (
    *(
        Case(
            op,
            "streams of 1e15",
            SMALL,
            static,
            (("x", _normal(1e15)), ("y", _normal(1e15))),
            dtypes=PLAIN,
        )
        for op, static in NORMED
    ),
    *(
        Case(
            op,
            "streams up to 1e18",  # the squares of one token add up to more than a float holds
            TAIL,
            _at(TAIL, op),  # which is compiled for that size anyway
            (("x", _up_to(BOUND)), ("y", _up_to(BOUND))),
            dtypes=WIDE,
            usual=EITHER,
        )
        for op, _ in NORMED
    ),
    *(
        Case(op, "streams of 1e-15, no eps", SMALL, static, _of_size(1e-15), dtypes=PLAIN)
        for op, static in (
            *((op, with_variant(op, NOTHING, h_norm_eps=0.0)) for op in PROJECTED),
            *((op, _static(eps=0.0)) for op in ("rms_norm", "gated_pre", "gated_head")),
            ("static_layer", _static(eps=0.0, iterations=2)),
        )
    ),
    *(
        Case(
            "sinkhorn",
            f"{label}, eps={eps}, {first} first",
            SMALL,
            _static(iterations=20, eps=eps, first=first),
            (("logits", draw(first)),),
            dtypes=PLAIN,
        )
        for label, draw in HUGE
        for eps, first in ((0.0, "rows"), (0.0, "columns"), (1e-6, "columns"))
    ),
    *(
        Case(
            "sinkhorn_knopp",
            label,
            SMALL,
            _static(max_iterations=20, epsilon=0.0, log_space=True),
            (("matrix", draw("rows")),),
            dtypes=PLAIN,
        )
        for label, draw in HUGE
    ),
)

CASES: Sequence[Case] = (*CONSTANTS, *RANGE)


def quick(op: str, most: int | None = None) -> Case:
    """Return the one case of an op that detects most, with ``most`` streams or fewer.

    ``mhc conformance --quick`` runs only this case.
    """
    every = itertools.chain((case for case in CONSTANTS if case.op == op), cases(op))
    return next(case for case in every if most is None or case.sizes.n <= most)


# --- second derivatives -----------------------------------------------------------------------

# One of each op, and two of Sinkhorn, with eps and without: compilers take seconds for each.
# The reference is a difference along steps of 2e-3: so no clamp and no largest logit, whose
# gradients jump.
SMOOTH = replace(APART, sinkhorn_start="softmax", sinkhorn_clamp=None)
SHORT = replace(SMOOTH, norm_eps=1e-3, sinkhorn_iterations=3)


def _second(op: str, shared: bool = False, **values: Any) -> Case:
    label = "second derivatives" + ", shared mappings" * shared
    return Case(op, label, SMALL, _static(**values), shared=shared)


def _short(op: str) -> dict[str, Any]:
    """Return static arguments of a second derivative: short loops, and an eps that matters."""
    declared = declaration(op).static
    if check_variant in declared.values():
        return dict(with_variant(op, SHORT, h_norm_eps=1e-3, h_raw=True))
    sized = {"n": SMALL.n}
    return {name: sized.get(name) or chosen(op, name, (3,), (1e-3,))[-1] for name in declared}


SECOND: Sequence[Case] = (
    *(
        _second(op, shared=op in MAPPED, **_short(op))
        for op in math.OPS
        if op not in ("sinkhorn", "sinkhorn_knopp")
    ),
    # this one first, for ``compile``: in the log domain MLX makes twice as many kernels
    _second("sinkhorn", iterations=3, eps=0.1, first="rows"),
    _second("sinkhorn", iterations=3, eps=0.0, first="columns"),
    # without an early end of the loop, where the result jumps
    _second("sinkhorn_knopp", max_iterations=3, epsilon=0.0, log_space=True),
)
"""The cases of the check ``second``."""
