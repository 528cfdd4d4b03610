"""The launches that an op can make, and a few small calls that cover one of each kind.

Nothing here repeats how kernels are launched: the ops run with a launcher that computes nothing and
records its arguments, so changes of ``mhc_backends.kernels.launch`` and the ops need none here.

A kernel is proven for

- its **launch class**: the elements of an access, the tokens of a threadgroup, and whether a thread
  keeps one access, several, or not all of them (W, TOKENS, HELD, REST), together;
- every input in each address space that it can have (with fewer than 8 elements, ``constant``);
- every other choice that is compiled in, such as a variant's;
- one simdgroup in a threadgroup, several, and the most that the table allows; one threadgroup for a
  token's channels, or several; several iterations of a thread;
- both access policies: arrays that begin where vectors may, and elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mhc_backends.kernels import launch as table
from mhc_backends.kernels import ops
from mhc_backends.kernels.host import MEMORY, dtype_name
from mhc_backends.kernels.plan import Launch, record
from mhc_conformance import cases
from mhc_core import DEEPSEEK_V4, HY_V4, LIGER, PAPER
from mhc_core.math import load
from mhc_core.signature import UNMIXED, signature

__all__ = ["Call", "Launched", "Watched", "calls", "candidates", "launches", "planned", "run"]

PERIOD = 61  # distinct tokens; any more repeat them, so the oracle computes these alone
FEW_CHANNELS = 264  # a split (256), and less than a K step (32) more
# one access more than so many iterations of a threadgroup; then whole and partial K steps
MOST_CHANNELS = 40_000
CHANNELS = (
    *(W * (256 * turns + 1) for turns in (0, 1, 4, 16, 32, 64) for W in (1, 2, 4, 8)),
    *(32, 33, 256, FEW_CHANNELS),
)
SIZES = (  # tokens and channels
    *((1, C) for C in CHANNELS if C <= MOST_CHANNELS),
    *((T, C) for T in (3, 9, PERIOD) for C in CHANNELS if C <= FEW_CHANNELS),
    *((times * PERIOD, C) for times in (9, 17, 269) for C in (1, 2, 4, 8, 32)),
    (PERIOD, 2056),
    (134 * PERIOD, FEW_CHANNELS),
)
MOST_NUMBERS = 1 << 25  # in the largest array of a call
NUMBERS = frozenset({"K", "CHANNELS", "ITERATIONS"})  # template arguments that are only numbers

UNMIXING = {"variant": HY_V4}
VARIANTS = (
    {"variant": DEEPSEEK_V4},
    {"variant": PAPER},
    {"variant": LIGER},
    {"variant": replace(PAPER, sinkhorn_first="rows", res_transposed=True)},
)
NORMED = tuple(
    {**static, "h_norm_eps": 1e-5, "h_raw": raw}
    for static, raw in zip((*VARIANTS, UNMIXING), (True, False, False, True, True), strict=True)
)
STATICS: dict[str, Sequence[dict[str, Any]]] = {
    "combine_pre": (*VARIANTS, UNMIXING),
    "combine_pre_norm": NORMED,
    "contract": ({"how": "sum"}, {"how": "mean"}),
    "head": VARIANTS[:2],
    "mappings": (*VARIANTS, UNMIXING),
    "pre": (*VARIANTS, UNMIXING),
    "pre_norm": NORMED,
    "pre_residual": (*VARIANTS, UNMIXING),
    "rms_norm": ({"eps": 1e-5},),
    "sinkhorn": tuple(
        {"iterations": 20, "eps": eps, "first": first}
        for eps, first in itertools.product((0.0, 1e-6), ("columns", "rows"))
    ),
    "sinkhorn_knopp": tuple(
        {"max_iterations": 20, "epsilon": 0.02, "log_space": log_space}
        for log_space in (True, False)
    ),
    "static_layer": ({"eps": 0.1, "iterations": 20},),
    "static_mappings": ({"iterations": 20},),
}


@dataclass(frozen=True)
class Call:
    """One call of an op, made to prove it; ``offset`` is where its arrays begin in memory."""

    op: str
    dtypes: tuple[str, ...]
    T: int
    n: int
    C: int
    static: tuple[tuple[str, Any], ...] = ()
    shared: bool = False
    offset: int = 0
    unmixed: bool = False  # without H_res, though ``dtypes`` has one for it

    @property
    def name(self) -> str:
        """Return the call's name in a reason."""
        words = [f"T={self.T}", f"n={self.n}", f"C={self.C}"]
        words += ["one mapping for all tokens"] if self.shared else []
        words += ["no H_res"] if self.unmixed else []
        words += ["arrays that begin anywhere"] if self.offset else []
        return ", ".join(words)

    @property
    def options(self) -> dict[str, Any]:
        """Return the static arguments."""
        return dict(self.static)

    @property
    def distinct(self) -> int:
        """Return the number of distinct tokens."""
        return min(self.T, PERIOD)

    @property
    def given(self) -> int:
        """Return the number of the call's dtypes of arrays; the others are of cotangents."""
        return len(self.dtypes) - len(load(self.op).OP.outputs)

    @property
    def arrays(self) -> dict[str, str]:
        """Return the names of the arrays that are there, and their dtypes."""
        named = zip(load(self.op).OP.arrays, self.dtypes[: self.given], strict=False)
        return {name: dtype for name, dtype in named if not (self.unmixed and name == UNMIXED)}

    @property
    def cotangents(self) -> dict[str, str]:
        """Return the names of the outputs that are there, and the dtypes of their cotangents."""
        declared = load(self.op).OP
        named = zip(declared.outputs, self.dtypes[self.given :], strict=True)
        kept = declared.outputs_of(self.options)
        return {name: dtype for name, dtype in named if name in kept}

    def placed(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Return arrays as the op takes them: None for an H_res that is not there."""
        own = dict(zip(self.arrays, arrays, strict=True))
        return tuple(own.get(name) for name in list(load(self.op).OP.arrays)[: self.given])

    def placed_cotangents(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Return cotangents as the op's vjp takes them: None for an H_res that is not there."""
        own = dict(zip(self.cotangents, arrays, strict=True))
        return tuple(own.get(name) for name in load(self.op).OP.outputs)

    @property
    def asked(self) -> Call:
        """Return the call with all outputs that may be asked for."""
        outputs = load(self.op).OP.outputs.values()
        asked = {out.asked: True for out in outputs if out.asked}
        return replace(self, static=tuple({**self.options, **asked}.items()))

    @property
    def differentiated(self) -> Call:
        """Return the call as a library's autodiff makes it: cotangents in their outputs' dtypes."""
        outputs = load(self.op).OP.outputs.values()
        own = (self.dtypes[0] if out.dtype == "stream" else "float32" for out in outputs)
        return replace(self, dtypes=(*self.dtypes[: self.given], *own))


# ---- what is launched ----------------------------------------------------------------------------


class Launched(NamedTuple):
    """One launch, its class, and the choices of its kernel that it proves."""

    kernel: str
    class_: str
    proves: frozenset[tuple[Any, ...]]


class Watched:
    """A launcher that records each launch, around another launcher or none."""

    def __init__(self, launcher: Any, told: Any) -> None:
        self._launcher = launcher
        self._told = told

    def __call__(self, *, name: str, **texts: Any) -> Any:
        """Make a kernel, as ``mx.fast.metal_kernel`` does."""
        kernel = self._launcher and self._launcher(name=name, **texts)
        names: Sequence[str] = texts["input_names"]

        def launch(**arguments: Any) -> Any:
            return self._told(kernel, _launched(name, names, arguments), arguments)

        return launch


def _launched(full: str, names: Sequence[str], arguments: Any) -> Launched:
    kernel = _kernel(full)
    words: dict[str, Any] = dict(arguments["template"])
    threads, shape = arguments["threadgroup"][0], table.TABLE[kernel]
    size = "one" if threads == table.SIMD else "most" if threads == shape.threads else "several"
    class_ = {word: words.pop(word) for word in ("W", "TOKENS", "HELD", "REST") if word in words}
    if "HELD" in class_:
        class_["HELD"] = min(class_["HELD"], 2)  # all loops of several accesses are one class
    spelt = ", ".join([kernel, *(f"{word}={int(value)}" for word, value in class_.items())])
    facts: set[tuple[Any, ...]] = {("class", spelt), ("threads", size)}
    facts.add(("threadgroups for a token", arguments["grid"][1] > 1))
    facts |= {(word, value) for word, value in words.items() if word not in NUMBERS}
    facts |= {
        (name, dtype_name(array.dtype), "constant" if array.size < 8 else "device")
        for name, array in zip(names, arguments["inputs"], strict=True)
    }
    return Launched(kernel, spelt, frozenset((kernel, *fact) for fact in facts))


def _kernel(full: str) -> str:
    """Return the kernel's name, extracted from the one that MLX gets."""
    rest = full.removeprefix("mhc_") + "_"
    return max((name for name in table.TABLE if rest.startswith(f"{name}_")), key=len)


def launches(call: Call) -> list[Launched]:
    """Return the launches of a call and its gradients on MLX, computing nothing."""
    import mlx.core as mx

    from mhc_backends.kernels.mlx import Kernels

    found: list[Launched] = []

    def told(_: Any, launched: Launched, arguments: Any) -> list[mx.array]:
        found.append(_in_its_sizes(call, launched, arguments))
        shapes, dtypes = arguments["output_shapes"], arguments["output_dtypes"]
        return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def zeros(shape: Sequence[int], dtype: str) -> mx.array:
        return mx.zeros(shape, getattr(mx, dtype))

    run(Kernels(Watched(None, told), "metal"), call, *_blank(call, zeros))
    return found


def planned(call: Call) -> list[Launched]:
    """Return the launches of a call and its gradients by plans, which need no array library."""
    arrays, cotangents = _blank(call, _numberless)
    absent = tuple(k for k, one in enumerate(call.placed(arrays)) if one is None)
    groups = [[(a.shape, a.dtype) for a in group] for group in (arrays, cotangents)]
    asked = call.options, "metal", MEMORY, absent
    plain = record("forward", call.op, groups[:1], *asked)
    saving = record("forward_with_saved", call.op, groups[:1], *asked)
    saved = [[(value.shape, value.dtype) for value in saving.saved]] if saving.saved else []
    pulling = record("vjp", call.op, [*groups, *saved], *asked)
    return [
        _in_its_sizes(call, _launched(f"mhc_{step.kernel}", [*step.inputs], about), about)
        for plan in (plain, saving, pulling)
        for step in plan.steps
        if isinstance(step, Launch)
        for about in (_about(step),)
    ]


def _about(step: Launch) -> Mapping[str, Any]:
    """Return a launch of a plan as arguments of MLX's launch."""
    return {
        "template": step.program.template,
        "grid": step.program.launch.grid,
        "threadgroup": step.program.launch.threadgroup,
        "inputs": list(step.inputs.values()),
    }


def _numberless(shape: Sequence[int], dtype: str) -> Any:
    return np.broadcast_to(np.zeros((), cases.numpy_dtype(dtype)), tuple(shape))


def _in_its_sizes(call: Call, launched: Launched, arguments: Any) -> Launched:
    """Add what the sizes of a call prove of a kernel, besides its launch parameters."""
    W = dict(arguments["template"]).get("W", 1)
    (threads, *_), (_, tiles, _) = arguments["threadgroup"], arguments["grid"]
    facts: set[tuple[Any, ...]] = {
        ("whole K steps", call.C % table.STEP_CHANNELS == 0),
        ("partials", call.C > table.SPLIT_CHANNELS),
    }
    facts |= {("several iterations",)} if W * threads * tiles < call.C else set()
    facts |= {("begins anywhere", W)} if call.offset else set()
    more = {(launched.kernel, *fact) for fact in facts}
    return launched._replace(proves=launched.proves | more)


def _blank(call: Call, zeros: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
    """Make arrays and cotangents of a call's shapes and dtypes."""
    declared = load(call.op).OP
    arrays = [
        zeros(_shape(call, declared.patterns[name]), dtype) for name, dtype in call.arrays.items()
    ]
    checked = signature(lambda op: load(op).OP, call.op, call.placed(arrays), call.options)
    cotangents = [
        zeros(shape, dtype)
        for shape, dtype in zip(checked.output_shapes, call.cotangents.values(), strict=True)
    ]
    return arrays, cotangents


def _shape(call: Call, patterns: list[list[str]]) -> list[int]:
    n, C = call.n, call.C
    known = {**load(call.op).OP.sizes(n, C, call.options), "...": call.T, "R": cases.rank_of(C)}
    words = patterns[-1 if call.shared else 0]
    return [known[word] if word in known else int(word) for word in words]


def run(
    kernels: Any, call: Call, arrays: Sequence[Any], cotangents: Sequence[Any]
) -> tuple[Any, Any, Any]:
    """Run an op in inference, then with gradients wanted, then its gradients."""
    module, options = ops.load(call.op), call.options
    given = call.placed(arrays), call.placed_cotangents(cotangents)
    plain = module.forward(kernels, *given[0], **options)
    if not hasattr(module, "forward_with_saved"):
        return plain, plain, module.vjp(kernels, *given, **options)
    outputs, saved = module.forward_with_saved(kernels, *given[0], **options)
    return plain, outputs, module.vjp(kernels, *given, saved, **options)


# ---- the calls -----------------------------------------------------------------------------------


def calls(
    op: str,
    dtypes: tuple[str, ...],
    n: int | None,
    launches: Callable[[Call], Sequence[Launched]] = launches,
) -> list[Call]:
    """Choose calls, small ones first, until all that the candidates prove is proven."""
    proves = {
        call: frozenset[Any]().union(*(launched.proves for launched in launches(call)))
        for call in candidates(op, dtypes, n)
    }
    left = set[Any]().union(*proves.values())
    chosen: list[Call] = []
    while left:
        best = max(proves, key=lambda call: (len(proves[call] & left), -_numbers(call)))
        chosen.append(best)
        left -= proves[best]
    return sorted(chosen or [next(iter(proves))], key=_numbers)


def candidates(op: str, dtypes: tuple[str, ...], n: int | None) -> Iterator[Call]:
    """Yield calls of every size class; static arguments take turns, but for the smallest sizes."""
    declared = load(op).OP
    statics = [
        {**static, **({"n": n} if "n" in declared.static else {})} for static in _statics(op)
    ]
    has_channels = any(
        word in ("C", "D", "nC") for patterns in declared.patterns.values() for word in patterns[0]
    )
    may_share = any(len(patterns) > 1 for patterns in declared.patterns.values())
    unmixing = UNMIXED in declared.optional
    every = list(itertools.product(statics, (False, True) if unmixing else (False,)))
    plain = [one for one in every if not one[1] and one[0] != UNMIXING]
    turns = itertools.cycle(plain)
    # no H_res before, none after, and last of all neither
    others = [one for one in every if one not in plain and one[0] in (statics[0], UNMIXING)]
    for T, C in SIZES if has_channels else [(T, 1) for T in dict(SIZES)]:
        call = Call(op, dtypes, T, n or 1, C)
        if _largest(call) > MOST_NUMBERS:
            continue
        small = T <= 3 and C <= table.STEP_CHANNELS
        some = T <= PERIOD and C <= FEW_CHANNELS
        own = [next(turns), *(others if some else others[-1:])]
        for static, unmixed in every if small else own:
            call = replace(call, static=tuple(static.items()), unmixed=unmixed)
            yield call
            if may_share and T <= PERIOD:
                yield replace(call, shared=True)
            if T == 3 or C == table.STEP_CHANNELS:
                yield replace(call, offset=1)


def _statics(op: str) -> Sequence[dict[str, Any]]:
    """Return the static arguments to try: those of the kit's cases, where none are chosen here."""
    return STATICS.get(op) or [dict(static) for _, static in cases.STATICS[op]]


def _largest(call: Call) -> int:
    """Return the number of elements of the largest array: the streams, phi, or H_res."""
    n, projects = call.n, "phi" in load(call.op).OP.arrays
    return max(call.T * n * max(call.C, n), n * call.C * (n * n + 2 * n) * projects)


def _numbers(call: Call) -> int:
    n = call.n
    return call.T * n * (call.C + n) + (n * n + 2 * n) * n * call.C
