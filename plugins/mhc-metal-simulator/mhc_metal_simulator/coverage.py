"""The coverage of the conformance kit: which cases run which kernel and sides of its choices.

``python -m mhc_metal_simulator.coverage`` runs the default kit's cases on the simulator, forward
and back. It prints each kernel, class of its launches and side of its choices, with a case that
runs it, and at the end the sides that no case runs, with the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from mhc_backends.kernels import KERNELS, launch
from mhc_backends.kernels.ops import OPS
from mhc_conformance import Subject, check
from mhc_conformance.cases import Case, cases, data
from mhc_conformance.checks import dtypes_of

from mhc_metal_simulator.branches import SIDES, Branch
from mhc_metal_simulator.launch import LaunchRecord, record
from mhc_metal_simulator.traffic import kernel_of

__all__ = [
    "Coverage",
    "Outcome",
    "Ran",
    "checked",
    "classes",
    "covered",
    "listing",
    "main",
    "measure",
    "possible",
    "together",
    "units",
]

BACKEND = "mlx-metal-simulator"
DTYPES = ("float32", "bfloat16")  # bfloat16 for all narrow numbers
KINDS = ("forward", "gradient", "strided", "repeated")  # checks


class Ran(NamedTuple):
    """A case in a dtype, forward and back."""

    op: str
    dtype: str
    case: str

    def __str__(self) -> str:
        return f"{self.op} {self.dtype}: {self.case}"


class Outcome(NamedTuple):
    """A branch outcome: one side of a choice of a kernel."""

    kernel: str
    branch: Branch
    side: str

    def __str__(self) -> str:
        where = f" in {self.branch.function}" if self.branch.function else ""
        return f"{self.kernel}{where}: {self.branch.kind} ({self.branch.condition}) {self.side}"


class Coverage(NamedTuple):
    """The kernels, classes of launches and sides of choices that ran, each with its first case.

    ``outcomes`` are all in the texts, of functions that any launch of the kernel calls.
    """

    kernels: Mapping[str, Ran]
    classes: Mapping[tuple[str, str], Ran]
    taken: Mapping[Outcome, Ran]
    outcomes: frozenset[Outcome]

    @property
    def missing(self) -> list[Outcome]:
        """Return the sides that no case ran."""
        return sorted(self.outcomes - set(self.taken), key=str)


# ---- running -------------------------------------------------------------------------------------


def measure(jobs: int | None = None) -> Coverage:
    """Run the default kit's cases in float32 and bfloat16, on several processes."""
    units = [(op, dtype) for dtype in DTYPES for op in OPS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=context) as pool:
        return together(pool.map(_unit, units))


def _unit(unit: tuple[str, str]) -> Coverage:
    """Run the cases of an op in a dtype."""
    return together(covered(*one) for one in tried(*unit))


def tried(op: str, dtype: str) -> Iterator[tuple[Ran, list[LaunchRecord]]]:
    """Run an op's cases, forward and back, and yield what each launched."""
    subject = Subject(BACKEND)
    smallest, largest = subject.spec.sizes
    for case in cases(op, dtype):
        if smallest <= case.sizes.n <= (largest or case.sizes.n):
            with record() as launches:
                _call(subject, case, dtype)
            yield Ran(op, dtype, case.name), launches
    for kind in ("strided", "repeated"):  # views that begin anywhere, and no gradients
        if dtype in dtypes_of(kind, subject.spec.dtypes):
            yield _checked(op, dtype, kind)


def checked(op: str, dtype: str, kind: str) -> Coverage:
    """Run one check of the kit, and return what it covers without a name for each case.

    ``kind`` is a check, or one with one of :data:`LIMITS`.
    """
    check_of, _, limit = kind.partition(" with ")
    with _limited(LIMITS.get(limit)):
        return covered(*_checked(op, dtype, check_of))


LIMITS = {"all tokens few": 2**31, "no tokens few": 0}
"""Limits of the tokens that ``launch.fewest`` accepts, so that every case runs either kernels."""


@contextlib.contextmanager
def _limited(tokens: int | None) -> Generator[None]:
    before = launch.FEWEST_TOKENS, launch.FEWEST_SPLITS
    if tokens is not None:
        launch.FEWEST_TOKENS, launch.FEWEST_SPLITS = {"metal": tokens}, 2**31
    try:
        yield
    finally:
        launch.FEWEST_TOKENS, launch.FEWEST_SPLITS = before


def _checked(op: str, dtype: str, kind: str) -> tuple[Ran, list[LaunchRecord]]:
    with record() as launches:
        found = check(Subject(BACKEND), op, dtype, kind)
    if not found.passed:
        raise AssertionError(found.detail)
    return Ran(op, dtype, f"the check {kind}"), launches


