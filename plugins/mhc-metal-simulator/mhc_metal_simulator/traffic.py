"""``python -m mhc_metal_simulator.traffic``: the bytes that each op of mlx-metal moves, as a table.

The ops run through the public API on random arrays. Forwards and vjps are counted as in training: a
vjp uses the arrays that its forward saved, and its launches are those that ``mx.vjp`` adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mhc_core
import mlx.core as mx
import numpy as np
from mhc_backends.kernels import KERNELS
from mhc_conformance import generated
from mhc_conformance.cases import PROJECTED_OR_MIXED, Case, Sizes, cases, data
from mhc_conformance.subject import Subject, several
from mhc_core import math
from mhc_core.signature import Op

from mhc_metal_simulator.backend import SPEC
from mhc_metal_simulator.launch import LaunchRecord, record

__all__ = ["BEGIN", "DEFAULTS", "END", "KIBIBYTE", "Launched", "Row", "Size", "measure", "table"]

BEGIN = "<!-- the table begins: python -m mhc_metal_simulator.traffic --write docs/kernels.md -->"
END = "<!-- the table ends -->"
KIBIBYTE = 1024


@dataclass(frozen=True)
class Size:
    """T tokens of n streams of C channels, and the dtype of the streams."""

    T: int = 64
    n: int = 4
    C: int = 4096
    dtype: str = "bfloat16"


DEFAULTS = Size()

# ---- what is counted -----------------------------------------------------------------------------

SUMS = frozenset({"blocks", "partials", "terms", "sums"})
"""Names of partial sums that one launch writes and another adds up.

Those of a parameter's gradient are named after it: ``dweight``.
"""


def kind(launch: LaunchRecord, name: str, op: Op, size: Size) -> str:
    """Return what one array of a launch counts as: ``streams``, ``phi``, ``sums`` or ``small``.

    It follows from the op's declaration and from the array's shape. Streams, layers and, in an op
    without channels, matrices have an entry for each token. All else is small: mappings, and
    parameters other than phi. All threads of a token read it, all but the first from the cache.
    """
    if name in _gradients_too(one for one, words in op.patterns.items() if words[0][1:] == ["nC"]):
        return "phi"
    parameters = (name for name, words in op.patterns.items() if words[0][0] != "...")
    if kernel_of(launch) == "sum_rows" or name in SUMS or name in {f"d{one}" for one in parameters}:
        return "sums"
    shape = launch.shapes[name]
    channels = any(words[0][-1] in ("C", "D", "nC") for words in op.patterns.values())
    whole = not channels or shape[-1] in (size.C, size.n * size.C)
    return "streams" if len(shape) > 1 and shape[0] == size.T and whole else "small"


def _gradients_too(names: Iterable[str]) -> frozenset[str]:
    return frozenset(one for name in names for one in (name, f"d{name}"))


@cache
def unread(op: str) -> frozenset[str]:
    """Return the arrays that the vjp of an op has no need to read, as the kit's proofs say."""
    return frozenset(
        name
        for name in math.load(op).OP.arrays
        if (op, name, generated.VJP, generated.FIRST) in generated.EQUIVALENT
    )


@cache
def repeated(op: str) -> frozenset[str]:
    """Return the arrays whose gradient equals an earlier one's, so that both are one array."""
    case = next(cases(op))
    drawn = data(case, "float32", seed=0)
    gradients = mhc_core.vjp(op, drawn.primals, drawn.cotangents, backend="numpy", **case.options)
    named = list(zip(math.load(op).OP.arrays, gradients, strict=False))
    return frozenset(
        name
        for at, (name, one) in enumerate(named)
        if any(np.array_equal(one, other) for _, other in named[:at])
    )


