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
from typing import NamedTuple

__all__ = ["DIALECTS", "KERNELS", "bounds", "declarations", "function", "header", "source"]

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


_WITHOUT = re.compile(r"^//// may be without (.*) ////\n", re.MULTILINE)
_DIRECTIVE = re.compile(r"^//// (.*?) ////\n", re.MULTILINE | re.DOTALL)
_ALIGNED = re.compile(
    r"(?P<name>\w+)<(?P<constants>.*)>\((?P<arguments>[^()]*)\): aligned where (?P<where>.*)"
)


@functools.cache
def header(dialect: str) -> str:
    """Return the dialect's words and the common parts, which come before the kernel's function."""
    return _dialect(dialect)[0] + "\n".join(_read(f"common{part}.h") for part in _COMMON)


class _Work(NamedTuple):
    """The parts of a body: what runs first, and the part that has an aligned and a plain form.

    The latter becomes a function of `arguments`, with `constants` as template arguments.
    """

    before: str
    name: str
    constants: Sequence[str]
    arguments: Sequence[str]
    where: str
    work: str

    @classmethod
    def of(cls, name: str) -> _Work | None:
        """Parse a kernel's body; return None if it has no part in two forms."""
        if name not in KERNELS:
            raise ValueError(f"no kernel is named {name!r}; known are {', '.join(KERNELS)}")
        body = _read(f"{name}.h")
        for directive in _DIRECTIVE.finditer(body):
            words = " ".join(directive[1].replace("\n//", "").split())
            if words.startswith("may be without "):
                continue
            found = _ALIGNED.fullmatch(words)
            if found is None:
                raise ValueError(f"{name}.h: no directive is {words!r}")
            return cls(
                body[: directive.start()],
                found["name"],
                found["constants"].split(", "),
                found["arguments"].split(", "),
                found["where"],
                body[directive.end() :],
            )
        return None

    def function(self) -> str:
        """Return the function's definition."""
        constants = [word if " " in word else f"int {word}" for word in self.constants]
        types = [f"typename A{k}" for k in range(len(self.arguments))]
        given = [f"A{k} {word}" for k, word in enumerate(self.arguments)]
        return (
            f"template <{', '.join([*constants, *types])}>\n"
            f"FUNCTION void {self.name}({', '.join([*given, 'Place here'])}) {{\n{self.work}}}\n"
        )

    def calls(self) -> str:
        """Return the code that tests `where` and calls the function for aligned or any arrays."""
        name = f"{self.name}<{', '.join(word.split()[-1] for word in self.constants)}>"
        asked = set(re.findall(r"\bvectors<[^()]*>\((\w+)", self.where))
        known = [f"aligned({word})" if word in asked else word for word in self.arguments]
        return (
            f"if ({self.where})\n{name}({', '.join([*known, 'here'])});\n"
            f"else\n{name}({', '.join([*self.arguments, 'here'])});\n"
        )


@functools.cache
def function(name: str) -> str:
    """Return the function that a kernel's text calls, which comes after the header; "" if none."""
    work = _Work.of(name)
    return work.function() if work else ""


@functools.cache
def source(name: str, dialect: str) -> str:
    """Return the text inside the function of a kernel."""
    work = _Work.of(name)
    body = work.before + work.calls() if work else _read(f"{name}.h")
    return f"{_dialect(dialect)[1]}\n{body}"


def declarations(name: str, names: Collection[str], numbers: Mapping[str, Sequence[float]]) -> str:
    """Return the declarations that stand before a body with these inputs and outputs.

    These are the arrays of float32 numbers, and an empty array for each optional input or output
    that is absent: the body mentions it in code that its constants disable.
    """
    lines = [lines for word, lines in _optional(name).items() if word not in names]
    for word, values in numbers.items():
        exact = (struct.unpack("f", struct.pack("f", value))[0] for value in values)
        listed = ", ".join(f"{value!r}f" for value in exact)
        lines.append(f"const float {word}[{len(values)}] = {{{listed}}};\n")
    return "".join(lines)


@functools.cache
def _optional(name: str) -> dict[str, str]:
    """Return the optional inputs and outputs of a body, with a declaration for each."""
    body = _read(f"{name}.h")
    found = _WITHOUT.search(body)
    return {
        word: f"float {word}[1] = {{}};\n(void){word}[0];\n"
        + (f"const int {word}_shape[1] = {{}};\n" if f"{word}_shape" in body else "")
        for word in (found[1].split(", ") if found else ())
    }


def bounds(threads: int, groups: int) -> str:
    """Return the end of a CUDA header: it limits registers so that ``groups`` groups fit at once.

    MLX writes the kernel's first line, so the bounds go into the definition of its ``__global__``.
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