def units() -> Iterator[tuple[str, str, str]]:
    """Yield the ops, dtypes and checks with which :func:`checked` runs what `measure` runs."""
    dtypes = Subject(BACKEND).spec.dtypes
    for kind in KINDS:
        for dtype in DTYPES:
            if dtype in dtypes_of(kind, dtypes):
                yield from ((op, dtype, kind) for op in OPS)
    for dtype in DTYPES:
        for op in ("pre", "combine_pre"):
            yield from ((op, dtype, f"forward with {limit}") for limit in LIMITS)
    for op in ("pre_norm", "combine_pre_norm"):  # the same kernels before their last
        yield op, "float32", "forward with all tokens few"
    yield "pre_norm", "bfloat16", "forward with all tokens few"
    for op in ("pre", "pre_norm"):
        yield op, "float32", "strided with all tokens few"


def _call(subject: Subject, case: Case, dtype: str) -> None:
    import mlx.core as mx

    primals, cotangents = (subject.take(arrays) for arrays in data(case, dtype, 0))
    mx.eval(subject.function(case)(*primals))
    mx.eval(subject.vjp(case, primals, cotangents))


def covered(ran: Ran, launches: Sequence[LaunchRecord]) -> Coverage:
    """Return what the launches of a case cover."""
    kernels = {kernel_of(one): ran for one in launches}
    found = {(kernel_of(one), word): ran for one in launches for word in classes(one)}
    taken = {Outcome(kernel_of(one), *side): ran for one in launches for side in one.took}
    outcomes = {
        Outcome(kernel_of(one), branch, side)
        for one in launches
        for branch in one.branches
        for side in SIDES[branch.kind]
    }
    return Coverage(kernels, found, taken, frozenset(outcomes))


def together(parts: Iterable[Coverage]) -> Coverage:
    """Return the union of what was found, with the first case for each."""
    kernels: dict[str, Ran] = {}
    found: dict[tuple[str, str], Ran] = {}
    taken: dict[Outcome, Ran] = {}
    outcomes: set[Outcome] = set()
    for part in parts:
        kernels = {**part.kernels, **kernels}
        found = {**part.classes, **found}
        taken = {**part.taken, **taken}
        outcomes |= part.outcomes
    called = {(one.kernel, one.branch.function) for one in taken}
    # a text may have functions by whose name it calls others, which it never calls itself
    own = frozenset(one for one in outcomes if (one.kernel, one.branch.function) in called)
    return Coverage(kernels, found, taken, own)


# ---- classes of launches -------------------------------------------------------------------------

_TEMPLATE = re.compile(r"template <([^<>]*)>\s*\[\[kernel\]\]")
_VALUES = re.compile(r"decltype\(\w+<([^<>]*)>\)")


def classes(one: LaunchRecord) -> set[str]:
    """Return the names of a launch's classes: the launch table's choices for the kernel."""
    names, values = _TEMPLATE.search(one.source), _VALUES.search(one.source)
    words: dict[str, str] = {}
    if names and values:
        listed = (word.split()[-1] for word in names[1].split(","))
        words = dict(zip(listed, (v.strip() for v in values[1].split(",")), strict=True))
    tiles = one.grid[1] // one.threadgroup[1]
    return _classes(
        int(words["W"]) if "W" in words else None,
        int(words["TOKENS"]) if "TOKENS" in words else None,
        int(words["HELD"]) if "HELD" in words else None,
        words["REST"] not in ("0", "false") if "REST" in words else None,
        tiles,
    )


def _classes(
    elements: int | None, tokens: int | None, held: int | None, rest: bool | None, tiles: int
) -> set[str]:
    made = {"tiles of a token" if tiles > 1 else "whole tokens"}
    if elements is not None:
        made.add(f"W={elements}")
    if tokens is not None:
        made.add(f"TOKENS={tokens}")
    if held is not None:
        made.add("HELD>1" if held > 1 else "HELD=1")
    if rest is not None:
        made.add("REST" if rest else "no REST")
    return made


def possible(kernel: str, words: Iterable[str]) -> set[str]:
    """Return all classes that the launch table has for a kernel, of the kinds in ``words``."""
    channels = (1, 2, 4, 8, 37, 257, 1028, 4096, 4100, 8192, 16388, 32768)
    made: set[str] = set()
    for T in (1, 5, 257, 515, 1031, 16385):
        for n in (1, 2, 3, 4, 6, 9, 17, 32):
            for C in channels:
                for dtype in DTYPES:
                    shape = launch.launch(kernel, T, n, C, dtype)
                    tiles = shape.grid[1] // shape.threadgroup[1]
                    made |= _classes(shape.elements, shape.tokens, shape.held, shape.rest, tiles)
    kinds = {_kind(word) for word in words}
    return {word for word in made if _kind(word) in kinds}


