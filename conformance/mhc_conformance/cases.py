"""The cases of every op: sizes, static arguments and inputs, all from one seed.

They follow from the ops' declarations: every size class, every dtype, the values of each static
argument, mappings per token and shared by all, parameters as narrow as the streams, NaN in some
tokens. ``SPECIAL`` adds cases written by hand for single ops.

The grid is pruned: size classes and static arguments are paired in turn, so that each occurs at
least once. Not every pair occurs, because no backend's code depends on both at a time.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance import oracle
from mhc_core import DEEPSEEK_V4, DEEPSEEK_V41, LIGER, PAPER, XING40, Variant, math
from mhc_core.backend import DTYPES
from mhc_core.checks import Check
from mhc_core.signature import Op, signature
from mhc_core.variants import check_variant

__all__ = [
    "APART",
    "H_NORMED",
    "MAPPED",
    "NARROW",
    "PROJECTED",
    "PROJECTED_OR_MIXED",
    "SMALL",
    "STATICS",
    "TAIL",
    "TOKENS",
    "Case",
    "Data",
    "Draw",
    "Sizes",
    "Static",
    "accepted",
    "around",
    "cases",
    "chosen",
    "dealt",
    "numpy_dtype",
    "rank_of",
    "with_variant",
]

Array = NDArray[Any]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]


def numpy_dtype(name: str) -> Any:
    """Return NumPy's dtype of that name, bfloat16 included."""
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


# --- sizes ------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """One size class, with the bug that it is meant to catch."""

    leading: tuple[int, ...]
    n: int
    C: int
    why: str


SIZES = (
    Sizes((2, 3), 4, 8, "an ordinary batch"),
    Sizes((7,), 9, 37, "n past a loop unrolled by 8, C no multiple of a vector"),
    Sizes((), 1, 7, "no leading axes; one stream, whose H_res is 1"),
    Sizes((3,), 2, 1, "one channel"),
    Sizes((4,), 4, 4, "all sizes equal: a matrix normalised on the wrong axes still fits"),
    Sizes((1031,), 3, 5, "many tokens, an odd number: carry-over between rows"),
    Sizes((3,), 4, 1028, "many channels, with a tail"),
    Sizes((2,), 32, 6, "the most streams that kernels take"),
    Sizes((1,), 64, 2, "two H_res of it take more than 32 KiB of threadgroup memory"),
)
HANDS = 16  # among which ``dealt`` deals the cases
LOW_RANK, BLOCK_RANK = 3, 64  # R of gates; the second one with channels in whole blocks of 32
SMALL = SIZES[0]
TAIL = SIZES[6]
# not in SIZES, because it tests no variant; n C is a multiple of 64, as in real models
EMPTY = Sizes((0,), 4, 64, "no tokens at all")


# --- inputs -----------------------------------------------------------------------------------


def _normal(scale: float, shift: float = 0.0) -> Draw:
    return lambda rng, shape: rng.normal(shift, scale, shape)


