"""The texts of the kernels: what a body uses of the headers that it includes, and its call.

``bodies/<kernel>.h`` has the function template of a kernel. ``common`` has the functions that
several bodies use. ``metal/dialect`` and ``cuda/dialect`` define the same words in the two
languages, found as ``#include "dialect/..."``. A kernel of one language alone has its body in
``<dialect>/bodies``. MLX writes the function around a text: its
parameters are the inputs and outputs, and ``x_shape`` and the like where the text mentions them.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

__all__ = [
    "DIALECTS",
    "KERNELS",
    "OWN",
    "Signature",
    "body_path",
    "entry",
    "flat",
    "header",
    "headers",
    "signature",
]

DIALECTS = ("metal", "cuda")
_FOLDER = files("mhc_backends.kernels")


def _bodies(path: str) -> tuple[str, ...]:
    folder = _FOLDER / path
    found = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return tuple(sorted(name.removesuffix(".h") for name in found if name.endswith(".h")))


KERNELS = _bodies("bodies")
"""The names of the kernels that all dialects have: one body each."""
OWN = {dialect: _bodies(f"{dialect}/bodies") for dialect in DIALECTS}
"""The names of the kernels that one dialect alone has."""

# ---- headers -------------------------------------------------------------------------------------

_INCLUDE = re.compile(r'#include "(.*)"')


@functools.cache
def header(kernel: str, dialect: str) -> str:
    """Return a kernel's body and the definitions that it uses, without comments."""
    _known(kernel, dialect)
    return _used(flat(dialect, body_path(kernel)), entry(kernel, dialect))


def body_path(kernel: str) -> str:
    """Return the path of a kernel's body in the folder of the kernels."""
    own = [dialect for dialect, names in OWN.items() if kernel in names]
    return "/".join([*own, "bodies", f"{kernel}.h"])


def flat(dialect: str, *paths: str) -> str:
    """Return headers and all that they include, each once, without comments."""
    every = dict.fromkeys(one for path in paths for one in headers(path, dialect))
    return "".join(map(_compact, every))


@functools.cache
def headers(path: str, dialect: str) -> tuple[str, ...]:
    """Return the paths of all headers that a header includes, each once, and then its own.

    Paths are relative to the folder of the kernels. An ``#include "..."`` is looked up in the
    folder of the including header, then in the folder of the dialect.
    """
    found: list[str] = []
    for line in _read(path).splitlines():
        if include := _INCLUDE.match(line):
            found += headers(_resolved(path, include[1], dialect), dialect)
    return tuple(dict.fromkeys([*found, path]))


def _resolved(path: str, included: str, dialect: str) -> str:
    parts = path.split("/")[:-1]
    for part in included.split("/"):
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    beside = "/".join(parts)
    return beside if (_FOLDER / beside).is_file() else f"{dialect}/{included}"


@functools.cache
def _compact(path: str) -> str:
    """Return a header without comments, indentation, empty lines and ``#include "..."``."""
    lines = (" ".join(line.partition("//")[0].split()) for line in _read(path).splitlines())
    return "".join(
        f"{line}\n" for line in lines if line and not re.match(r'#pragma once|#include "', line)
    )


def _read(path: str) -> str:
    return (_FOLDER / path).read_text(encoding="utf-8")


def _known(kernel: str, dialect: str) -> None:
    if dialect not in DIALECTS:
        raise ValueError(f"no dialect is named {dialect!r}; known are {', '.join(DIALECTS)}")
    if kernel not in (known := [*KERNELS, *OWN[dialect]]):
        raise ValueError(f"no kernel is named {kernel!r}; known are {', '.join(known)}")


# ---- definitions that are used -------------------------------------------------------------------


def _used(text: str, source: str) -> str:
    """Return those definitions of a text that ``source`` needs, by the names that each mentions."""
    definitions = [(one, _defines(one)) for one in _definitions(text)]
    words = set(re.findall(r"\w+", source))
    used: list[int] = []
    while new := [
        at
        for at, (_, names) in enumerate(definitions)
        if at not in used and (not names or names & words)
    ]:
        used += new
        words.update(word for at in new for word in re.findall(r"\w+", definitions[at][0]))
    return "".join(definitions[at][0] for at in sorted(used))