def ideal(
    op: str,
    vjp: bool,
    primals: Sequence[Any],
    cotangents: Sequence[Any],
    names: Sequence[str] | None = None,
) -> int:
    """Return the bytes if every input were read once and every output written once.

    A forward reads the primals and writes arrays like the cotangents; a vjp reads both and writes
    arrays like the primals. ``primals`` and ``cotangents`` are NumPy arrays; ``names`` are those
    of the primals, if not the op's first ones. The gradient of streams that are not mixed is their
    cotangent: neither is it written, nor are they read for it.
    """
    own = names or list(math.load(op).OP.arrays)
    sizes = {name: array.nbytes for name, array in zip(own, primals, strict=False)}
    outputs = sum(array.nbytes for array in cotangents)
    if not vjp:
        return sum(sizes.values()) + outputs
    alike = {"x"} if op == "combine" and "h_res" not in own else set[str]()
    read = sum(size for name, size in sizes.items() if name not in unread(op) | alike)
    written = sum(size for name, size in sizes.items() if name not in repeated(op) | alike)
    return read + outputs + written


@dataclass(frozen=True)
class Launched:
    """The bytes that one launch, or several, loaded and stored.

    Attributes
    ----------
    read, written
        Of streams, layers and matrices: every access.
    phi, sums
        Of phi and its gradient, and of partial sums, loaded and stored: every access.
    small
        Of mappings and other parameters, loaded and stored: each byte once.
    ideal
        Of a launch: each byte that it touches, once.
    """

    read: int
    written: int
    phi: int
    sums: int
    small: int
    ideal: int

    @property
    def total(self) -> int:
        """Return all bytes together."""
        return self.read + self.written + self.phi + self.sums + self.small

    @classmethod
    def of(cls, launch: LaunchRecord, op: Op, size: Size) -> Launched:
        """Return the bytes of a launch of an op, sorted into these kinds."""
        counted: dict[str, int] = dict.fromkeys(("read", "written", "phi", "sums", "small"), 0)
        arrays = {k: one for k, one in launch.traffic.items() if one.role != "metadata"}
        for name, one in arrays.items():
            what = kind(launch, name, op, size)
            if what == "small":  # each byte counts once; of all else, each access of any thread
                counted["small"] += one.loaded_unique + one.stored_unique
            elif what == "streams":
                counted["read"] += one.loaded
                counted["written"] += one.stored
            else:
                counted[what] += one.loaded + one.stored
        touched = sum(one.loaded_unique + one.stored_unique for one in arrays.values())
        return cls(**counted, ideal=touched)

    @classmethod
    def together(cls, launches: Iterable[Launched], ideal: int) -> Launched:
        """Add launches up, with the ideal bytes of all of them together."""
        made = list(launches)
        names = ("read", "written", "phi", "sums", "small")
        return cls(*(sum(getattr(one, name) for one in made) for name in names), ideal=ideal)


@dataclass(frozen=True)
class Row:
    """An op's forward or vjp: its launches by kernel, in their order, and all of them together.

    ``unmixed`` says that the op takes and makes no H_res.
    """

    op: str
    vjp: bool
    launches: tuple[tuple[str, Launched], ...]
    together: Launched
    unmixed: bool = False

    @property
    def name(self) -> str:
        """Return the name of the op, marked if the row is its vjp's, or without H_res."""
        return self.op + " vjp" * self.vjp + ", no H_res" * self.unmixed


def kernel_of(launch: LaunchRecord) -> str:
    """Return the name of a kernel without its dtypes."""
    return max((k for k in KERNELS if launch.kernel.startswith(f"mhc_{k}_")), key=len)


# ---- measuring -----------------------------------------------------------------------------------


def measure(size: Size = DEFAULTS, ops: Sequence[str] = ()) -> Iterator[Row]:
    """Run ops, all of them if none is named; return a row for each forward and each vjp.

    An op that may mix streams has two more rows, without H_res.
    """
    for op in ops or SPEC.ops:
        yield from _rows(op, _case(op, size), size)
        if op in PROJECTED_OR_MIXED:
            yield from _rows(op, _unmixed(_case(op, size)), size)