def _kind(word: str) -> str:
    return re.split(r"[=>]", word.removeprefix("no "))[0].replace(
        "whole tokens", "tiles of a token"
    )


# ---- what no size reaches ------------------------------------------------------------------------


class Unreached(NamedTuple):
    """The sides that no case runs: a pattern of their names, and the reason."""

    pattern: str
    reason: str


UNREACHED: Sequence[Unreached] = (
    Unreached(
        r"for \((token|tokens|first|iteration|k|item) < .*\) again",
        "in Metal a launch has a threadgroup for each token or share, up to 2^31 threads, so none "
        "has a second iteration; the simulator's own tests run one, with few threadgroups",
    ),
    Unreached(
        r"\bAHEAD\b|!?flows [&|]|ahead < k_blocks|once && next < T|c \+ STEP_CHANNELS < end",
        "asynchronous copies exist only in CUDA",
    ),
    Unreached(
        r"\?: \(simdgroups? < SIMDGROUPS\) false",
        "the launch table never has more simdgroups than may take part",
    ),
    Unreached(
        r"for \((i|j|k) < (N|COUNT|SUMS|TILE|N \* N)( && (SAVES && )?here.group_y == 0)?\) again",
        "at least 32 threads share at most 32 numbers",
    ),
    Unreached(
        r"in (divide_b: .*|pull_steps: if) \(active\) false",
        "only matrices of sinkhorn_knopp stop early",
    ),
    Unreached(
        r"(static_mappings|knopp).* \(FIRST_COLUMNS == TRANSPOSED\) false"
        r"|static_mappings.* \(LOG\) false",
        "static mappings and sinkhorn_knopp normalise rows first; static mappings have eps 0",
    ),
    Unreached(
        r"(gated_combine|pre_scale|residual_add)\S* in load_raw_streams: if \(c < C\) false",
        "their loop over the channels loads nothing beyond C",
    ),
    Unreached(
        r"(combine_vjp|combine_project_k_blocks) in (hold: if|value: \?:) \(KEEP\) false"
        r"|combine_project_k_blocks in mix_streams: (if|\?:) \(KEPT\) false",
        "the kernel is for up to 4 streams, whose mappings and streams are kept",
    ),
    Unreached(
        r"gated_(project|dlow) in gated_\w+: for \((c|group|column|split) < .*\) again"
        r"|gated_dfactors in gated_dfactors: for \(column < M\) again",
        "splits of several K steps, whole streams of several splits, and more than 128 columns "
        "are those of real models; the simulator's own tests have some, and ranks with a "
        "second group for a simdgroup",
    ),
    Unreached(
        r"((combine|write|gated)_project\w*|project_dx|gated_(collapse|dlow|dx)\w*) in .*: "
        r"if \(!Address<P>::ALIGNED\) false"
        r"|((combine|write)_project\w*|project_dx) in store_within: if \(rest >= W .*true",
        "with aligned arrays they load and store whole K steps; else they store single numbers "
        "only at the end of a row",
    ),
    Unreached(
        r"combine_project_few in mix_streams: (if|\?:) \(KEPT\)"
        r"|combine_project in mix_streams: \?: \(KEPT\) false",
        "combine_project_few always reads its streams again; in `if (KEPT)`, KEPT is true",
    ),
    Unreached(
        r"pre(_norm)?_k_blocks in (divide_b|sums_b): if \(Lanes<N>::FEW\) false"
        r"|pre(_norm)?_k_blocks in take_linear_steps: if \(!Lanes<N>::FEW\) true"
        r"|pre(_norm)?_k_blocks in (sum_a: \?: \(a < 4\)|.*: if \(active\)) .*",
        "the kernel is for up to 4 streams, whose matrices take few lanes",
    ),
    Unreached(
        r"(pre_norm|pre(_norm)?_k_blocks) in sinkhorn_matrix: if \((simd_any\()?!?linear\)?\)",
        "the logits that would underflow are those of other kernels, by the same function",
    ),
    Unreached(
        r"(mappings|pre_norm|pre(_norm)?_k_blocks) in \w+: (if|\?:) \(!?inside<N>\(here\)\)",
        "the case of three streams, whose matrices leave lanes idle, starts by exponentials and "
        "has an eps",
    ),
    Unreached(
        r"pre_k_blocks in pre_k_blocks: \?: \(here.threads == SIMD\) true",
        "the launch table gives it a simdgroup for the matrix and another for the channels",
    ),
    Unreached(
        r"pre(_unmixed|_norm)?_k_blocks in sum_all_splits: "
        r"(for \(begin < splits\) again|\?: \(splits - begin < SPLITS\) false)",
        "more than 8192 channels; the simulator's own tests add up two splits at a time",
    ),
    Unreached(
        r"^sinkhorn in scaled_sum: if \(N > 1\) false",
        "the case of one stream has one iteration",
    ),
    Unreached(
        r"^pre_norm in scaled_sum: if \(N > 1\) false",
        "the case of one stream has one token, which pre_norm_k_blocks takes",
    ),
    Unreached(
        r"^(sinkhorn|static_mappings)(_vjp)? in sinkhorn_matrix(_vjp)?: if \(EXP_START\)",
        "a variant chooses the start, and neither has one; with eps 0 there is no difference",
    ),
    Unreached(
        r"^static_mappings in (divide_b: if|line_factor: \?:|take_linear_steps: if) \((Lanes<N>::"
        r"FEW|a == line<N>\(here\)|NORMAL|eps > .*)\) ",
        "static mappings have eps 0, and those of few streams are iterated line by line",
    ),
    Unreached(
        r"^(mappings(_unmixed)?|pre_norm) in activate: if \(stores\) false",
        "one threadgroup computes all of its tokens' mappings",
    ),
    Unreached(
        r"^(mappings|pre|pre_norm|sinkhorn|sinkhorn_knopp|static_mappings) in sums_b: .* false",
        "forwards need all sums in every lane only for few lanes; vjps need them for any",
    ),
    Unreached(
        r"^(mappings|pre)(_unmixed)? in activate: \?: \(MIXES\)",
        "each of these kernels is for streams that are mixed, or for those that are not",
    ),
    Unreached(
        r"^(mappings|pre)_unmixed in (activated: \?: \(group == 1\)|column_group: \?: .*) false",
        "mappings without H_res have two groups of columns",
    ),
    Unreached(
        r"combine_project in stage_phi: if \(k \+ e \* simdgroups < count\) false",
        "it stages one K step at a time",
    ),
    Unreached(
        r"in write: if \(A::ELEMENTS > 1 && by_vectors\) true",
        "these kernels write single numbers with it",
    ),
    Unreached(
        r"in dphi_sums: for \(stage < T\) again"
        r"|in mix_matrices: for \(begin < tokens\) again"
        r"|static_layer_vjp in .*: if \(token != here.group_x\) true"
        r"|(rms|weights)_norm_vjp: if \(token != here.group_x\) true"
        r"|project in project: for \(column < M\) again",
        "such sizes take seconds on a simulator: 2^21 numbers of streams, 2^14 tokens of many",
    ),
)