def _definitions(text: str) -> Iterator[str]:
    """Split a text without comments into its definitions and lines for the preprocessor."""
    lines: list[str] = []
    depth = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        directive = line.startswith("#")
        if not directive:
            depth += len(re.findall(r"[({[]", line)) - len(re.findall(r"[)}\]]", line))
        if depth == 0 and (directive or line.endswith((";\n", "}\n"))):
            yield "".join(lines)
            lines = []
    if lines:
        raise ValueError(f"no definition ends after {lines[0]!r}")


_NAMED = re.compile(
    r"#define (?P<macro>\w+)|(?:template <[^<>]*>\s|namespace \w+ {\s)?(?:"
    r"enum \{(?P<constants>[^}]*)\}|typedef [^;]*?(?P<type>\w+);|struct (?P<struct>\w+)"
    r"|[^({;=]*?\b(?P<function>\w+)\()"
)


def _defines(definition: str) -> set[str]:
    """Return the names that a definition defines; none for what a text needs in any case."""
    if not (found := _NAMED.match(definition)):
        return set()
    named = {name: text for name, text in found.groupdict().items() if text is not None}
    if "constants" in named:
        return {re.findall(r"\w+", one)[0] for one in named["constants"].split(",") if one.strip()}
    return set(named.values())


# ---- signatures ----------------------------------------------------------------------------------


class Signature(NamedTuple):
    """The template and the parameters of a body, as its header declares them.

    Attributes
    ----------
    constants
        The names of the template arguments that are values.
    parameters
        The names of the parameters, in order, except the last one, the position.
    lengths
        Those that are lengths of an array's axes, such as ``x_shape_0``, and their types.
    shared
        The threadgroup arrays among the parameters, each with the type of its elements.
    sizes
        The size of each of these arrays, as ``<kernel>_memory`` has it.
    aligned
        The template arguments and the parameters of ``<kernel>_aligned``; None if the body has no
        access policy.
    statements
        The statements of a body that has no access policy and mentions no type of its arrays: they
        are written where others are called. Empty for the others.
    """

    constants: Sequence[str]
    parameters: Sequence[str]
    lengths: Mapping[str, str]
    shared: Mapping[str, str]
    sizes: Mapping[str, str]
    aligned: tuple[Sequence[str], Sequence[str]] | None
    statements: str

    @property
    def words(self) -> frozenset[str]:
        """Return the names of all values that its text takes as template arguments."""
        sizes = re.findall(r"\w+", " ".join(self.sizes.values()))
        asked = self.aligned[0] if self.aligned else ()
        return frozenset([*self.constants, *sizes, *asked])


@functools.cache
def signature(kernel: str) -> Signature:
    """Read the signature of a kernel's body."""
    text = _compact(body_path(kernel))
    template, declared, statements = _function(text, "void", kernel)
    shared = {name: kind.split()[1].rstrip("*") for name, kind in declared if "threadgroup" in kind}
    lengths = {name: kind for name, kind in declared if re.search(r"_shape_\d$", name)}
    types = [name for name, kind in map(_declared, template) if kind == "typename"]
    aligned = None
    if "ACCESS" in types:
        constants, given, _ = _function(text, "bool", f"{kernel}_aligned")
        aligned = _values(constants), [name for name, _ in given]
    return Signature(
        _values(template),
        [name for name, _ in declared[:-1]],
        lengths,
        shared,
        _sizes(kernel, text),
        aligned,
        "" if set(types) & set(re.findall(r"\w+", statements)) else statements,
    )


def _sizes(kernel: str, text: str) -> dict[str, str]:
    """Return the sizes of a body's threadgroup arrays, as its struct of constants has them."""
    struct = rf"(?:template <([^<>]*)>\s+)?struct {kernel}_memory {{\s+enum {{([^}}]*)}};"
    if not (memory := re.search(struct, text)):
        return {}
    pairs = (one.split("=", 1) for one in re.split(r",\s*(?=\w+ =)", memory[2].strip().rstrip(",")))
    values = {name.strip(): " ".join(value.split()) for name, value in pairs}
    constants = f"<{', '.join(_values(memory[1].split(',')))}>" if memory[1] else ""
    return {
        name: f"{kernel}_memory{constants}::{name}"
        if set(values) & set(re.findall(r"\w+", value))
        else value
        for name, value in values.items()
    }