def _rows(op: str, case: Case, size: Size) -> Iterator[Row]:
    subject = Subject(SPEC.name)
    drawn = data(case, size.dtype, seed=0)
    primals, cotangents = subject.take(drawn.primals), subject.take(drawn.cotangents)
    called = subject.function(case)

    def function(*arrays: Any) -> list[Any]:
        return list(several(called(*arrays)))

    with record() as forward:
        function(*primals)
    with record() as both:
        mx.vjp(function, list(primals), list(cotangents))
    back = both[len(forward) :]
    for vjp, launches in ((False, forward), (True, back)):
        declared: Op = math.load(op).OP
        made = tuple((kernel_of(one), Launched.of(one, declared, size)) for one in launches)
        least = ideal(op, vjp, drawn.primals, drawn.cotangents, case.names)
        together = Launched.together((one for _, one in made), least)
        yield Row(op, vjp, made, together, not case.mixes)


def _case(op: str, size: Size) -> Case:
    """Return the first of the kit's static choices, in these sizes, with no more outputs."""
    asked = {out.asked: False for out in math.load(op).OP.outputs.values() if out.asked}
    static = tuple({**next(cases(op)).options, **asked}.items())
    static = (("n", size.n),) if op == "expand" else static
    sizes = Sizes((size.T,), size.n, size.C, "what is counted in the table")
    return replace(next(cases(op)), label="traffic", sizes=sizes, static=static)


def _unmixed(case: Case) -> Case:
    """Return the case without H_res."""
    static = () if case.op == "combine" else (("variant", mhc_core.HY_V4),)
    return replace(case, static=static, unmixed=case.op.startswith("combine"))


# ---- the table -----------------------------------------------------------------------------------

_HEAD = "op | kernel | read | written | phi | sums | small | total | ideal | ratio"


def table(rows: Iterable[Row], size: Size) -> str:
    """Return rows as a Markdown table in KiB: a line per op, and per launch if it has several."""
    lines = [f"T={size.T}, n={size.n}, C={size.C}, {size.dtype} streams; in KiB.", ""]
    lines += [f"| {_HEAD} |", "|---|---|" + "--:|" * 8]
    for row in rows:
        lines += _lines(row)
    return "\n".join(lines)


def _lines(row: Row) -> Iterator[str]:
    kernels = [kernel for kernel, _ in row.launches]
    if len(kernels) < 2:
        what = f"`{kernels[0]}`" if kernels else "none: MLX's own operations"
        yield _line(f"**{row.name}**", what, row.together)
        return
    yield _line(f"**{row.name}**", f"{len(kernels)} launches", row.together)
    for kernel, launched in row.launches:
        yield _line("", f"`{kernel}`", launched)


def _line(op: str, what: str, launched: Launched) -> str:
    one = launched
    amounts = (one.read, one.written, one.phi, one.sums, one.small, one.total, one.ideal)
    ratio = f"{one.total / one.ideal:.3f}" if one.total else ""
    return f"| {' | '.join((op, what, *map(_amount, amounts), ratio))} |"


def _amount(size: int) -> str:
    return f"{size / KIBIBYTE:,.1f}" if size else ""


def rewritten(text: str, new: str) -> str:
    """Return a text with a new table between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"needs the lines {BEGIN!r} and {END!r}, between which the table goes")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(
        prog="python -m mhc_metal_simulator.traffic", description=__doc__
    )
    parser.add_argument("--T", type=int, default=DEFAULTS.T, help="tokens")
    parser.add_argument("--n", type=int, default=DEFAULTS.n, help="streams")
    parser.add_argument("--C", type=int, default=DEFAULTS.C, help="channels")
    dtypes = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default=DEFAULTS.dtype, help="of the streams")
    parser.add_argument(
        "--op", choices=math.OPS, action="append", help="only this; may be repeated"
    )
    parser.add_argument(
        "--write", type=Path, help="put the table into this file, between its marks"
    )
    given = parser.parse_args(arguments)
    size = Size(given.T, given.n, given.C, given.dtype)
    made = table(measure(size, given.op or ()), size)
    if given.write is None:
        print(made)
    else:
        text = given.write.read_text(encoding="utf-8")
        given.write.write_text(rewritten(text, made), encoding="utf-8")


if __name__ == "__main__":
    main()
