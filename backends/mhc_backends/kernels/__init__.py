"""The text of the kernels: one body per kernel, in words that Metal and CUDA both have.

``<kernel>.h`` is the body of a kernel; ``dialect_metal.h`` and ``dialect_cuda.h`` define the words
that it is written in, and ``common.h`` and ``common_<part>.h``, written in them too, what several
bodies use. MLX makes the function around a body: its arguments from the names of the inputs and
outputs, ``x_shape`` and the like where the body says so, and its template arguments.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files

__all__ = ["DIALECTS", "KERNELS", "bounds", "declarations", "header", "source"]

DIALECTS = ("metal", "cuda")
_FIRST_LINES = "//// the first lines of every kernel ////\n"
_FOLDER = files(__name__)

KERNELS = tuple(
    sorted(
        name.removesuffix(".h")
        for name in (file.name for file in _FOLDER.iterdir())
        if name.endswith(".h") and not name.startswith(("common", "dialect_"))
    )
)
"""The names of all kernels: one body file each."""

_COMMON = (
    "",
    "_streams",
    "_static",
    "_sinkhorn",
    "_project",
    "_mappings",
)  # later ones use earlier


_TWICE = (
    "//// twice: where vectors begin anywhere, and where all begin at their own multiples ////\n"
)
_WITHOUT = re.compile(r"^//// may be without (.*) ////\n", re.MULTILINE)
_FAST = re.compile(r"^//// fast where (.*?) ////\n", re.MULTILINE | re.DOTALL)


@functools.cache
def header(dialect: str) -> str:
    """Return what comes before the kernel's function: the dialect's words and the common parts.

    They come twice, in namespaces ``anywhere`` and ``aligned``. A load that may have to take
    scalars is a branch, and what follows a branch waits for it; so a body that names what must hold
    for vectors everywhere, ``//// fast where ... ////``, is compiled with the words of either.
    """
    once, _, twice = _dialect(dialect)[0].partition(_TWICE)
    words = "\n".join([twice, *(_read(f"common{part}.h") for part in _COMMON)])
    return once + "".join(
        f"namespace {name} {{\nenum {{ ALIGNED = {value} }};\n{words}}}  // namespace {name}\n"
        for value, name in enumerate(("anywhere", "aligned"))
    )


@functools.cache
def source(name: str, dialect: str) -> str:
    """Return the text inside the function of a kernel."""
    if name not in KERNELS:
        raise ValueError(f"no kernel is named {name!r}; known are {', '.join(KERNELS)}")
    before, *fast = _FAST.split(_read(f"{name}.h"))
    first_lines = _dialect(dialect)[1] + "\n"
    if not fast:
        return f"{first_lines}using namespace anywhere;\n{before}"
    condition, work = fast
    condition = condition.replace("\n//", "")
    return (
        f"{first_lines}{before}bool whole;\n"
        f"{{\nusing namespace anywhere;\nwhole = {condition};\n}}\n"
        f"if (whole) {{\nusing namespace aligned;\n{work}}} else {{\n"
        f"using namespace anywhere;\n{work}}}\n"
    )


def declarations(name: str, names: Collection[str], numbers: Mapping[str, Sequence[float]]) -> str:
    """Return what comes before a body that gets these inputs and outputs.

    That is arrays of float32 numbers, and empty arrays in the places of what it may be without and
    is: it names them, in what its constants leave out.
    """
    lines = [lines for word, lines in _optional(name).items() if word not in names]
    for word, values in numbers.items():
        exact = (struct.unpack("f", struct.pack("f", value))[0] for value in values)
        listed = ", ".join(f"{value!r}f" for value in exact)
        lines.append(f"const float {word}[{len(values)}] = {{{listed}}};\n")
    return "".join(lines)


@functools.cache
def _optional(name: str) -> dict[str, str]:
    """Give what a body may be without, and what declares each."""
    body = _read(f"{name}.h")
    found = _WITHOUT.search(body)
    return {
        word: f"float {word}[1] = {{}};\n(void){word}[0];\n"
        + (f"const int {word}_shape[1] = {{}};\n" if f"{word}_shape" in body else "")
        for word in (found[1].split(", ") if found else ())
    }


def bounds(threads: int, groups: int) -> str:
    """Return what ends a CUDA header to limit registers, so that so many threadgroups fit at once.

    MLX writes the kernel's first line, so it is the word in it that takes the bounds.
    """
    words = f"__attribute__((global)) __launch_bounds__({threads}, {groups})"
    return f"#undef __global__\n#define __global__ {words}\n"


def _dialect(dialect: str) -> tuple[str, str]:
    if dialect not in DIALECTS:
        raise ValueError(f"no dialect is named {dialect!r}; known are {', '.join(DIALECTS)}")
    words, _, first_lines = _read(f"dialect_{dialect}.h").partition(_FIRST_LINES)
    return words, first_lines


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