def _positive(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.uniform(0.05, 1.95, shape)


def _projection(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.normal(0, 1, shape) / np.sqrt(shape[-1])


def _mixing(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw positive entries as large as a doubly stochastic matrix's, without any symmetry."""
    return rng.uniform(0.05, 1.95, shape) / shape[-1]


def draw_of(patterns: Sequence[Sequence[str]]) -> Draw:
    """Return the draw for an array from its declared shape, given as ``Op.patterns`` has it.

    A projection's entries are as small as its rows are long; mappings, scales and weights are
    positive; matrices that Sinkhorn starts from are spread wide. All else is standard normal.
    """
    per_token = patterns[0][0] == "..."
    own = patterns[0][per_token:]
    if own[-1] == "nC":
        return _projection
    if len(patterns) > 1:  # a mapping, per token or shared
        return _mixing if own == ["n", "n"] else _positive
    if own == ["n", "n"]:
        return _normal(2)
    if not per_token and (own in (["C"], ["parts"]) or own[0].isdigit()):
        return _positive
    return _normal(1)


# --- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of one op; everything in it follows from its fields and a seed."""

    op: str
    label: str
    sizes: Sizes
    static: tuple[tuple[str, Any], ...] = ()
    draws: tuple[tuple[str, Draw], ...] = ()  # instead of draw_of's
    shared: bool = False  # one H_pre, H_post, H_res for all tokens
    for_all: tuple[str, ...] = ()  # or these arguments for all tokens, the others per token
    optional: bool = False  # with the op's optional array h_pre
    unmixed: bool = False  # without its optional array h_res
    narrow: bool = False  # parameters and mappings in the streams' dtype too
    gradient_scale: float = 1.0
    quiet: tuple[str, ...] = ()  # outputs whose cotangent is 0
    dtypes: tuple[str, ...] = ()  # the dtypes that its values allow; () for all
    usual: tuple[str, ...] = ("float32",)  # the dtypes in which it runs without ``full``

    @property
    def name(self) -> str:
        """Return the name of the case in reports."""
        sizes = self.sizes
        return f"{self.label} (leading {sizes.leading}, n={sizes.n}, C={sizes.C})"

    @property
    def iterations(self) -> int:
        """Return the largest number of Sinkhorn iterations that the case asks for; 0 for none."""
        op = declaration(self.op)
        if not {"h_res", "h_res_raw"} & {*op.outputs, *op.arrays}:
            return 0  # head does not use its variant's Sinkhorn
        static = {name: getattr(value, "sinkhorn_iterations", value) for name, value in self.static}
        named = ("iterations", "max_iterations", "variant")
        return max((static[name] for name in named if name in static), default=0)

    @property
    def options(self) -> dict[str, Any]:
        """Return the static arguments."""
        return dict(self.static)

    @property
    def mixes(self) -> bool:
        """Return whether streams are mixed, or an H_res is made to mix them."""
        return "identity" not in self.mixers

    @property
    def mixers(self) -> tuple[str, ...]:
        """Return the mixers that a backend needs for it."""
        named = self.options["variant"].mixer if declaration(self.op).projects else None
        wanted = (named, "identity" if "h_res" in self.absent else None)
        return tuple(dict.fromkeys(mixer for mixer in wanted if mixer))

    @property
    def asked(self) -> dict[str, Any]:
        """Return the options with which the oracle answers the case."""
        return {**self.options, "absent": self.absent}

    @property
    def absent(self) -> tuple[str, ...]:
        """Return the op's optional arrays that the case leaves out."""
        given = {"h_pre": self.optional, "h_res": not self.unmixed}
        return tuple(name for name in declaration(self.op).optional if not given[name])

    @property
    def names(self) -> list[str]:
        """Return the arrays that the case has."""
        return [name for name in declaration(self.op).arrays if name not in self.absent]

    def placed(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Return the case's arrays as the op takes them: None for one that is absent."""
        given, names = dict(zip(self.names, arrays, strict=True)), list(declaration(self.op).arrays)
        last = max(names.index(name) for name in given)
        return tuple(given.get(name) for name in names[: last + 1])


class Data(NamedTuple):
    """A case's arrays: the primals, and a cotangent for each output."""

    primals: tuple[Array, ...]
    cotangents: tuple[Array, ...]


def declaration(op: str) -> Op:
    """Return the declaration of an op."""
    return math.load(op).OP


@lru_cache(maxsize=512)
def data(case: Case, dtype: str, seed: int) -> Data:
    """Draw a case's arrays."""
    words = f"{case.op} {case.label} {case.sizes} {seed}"
    rng = np.random.default_rng(zlib.crc32(words.encode()))
    op = declaration(case.op)
    draws = {name: draw_of(patterns) for name, patterns in op.patterns.items()}
    draws.update(case.draws)
    primals: tuple[Array, ...] = tuple(
        draws[name](rng, _shape(op, name, case)).astype(
            numpy_dtype(_dtype(op, name, dtype, case.narrow))
        )
        for name in case.names
    )
    if case.op == "sinkhorn_knopp":
        primals = (_decided(rng, np.array(primals[0]), **case.options),)
    call = signature(declaration, case.op, case.placed(primals), case.options)
    cotangents = tuple(
        (rng.normal(size=shape) * scale).astype(numpy_dtype(dtype))
        for shape, dtype, scale in zip(
            call.output_shapes,
            call.output_dtypes,
            [
                0.0 if name in case.quiet else case.gradient_scale
                for name in op.outputs_of(case.options)
            ],
            strict=True,
        )
    )
    for array in (*primals, *cotangents):
        array.flags.writeable = False  # they are drawn once and shared by all checks
    return Data(primals, cotangents)


def rank_of(C: int) -> int:
    """Return the rank of gates with a low-rank projection."""
    return LOW_RANK if C % 32 else BLOCK_RANK


def _shape(op: Op, name: str, case: Case) -> tuple[int, ...]:
    leading, n, C, _ = case.sizes
    known = {**op.sizes(n, C, case.options), "R": rank_of(C)}
    words = op.patterns[name][-1 if case.shared or name in case.for_all else 0]
    ahead = leading if words[0] == "..." else ()
    return (*ahead, *(known[w] if w in known else int(w) for w in words if w != "..."))


def _dtype(op: Op, name: str, dtype: str, narrow: bool) -> str:
    """Return the dtype of streams, or of an op's only array; all others are float32."""
    streams = op.patterns[name][0][0] == "..." and op.patterns[name][0][-1] in ("C", "D")
    if narrow or streams or dtype == "float64" or len(op.arrays) == 1:
        return dtype
    return "float32"


def _decided(
    rng: np.random.Generator, matrices: Array, max_iterations: int, epsilon: float, log_space: bool
) -> Array:
    """Redraw each matrix whose error comes so close to epsilon that rounding would decide."""
    while (again := _undecided(matrices, max_iterations, epsilon, log_space)).any():
        matrices[again] = rng.normal(0, 2, matrices[again].shape)
    return matrices


def _undecided(matrices: Array, max_iterations: int, epsilon: float, log_space: bool) -> Array:
    running = np.ones(matrices.shape[:-2], bool)
    close = ~running
    for steps in range(1, max_iterations + 1):
        options = {"max_iterations": steps, "epsilon": 0.0, "log_space": log_space}
        (value,) = oracle.forward("sinkhorn_knopp", (matrices,), **options)
        errors = [np.abs(value.sum(axis=axis) - 1).max(axis=-1) for axis in (-1, -2)]
        error = np.maximum(*errors)
        close |= running & (0.98 * epsilon < error) & (error < 1.02 * epsilon)
        running &= error >= epsilon
    return close


# --- what follows from the declarations -------------------------------------------------------

APART = Variant(
    norm_eps=0.4,
    pre_eps=0.2,
    post_scale=1.5,
    post_eps=0.3,
    sinkhorn_iterations=7,
    sinkhorn_eps=0.15,
    sinkhorn_first="rows",
    sinkhorn_start="exp",
    sinkhorn_clamp=(-1.3, 1.1),
    res_transposed=True,
)
"""Constants that all differ, from each other and from published ones, and show on any input."""

VARIANTS = (
    ("DEEPSEEK_V4", DEEPSEEK_V4),
    ("PAPER", PAPER),
    ("DEEPSEEK_V41", DEEPSEEK_V41),
    ("LIGER", LIGER),
    ("rows first, transposed, eps 0", replace(PAPER, sinkhorn_first="rows", res_transposed=True)),
    ("large constants, all apart", APART),
    ("one iteration, eps", replace(LIGER, sinkhorn_iterations=1)),
    ("one iteration, eps 0", replace(PAPER, sinkhorn_iterations=1)),
    ("XING40", XING40),
)

Static = tuple[tuple[str, Any], ...]

V4: Static = (("variant", DEEPSEEK_V4),)

PROJECTED = tuple(op for op in math.OPS if "phi" in declaration(op).arrays)
"""The ops that compute mappings from the streams."""

PROJECTED_OR_MIXED = ("mappings", "pre", "combine", "combine_pre")
"""The ops that make H_res of the streams, or take one."""

H_NORMED = tuple(op for op in PROJECTED if "h_norm_weight" in declaration(op).arrays)
"""The ops that also normalise h."""

MAPPED = tuple(
    op
    for op in math.OPS
    if op not in PROJECTED and any(len(words) > 1 for words in declaration(op).patterns.values())
)
"""The ops that accept mappings, per token or shared by all tokens."""


def _statics(**choices: Sequence[Any]) -> list[tuple[str, Static]]:
    """Return every combination of static arguments, each with a name of its own."""
    combinations = [
        dict(zip(choices, v, strict=True)) for v in itertools.product(*choices.values())
    ]
    return [
        (", ".join(f"{k}={v}" for k, v in c.items()) or "plain", tuple(c.items()))
        for c in combinations
    ]


def accepted(op: str, name: str, values: Iterable[Any]) -> list[Any]:
    """Return those of some values that the declared check of a static argument accepts."""
    check = declaration(op).static[name]
    return [value for value in dict.fromkeys(values) if _passes(check, value)]


def _passes(check: Check, value: Any) -> bool:
    try:
        check("", "", value)
    except (TypeError, ValueError):
        return False
    return True


def chosen(op: str, name: str, count: Sequence[int], number: Sequence[float]) -> Sequence[Any]:
    """Return values for a static argument, by its type in the public function and by its check.

    These are all words or both booleans where there is a choice, else those of ``count`` or of
    ``number`` that the check accepts. Where it accepts fewer than two, others follow, first those
    near the default.
    """
    of = get_type_hints(getattr(mhc_core, op))[name]
    if get_origin(of) is Literal:
        return accepted(op, name, get_args(of))
    known: Mapping[Any, Sequence[Any]] = {bool: (True, False), int: count, float: number}
    if of not in known:
        raise TypeError(f"{op}: no values of {name} follow from {of}; needs some in STATICS")
    found = accepted(op, name, known[of])
    if len(found) < min(2, len(known[of])):
        others = {int: OTHER_COUNTS, float: OTHER_NUMBERS}.get(of, ())
        found = accepted(op, name, (*found, *around(op, name), *others))[:2]
    if not found:
        raise TypeError(
            f"{op}: the check of {name} accepts none of the kit's values; needs some in STATICS"
        )
    return found


OTHER_COUNTS = (1, 2, 5, 16, 64)
OTHER_NUMBERS = (0.75, 1.5, 3.0, 12.0, 100.0, -0.5, -2.0)


def around(op: str, name: str) -> list[Any]:
    """Return an argument's default with one value below it and one above, where it has those."""
    middle = default(op, name, None)
    if isinstance(middle, bool) or not isinstance(middle, (int, float)):
        return []
    if isinstance(middle, int):
        return accepted(op, name, (middle, middle - 1, middle + 1))
    apart = [abs(middle) * part for part in (0.7, 0.2, 0.03)]
    below = accepted(op, name, [middle - by for by in apart])
    above = accepted(op, name, [middle + by for by in apart])
    return list(dict.fromkeys((middle, *below[:1], *above[:1])))


def default(op: str, name: str, otherwise: Any) -> Any:
    """Return the default of an argument of the public function, or ``otherwise``."""
    found = inspect.signature(getattr(mhc_core, op)).parameters[name].default
    return otherwise if found is inspect.Parameter.empty else found


def _declared(op: str) -> list[tuple[str, Static]]:
    """Return an op's static arguments in every combination; n follows from the size class."""
    declared = declaration(op).static
    values = {
        name: chosen(op, name, (default(op, name, 20), 2), (default(op, name, 1e-5), 0.1))
        for name in declared
        if name not in ("n", "variant")
    }
    if check_variant not in declared.values():
        return _statics(**values)
    # the other arguments in turn: the classes of one stream and of one channel meet a large eps
    return [
        (label, with_variant(op, variant, **_in_turn(values, at)))
        for at, (label, variant) in enumerate(VARIANTS)
    ]


def _in_turn(values: Mapping[str, Sequence[Any]], at: int) -> dict[str, Any]:
    """Return one value of each argument, so that any two of them meet in four steps of two."""
    pairs = enumerate(values.items(), 1)
    return {name: some[(at >> shift) % len(some)] for shift, (name, some) in pairs}


def with_variant(op: str, variant: Variant, **others: Any) -> Static:
    """Return an op's static arguments: a variant, and others, of which it may have some or none."""
    names = [name for name in declaration(op).static if name != "variant"]
    values = ((name, others.get(name, default(op, name, None))) for name in names)
    return (("variant", variant), *values)


STATICS: Mapping[str, list[tuple[str, Static]]] = {
    **{op: _declared(op) for op in math.OPS},
    # each number of iterations with each eps, the axes in turn
    "sinkhorn": [
        one
        for at, first in enumerate(("columns", "rows"))
        for one in _statics(iterations=(20, 1, 3), eps=(0.0, 1e-6, 0.1), first=(first,))[at::2]
    ],
    # the last has a pre_eps of its own
    "head": [(label, (("variant", variant),)) for label, variant in (*VARIANTS[:2], VARIANTS[5])],
    # With one stream or one channel, the norm undoes what its input's size did, but for eps: a
    # gradient of rounding alone, unless eps is large. So those size classes meet the large eps.
    "static_layer": [
        *_statics(eps=(1e-5,), iterations=(20, 2)),
        *_statics(eps=(0.1,), iterations=(20, 2)),
    ],
    # an epsilon that ends the loop early, and one that never does
    "sinkhorn_knopp": _statics(
        max_iterations=(20, 3), epsilon=(0.02, 0.0), log_space=(True, False)
    ),
}
"""The static arguments of each op, by the declarations; a few are chosen by hand."""


def _first_static(op: str, sizes: Sizes) -> Static:
    """Return an op's first static arguments, DEEPSEEK_V4 for a variant."""
    first = with_variant(op, DEEPSEEK_V4, h_raw=True) if op in PROJECTED else STATICS[op][0][1]
    return _sized(op, sizes, first)


def _sized(op: str, sizes: Sizes, static: Static) -> Static:
    """Return static arguments with n, where an op has it among them."""
    return (("n", sizes.n), *static) if "n" in declaration(op).static else static


# --- draws of special cases -------------------------------------------------------------------


def _constant(value: float) -> Draw:
    return lambda _, shape: np.full(shape, value)


def _dominated(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw logits near a permutation, some far beyond exp's range, one line far below all."""
    logits = rng.normal(0, 1, shape) + 200 * np.eye(shape[-1])[rng.permutation(shape[-1])]
    logits[..., 0, :] -= 300
    return logits


def _masked(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw logits of -inf outside a cyclic band: every line keeps two finite entries."""
    n = shape[-1]
    band = np.eye(n, dtype=bool) | np.roll(np.eye(n, dtype=bool), 1, axis=1)
    return np.where(band, rng.normal(0, 1, shape), -np.inf)


def _with_a_silent_token(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    streams = rng.normal(0, 1, shape)
    streams[0] = 0
    return streams


def _identity_init(_: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.broadcast_to(np.eye(shape[-1]) * 12 - 12, shape)


def _unknown(token: int) -> Draw:
    """Return a draw that puts NaN into one number of one token of SMALL."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        values = rng.normal(0, 1, shape)
        values[np.unravel_index(token, SMALL.leading)].reshape(-1)[1] = np.nan
        return values

    return draw


def _unknowns(op: str) -> tuple[tuple[str, Draw], ...]:
    """Return a draw for every per-token argument of an op, each with NaN in another token."""
    patterns = declaration(op).patterns
    own = [name for name, words in patterns.items() if words[0][0] == "..."]
    return tuple((name, _unknown(1 + at)) for at, name in enumerate(own))


def _cancelling(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw streams of alternating signs that nearly cancel in a sum."""
    signs = np.where(np.arange(shape[-2]) % 2, -1.0, 1.0)[:, None]
    return signs * (256 + 2 * rng.integers(0, 4, shape))


def _shared_in_part(op: str) -> list[tuple[str, ...]]:
    """Return each of the mappings that all tokens may share, to be shared alone.

    With the cases that share none or all of them, any two mappings occur in all four ways.
    """
    either = [name for name, words in declaration(op).patterns.items() if len(words) > 1]
    return [(name,) for name in either] if len(either) > 1 else []


def _some_wide(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw matrices, every second one beyond exp's range."""
    values = rng.normal(0, 2, shape)
    values.reshape(-1, *shape[-2:])[::2] *= 40
    return values


def _far_apart(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw matrices with one line so far below the others that its shifted exp underflows."""
    values = rng.normal(0, 2, shape)
    values[..., 0, :] -= 100
    return values


KNOPP = (("max_iterations", 20), ("epsilon", 0.0), ("log_space", True))
LOG = (("iterations", 20), ("eps", 0.0), ("first", "columns"))
EPS = (("iterations", 20), ("eps", 1e-6), ("first", "columns"))
ZERO = _constant(0.0)

# Further sizes, for ops whose backends may run other code there: they split work by the number of
# tokens, and channels into blocks, with a separate path for whole blocks.
BLOCKS = Sizes((5,), 4, 288, "channels in whole blocks of 32, as in real models")
MORE_BLOCKS = Sizes((20,), 4, 96, "whole blocks, more than 16 tokens")
BETWEEN = Sizes((16,), 6, 160, "streams between two powers of two")
FULL = Sizes((8,), 4, 8, "as many matrices as fit side by side")
MOST = SIZES[7]
LARGE: Sequence[tuple[Sizes, tuple[str, ...]]] = (
    (BLOCKS, (*PROJECTED, "gated_pre", "gated_head")),
    (MORE_BLOCKS, ("combine_pre",)),
    (Sizes((18,), 9, 288, "whole blocks, many streams, more than 16 tokens"), ("combine_pre",)),
    (Sizes((515,), 2, 64, "whole blocks, hundreds of tokens"), PROJECTED),
    (BETWEEN, ("static_layer",)),
    (Sizes((257,), 2, 257, "hundreds of tokens, an odd number of channels"), MAPPED),
    (
        Sizes((257,), 1, 257, "hundreds of tokens of one stream"),
        ("pre", "combine_pre", "head"),
    ),
    (Sizes((2,), 2, 4128, "thousands of channels"), ("mappings", "pre", "head")),
    (
        Sizes((3,), 3, 6, "channels in pairs"),
        ("combine", "gated_combine", "static_layer", "pre_norm"),
    ),
    (Sizes((2,), 4, 5124, "more channels than a thread can keep"), ("static_layer",)),
    (Sizes((2,), 32, 40, "the most streams, each longer than a tile"), ("static_layer",)),
    (Sizes((2,), 1, 17412, "more channels than a thread can keep"), ("rms_norm",)),
    (Sizes((2,), 2, 17412, "more channels than a thread can keep"), ("pre_norm",)),
)
TOKENS: Sequence[tuple[Sizes, str, tuple[str, ...]]] = (  # so many that products run other code
    (
        Sizes((8192,), 1, 288, "thousands of tokens, whole blocks"),
        *("mappings", ("float32", "bfloat16")),
    ),
    (Sizes((16385,), 3, 5, "tens of thousands of tokens"), "head", ("float32",)),
)
SLABS: Sequence[tuple[Sizes, tuple[str, ...]]] = (  # for which narrow streams may run other code
    (Sizes((20,), 4, 128, "whole slabs of 64 channels, two tiles of tokens"), PROJECTED),
    (Sizes((35,), 2, 128, "two streams, a whole slab of 128 channels"), ("pre", "combine_pre")),
)
LIBRARY_SIZES = (*SIZES, *(sizes for sizes, *_ in TOKENS))  # where a library may run other code
ONCE = (("variant", replace(DEEPSEEK_V4, sinkhorn_iterations=1)),)
MIXED = {
    name: replace(PAPER, norm_eps=1e-3, norm_root_eps=0.1, mixer=name, mixer_options=options)
    for name, options in (
        ("mhc-lite", {}),
        ("kromhc", {}),
        ("circulant", {"gamma": 0.4}),
        ("go-mhc", {"s": 2}),
        ("sinkhorn-limit", {}),
    )
} | {"mhc-lite, transposed": replace(PAPER, mixer="mhc-lite", res_transposed=True)}
UNMIXED_APART = replace(APART, mixer="identity")
UNMIXED: Static = (("variant", UNMIXED_APART),)
# sizes at which streams that are not mixed may take code of their own
ALONE: Sequence[tuple[Sizes, tuple[str, ...]]] = (
    (BLOCKS, PROJECTED_OR_MIXED),
    (SIZES[1], PROJECTED_OR_MIXED),
    (Sizes((515,), 2, 64, "whole blocks, hundreds of tokens"), ("mappings", "pre", "combine_pre")),
    (Sizes((1031,), 3, 5, "many tokens, an odd number"), ("mappings", "pre")),
    (Sizes((257,), 1, 257, "hundreds of tokens of one stream"), ("pre", "combine", "combine_pre")),
    (Sizes((2,), 2, 4128, "thousands of channels"), ("mappings", "pre", "combine")),
    (SIZES[7], ("combine",)),
    (Sizes((16,), 4, 288, "whole blocks, 16 tokens"), ("combine_pre",)),
    (Sizes((17,), 18, 5, "more columns than a tile of tokens"), ("combine_pre",)),
    (Sizes((3,), 3, 6, "channels in pairs"), ("pre", "combine", "combine_pre")),
    (Sizes((18,), 9, 288, "whole blocks, many streams, more than 16 tokens"), ("combine_pre",)),
)
P20, P1 = ((("variant", variant),) for variant in (PAPER, replace(PAPER, sinkhorn_iterations=1)))
NARROW = ("float16", "bfloat16")
BFLOAT16 = ("bfloat16",)
EITHER = ("float32", "bfloat16")  # numbers as wide as the computation's, and narrow ones

SPECIAL: Sequence[Case] = (
    *(
        Case(
            op,
            sizes.why,
            sizes,
            _first_static(op, sizes),
            usual=EITHER if sizes in (BLOCKS, MORE_BLOCKS) else ("float32",),
        )
        for sizes, ops in LARGE
        for op in ops
    ),
    *(
        Case(op, sizes.why, sizes, ONCE, dtypes=dtypes, usual=dtypes)
        for sizes, op, dtypes in TOKENS
    ),
    *(
        Case(op, sizes.why, sizes, _first_static(op, sizes), dtypes=BFLOAT16, usual=BFLOAT16)
        for sizes, ops in SLABS
        for op in ops
    ),
    # some matrices beyond exp's range, next to others: a backend may treat the two differently
    *(
        Case(op, f"some beyond exp's range, {sizes.why}", sizes, static, ((name, _some_wide),))
        for op, static, name in (
            ("sinkhorn", LOG, "logits"),
            ("sinkhorn_knopp", KNOPP, "matrix"),
            ("static_mappings", STATICS["static_mappings"][0][1], "h_res_raw"),
        )
        for sizes in (SMALL, BETWEEN)
    ),
    *(
        Case(op, "all beyond exp's range", FULL, static, ((name, _far_apart),))
        for op, static, name in (
            ("sinkhorn", LOG, "logits"),
            ("sinkhorn_knopp", KNOPP, "matrix"),
            ("static_mappings", STATICS["static_mappings"][0][1], "h_res_raw"),
        )
    ),
    *(
        Case(op, f"beyond exp's range, {sizes.why}", sizes, static, (("bias", _normal(25)),))
        for op, sizes, static in (
            ("mappings", MOST, P1),
            ("pre", MOST, P1),
            ("mappings", BETWEEN, P20),
            ("pre", BETWEEN, P20),
            ("combine_pre", BETWEEN, P20),
        )
    ),
    # the same where the streams of each token decide which matrix is beyond exp's range
    Case("mappings", "some beyond exp's range", FULL, P20, (("scale", _constant(11)),)),
    # exp without a max shift overflows above 88; a line that underflows is 0 / 0 by division
    Case("sinkhorn", "logits far beyond exp's range, eps 0", SMALL, LOG, (("logits", _dominated),)),
    Case("sinkhorn", "logits beyond exp's range, eps", SMALL, EPS, (("logits", _normal(60)),)),
    Case("sinkhorn", "masked by -inf, eps 0", SMALL, LOG, (("logits", _masked),)),
    Case("sinkhorn", "masked by -inf, eps", SMALL, EPS, (("logits", _masked),)),
    # the gradient of H_res must not vanish at the starts that everyone uses
    Case("sinkhorn", "all logits equal", SMALL, LOG, (("logits", ZERO),)),
    Case("sinkhorn", "identity start", SMALL, EPS, (("logits", _identity_init),)),
    Case("mappings", "all parameters zero", SMALL, V4, (("phi", ZERO), ("bias", ZERO))),
    Case("pre", "small scale, as trained from", SMALL, V4, (("scale", _constant(0.01)),)),
    # real streams and gradients are larger or smaller than one
    Case("mappings", "large streams", SMALL, V4, (("x", _normal(300)),)),
    Case("mappings", "tiny streams", SMALL, (("variant", PAPER),), (("x", _normal(1e-3)),)),
    Case("pre", "large gradients", SMALL, V4, gradient_scale=3e3),
    Case("combine_pre", "large gradients", SMALL, V4, gradient_scale=3e3),
    Case(
        "static_layer", "large gradients", SMALL, STATICS["static_layer"][0][1], gradient_scale=3e3
    ),
    # the root mean square of a token of zeros, as padding is, has a derivative of its own
    *(
        Case(op, "a token of zeros", SMALL, static, (("x", _with_a_silent_token),))
        for op, static in (("mappings", V4), ("head", V4), ("rms_norm", (("eps", 1e-5),)))
    ),
    # single-pass mHC: the mix comes from the sublayer before
    *(
        Case(op, "h_pre given" + ", shared" * shared, SMALL, static, optional=True, shared=shared)
        for op, static in (
            ("combine_pre", V4),
            ("combine_pre_norm", with_variant("combine_pre_norm", DEEPSEEK_V4, h_raw=True)),
        )
        for shared in (False, True)
    ),
    # each mixer but Sinkhorn, and a norm with an eps outside its root
    *(
        Case("mappings", f"mixer {name}", SMALL, (("variant", variant),))
        for name, variant in MIXED.items()
    ),
    # streams that are not mixed
    *(
        Case(
            op,
            "no mixing" + ", h_pre given" * given,
            SMALL,
            static,
            unmixed=op.startswith("combine"),
            optional=given,
            shared=given,
        )
        for op, given, static in (
            ("mappings", False, UNMIXED),
            ("pre", False, UNMIXED),
            ("combine", False, ()),
            ("combine_pre", False, UNMIXED),
            ("combine_pre", True, UNMIXED),
            *((op, False, with_variant(op, UNMIXED_APART, h_raw=True)) for op in H_NORMED),
        )
    ),
    *(
        Case(
            op,
            f"no mixing, {sizes.why}",
            sizes,
            () if op == "combine" else UNMIXED,
            unmixed=op.startswith("combine"),
            usual=EITHER if sizes == BLOCKS else ("float32",),
        )
        for sizes, ops in ALONE
        for op in ops
    ),
    Case("combine", "no mixing, shared mappings", BLOCKS, shared=True, unmixed=True),
    Case("combine_pre", "no mixing, shared", MORE_BLOCKS, UNMIXED, shared=True, unmixed=True),
    # streams that are not mixed, and then mappings that mix; and the other way round
    *(
        Case("combine_pre", f"no mixing, then H_res, {sizes.why}", sizes, V4, unmixed=True)
        for sizes in (SMALL, SIZES[1], Sizes((20,), 9, 37, "more than 16 tokens"))
    ),
    Case("combine_pre", "no mixing, an h_pre each", SMALL, UNMIXED, optional=True, unmixed=True),
    Case("combine_pre", "H_res, then no mixing", SMALL, UNMIXED),
    # one H_pre, H_post, H_res for all tokens: their gradients are summed over the tokens
    *(
        Case(op, "shared mappings", size, _first_static(op, size), shared=True)
        for op in MAPPED
        for size in (SMALL, EMPTY, Sizes((33,), 3, 5, "odd"))
    ),
    # some mappings shared, the others per token
    *(
        Case(op, f"{' and '.join(some)} shared", size, _first_static(op, size), for_all=some)
        for op in MAPPED
        for some in _shared_in_part(op)
        for size in (SMALL, SIZES[1])
    ),
    *(
        Case(
            "combine_pre",
            f"{' and '.join(some)} shared" + ", h_pre given" * given,
            size,
            V4,
            for_all=some,
            optional=given,
        )
        for some, given, size in (
            *((some, True, SMALL) for some in _shared_in_part("combine_pre")),
            (("h_post", "h_res"), False, SIZES[1]),
            (("h_post",), False, MORE_BLOCKS),
            (("h_res",), False, MORE_BLOCKS),
        )
    ),
    # NaN in one token must not reach another token
    *(
        Case(
            op,
            "NaN in some tokens"
            + "".join(
                f", {name}={value}" for name, value in static if name in ("eps", "log_space")
            ),
            SMALL,
            static,
            _unknowns(op),
            optional="h_pre" in declaration(op).optional,
        )
        for op, static in (
            *((op, _first_static(op, SMALL)) for op in math.OPS),
            ("sinkhorn", EPS),
            ("sinkhorn_knopp", STATICS["sinkhorn_knopp"][1][1]),
        )
    ),
    # where streams cancel, a rounding before the end of the sum shows
    *(
        Case(op, "streams that cancel", SMALL, static, draws, usual=DTYPES)
        for op, static, draws in (
            ("aggregate", (), (("x", _cancelling), ("h_pre", _constant(1.3)))),
            (
                "combine",
                (),
                (("x", _cancelling), ("h_res", _constant(1.3)), ("h_post", _constant(0.7))),
            ),
            (
                "residual_add_aggregate",
                (),
                (("x", _cancelling), ("h_pre", _constant(1.0)), ("res", _normal(0.4))),
            ),
            ("contract", (("how", "sum"),), (("x", _cancelling),)),
            (
                "static_layer",
                STATICS["static_layer"][0][1],
                (("x", _cancelling), ("h_pre_raw", _constant(0.4))),
            ),
        )
    ),
    # parameters and mappings in the streams' dtype
    *(
        Case(
            op,
            "all arrays as narrow as the streams",
            SMALL,
            _first_static(op, SMALL),
            narrow=True,
            dtypes=NARROW,
            usual=("bfloat16",),
        )
        for op in math.OPS
        if len(declaration(op).arrays) > 1
    ),
)


def cases(op: str, dtype: str = "float32", full: bool = False) -> Iterator[Case]:
    """Return an op's cases: its sizes paired with static choices in turn, then the special ones.

    Dtypes other than float32 differ from it in rounding alone, so they get the first case and the
    cases about narrow numbers; bfloat16, which also tests vector loads of narrow numbers, gets the
    first two. ``full`` yields all cases in every dtype.
    """
    choices = STATICS[op]
    count = max(len(SIZES), len(choices))
    if dtype != "float32" and not full:
        count = 2 if dtype == "bfloat16" else 1
    pairs = [(SIZES[index % len(SIZES)], choices[index % len(choices)]) for index in range(count)]
    if full or dtype == "float32":
        pairs.append((EMPTY, choices[0]))
    for sizes, (label, static) in pairs:
        yield Case(op, label, sizes, _sized(op, sizes, static))
    from mhc_conformance.telling import CASES  # which imports this module

    for case in (*SPECIAL, *CASES):
        if case.op == op and _tried(case, dtype, full):
            yield case


def dealt(op: str, dtype: str = "float32") -> Iterator[Case]:
    """Yield those of an op's cases that a neutral backend runs whose library compiles.

    Such a backend runs the formulas that NumPy runs in every case, so its cases look for faults of
    the library, which come with a size or a choice in any op alike; and the library compiles for
    seconds for each. So the first program of an op, the one without tokens, and those with arrays
    absent, shared or narrow at the first size, are all there; every size of ``SIZES`` and
    ``TOKENS`` and every choice of a static argument, or field of a Variant, is there in the
    cheapest op that has it (of numbers, 0 or 1, and one of all others, since the formulas branch on
    no more); of the others, an op gets a sixteenth.
    """
    mine = _dealt(dtype)[op]
    return (case for case in cases(op, dtype) if _program(case) in mine)


@lru_cache
def _dealt(dtype: str) -> Mapping[str, set[Hashable]]:
    tried: set[Hashable] = set()
    hands: dict[str, set[Hashable]] = {}
    for at, op in enumerate(sorted(math.OPS, key=_cost)):
        every = {_program(case): case for case in cases(op, dtype)}
        hands[op] = set()
        for turn, (program, case) in enumerate(every.items()):
            form = case.shared or case.optional or case.unmixed or case.narrow
            whole = case.sizes == SMALL and form and not case.for_all
            kept = turn == 0 or case.sizes == EMPTY or whole
            new = {*_choices(case)} - tried
            if kept or new or (at + turn) % HANDS == 0:
                hands[op].add(program)
                tried |= new
    return hands


def _choices(case: Case) -> Iterator[Hashable]:
    """Yield what a library may compile in another way: sizes, and choices of static arguments."""
    if case.sizes in LIBRARY_SIZES:
        yield case.sizes[:3]
    for name, value in case.static:
        given = {name: value}
        if isinstance(value, Variant):
            given = {field.name: getattr(value, field.name) for field in fields(value)}
        for field, one in given.items():
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            yield field, one if not number or one in (0, 1) else "another number"


def _cost(op: str) -> tuple[bool, bool, bool, int]:
    """Order ops by what a library compiles for them: a projection, a loop, many arrays.

    Of a Variant, head uses little, so others are to have its values.
    """
    declared = declaration(op)
    loops = any("iterations" in name for name in declared.static)
    arrays = len(declared.arrays)
    return op in PROJECTED, loops, op in PROJECTED and "h_res" not in declared.outputs, arrays


def _program(case: Case) -> Hashable:
    """Return what a library compiles a case for, which is more than one case's in places."""
    form = (case.shared, case.for_all, case.optional, case.unmixed, case.narrow)
    return (case.sizes[:3], case.static, form)


def _tried(case: Case, dtype: str, full: bool) -> bool:
    return dtype in (case.dtypes or DTYPES if full else case.usual)