def _function(text: str, result: str, name: str) -> tuple[list[str], list[tuple[str, str]], str]:
    """Return the template's parameters, names and types of the function's, and its statements."""
    found = re.search(rf"template <([^<>]*)>\s+FUNCTION {result} {name}\(([^()]*)\) {{\n", text)
    if found is None:
        raise ValueError(f"no function template of a body is `FUNCTION {result} {name}(`")
    statements = next(_definitions("{\n" + text[found.end() :]))[2:-2]
    declared = [_declared(parameter) for parameter in found[2].split(",")]
    return found[1].split(","), declared, statements


def _values(template: Sequence[str]) -> list[str]:
    return [name for name, kind in map(_declared, template) if name and kind != "typename"]


def _declared(words: str) -> tuple[str, str]:
    kind, _, name = words.strip().rpartition(" ")
    return name, kind


# ---- the lines that call a body ------------------------------------------------------------------

_POSITION = {
    "metal": "threadgroup_position_in_grid.x, threadgroup_position_in_grid.y,\n"
    "threadgroups_per_grid.x, threadgroups_per_grid.y, thread_index_in_threadgroup,\n"
    "threads_per_threadgroup.x",
    "cuda": "blockIdx.x, blockIdx.y, gridDim.x, gridDim.y, threadIdx.x, blockDim.x",
}
_SHARED = {"metal": "threadgroup", "cuda": "__shared__"}


@functools.cache
def entry(
    kernel: str,
    dialect: str,
    absent: frozenset[str] = frozenset(),
    numbers: tuple[tuple[str, float], ...] = (),
    launched: bool = False,
) -> str:
    """Return the lines inside the function that MLX writes: they call the body, or are its own.

    Parameters
    ----------
    kernel
        The name of the kernel.
    dialect
        ``"metal"`` or ``"cuda"``.
    absent
        Inputs and outputs that this launch does not have. The text declares an empty array for
        each: the body's constants disable the code that mentions it.
    numbers
        The values of the body's parameters that are numbers; they are written into the text.
    launched
        Whether the launch determines the size of the threadgroup memory. In CUDA the text then does
        not contain the size.
    """
    _known(kernel, dialect)
    body = signature(kernel)
    return "".join(
        [
            f"const Position here = {{{_POSITION[dialect]}}};\n",
            *_absent(body, absent),
            *_lengths(body, absent),
            *(f"const float {name} = {_float(value)};\n" for name, value in numbers),
            *_memory(body, dialect, launched),
            *_calls(kernel, body),
        ]
    )


def _absent(body: Signature, absent: Collection[str]) -> Iterator[str]:
    for name in body.parameters:
        if name in absent:
            yield f"float {name}[1] = {{}};\n"


def _lengths(body: Signature, absent: Collection[str]) -> Iterator[str]:
    for name, kind in body.lengths.items():
        array, _, axis = name.rpartition("_shape_")
        length = "0" if array in absent else f"{array}_shape[{axis}]"
        yield f"const {kind} {name} = {length};\n"


def _memory(body: Signature, dialect: str, launched: bool) -> Iterator[str]:
    for name, kind in body.shared.items():
        if launched and dialect == "cuda":
            yield f"extern __shared__ {kind} {name}[];\n"
        else:
            yield f"{_SHARED[dialect]} {kind} {name}[{body.sizes[name]}];\n"


def _calls(kernel: str, body: Signature) -> Iterator[str]:
    if body.statements:
        yield body.statements
        return
    arguments = ", ".join(
        [*(f"&{name}[0]" if name in body.shared else name for name in body.parameters), "here"]
    )
    if body.aligned is None:
        yield f"{kernel}<{', '.join(body.constants)}>({arguments});\n"
        return
    constants, asked = body.aligned
    template = f"<{', '.join(constants)}>" if constants else ""
    yield f"if ({kernel}_aligned{template}({', '.join(asked)}))\n"
    yield f"{kernel}<{', '.join(['Aligned', *body.constants])}>({arguments});\n"
    yield f"else\n{kernel}<{', '.join(['Anywhere', *body.constants])}>({arguments});\n"


def _float(value: float) -> str:
    return f"{struct.unpack('f', struct.pack('f', value))[0]!r}f"