def reasons(missing: Iterable[Outcome]) -> dict[Unreached | None, list[Outcome]]:
    """Sort sides by the reason why no case runs them; None for those without a reason."""
    found: dict[Unreached | None, list[Outcome]] = defaultdict(list)
    for outcome in missing:
        why = (one for one in UNREACHED if re.search(one.pattern, str(outcome)))
        found[next(why, None)].append(outcome)
    return found


# ---- the list ------------------------------------------------------------------------------------


def listing(found: Coverage) -> Iterator[str]:
    """Yield a line per kernel, class and side, with a case that runs it; at the end, counts."""
    for kernel, ran in sorted(found.kernels.items()):
        yield f"{kernel}: {ran}"
        for (name, word), one in sorted(found.classes.items()):
            if name == kernel:
                yield f"  launch {word}: {one}"
        for outcome in sorted(found.outcomes, key=str):
            if outcome.kernel == kernel:
                one = found.taken.get(outcome)
                yield f"  {str(outcome).removeprefix(kernel)}: {one or 'no case'}"
    total = len(found.outcomes)
    yield f"{len(found.kernels)} of {len(KERNELS)} kernels run"
    yield f"{total - len(found.missing)} of {total} sides of their choices run; the others:"
    for why, outcomes in sorted(reasons(found.missing).items(), key=str):
        yield f"{len(outcomes)} sides: {why.reason if why else 'no reason is known'}"
        yield from (f"  {outcome}" for outcome in outcomes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(
        prog="python -m mhc_metal_simulator.coverage", description=__doc__
    )
    parser.add_argument("--jobs", type=int, help="processes; one per core if left out")
    given = parser.parse_args(arguments)
    print(*listing(measure(given.jobs)), sep="\n")


if __name__ == "__main__":
    main()
