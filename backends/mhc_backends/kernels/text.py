"""The texts of the kernels: a body's header with all that it includes, and the lines that call it.

``bodies/<kernel>.h`` has the function template of a kernel. ``common`` has the functions that
several bodies use. ``metal/dialect`` and ``cuda/dialect`` define the same words in the two
languages, found as ``#include "dialect/..."``. MLX writes the function around a text: its
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
    "Signature",
    "bounds",
    "entry",
    "flat",
    "header",
    "headers",
    "signature",
]

DIALECTS = ("metal", "cuda")
_FOLDER = files("mhc_backends.kernels")

KERNELS = tuple(
    sorted(
        name.removesuffix(".h")
        for name in (file.name for file in (_FOLDER / "bodies").iterdir())
        if name.endswith(".h")
    )
)
"""The names of all kernels: one body each."""

# ---- headers -------------------------------------------------------------------------------------

_INCLUDE = re.compile(r'#include "(.*)"')


@functools.cache
def header(kernel: str, dialect: str) -> str:
    """Return a kernel's body after all that it includes, without comments."""
    _known(kernel, dialect)
    return flat(dialect, f"bodies/{kernel}.h")


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
    lines = (line.partition("//")[0].strip() for line in _read(path).splitlines())
    return "".join(
        f"{line}\n" for line in lines if line and not re.match(r'#pragma once|#include "', line)
    )


def _read(path: str) -> str:
    return (_FOLDER / path).read_text(encoding="utf-8")


def _known(kernel: str, dialect: str) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"no kernel is named {kernel!r}; known are {', '.join(KERNELS)}")
    if dialect not in DIALECTS:
        raise ValueError(f"no dialect is named {dialect!r}; known are {', '.join(DIALECTS)}")


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
        The template arguments of ``<kernel>_memory``, which has the size of each of these arrays.
    aligned
        The template arguments and the parameters of ``<kernel>_aligned``; None if the body has no
        access policy.
    """

    constants: Sequence[str]
    parameters: Sequence[str]
    lengths: Mapping[str, str]
    shared: Mapping[str, str]
    sizes: Sequence[str]
    aligned: tuple[Sequence[str], Sequence[str]] | None


@functools.cache
def signature(kernel: str) -> Signature:
    """Read the signature of a kernel's body."""
    text = _compact(f"bodies/{kernel}.h")
    template, declared = _function(text, "void", kernel)
    shared = {name: kind.split()[1].rstrip("*") for name, kind in declared if "threadgroup" in kind}
    lengths = {name: kind for name, kind in declared if re.search(r"_shape_\d$", name)}
    memory = re.search(rf"(?:template <([^<>]*)>\s+)?struct {kernel}_memory ", text)
    aligned = None
    if template[0] == "typename ACCESS":
        constants, given = _function(text, "bool", f"{kernel}_aligned")
        aligned = _values(constants), [name for name, _ in given]
    return Signature(
        _values(template),
        [name for name, _ in declared[:-1]],
        lengths,
        shared,
        _values((memory[1] or "").split(",") if memory else []),
        aligned,
    )


def _function(text: str, result: str, name: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the template's parameters, and the names and types of the function's."""
    found = re.search(rf"template <([^<>]*)>\s+FUNCTION {result} {name}\(([^()]*)\) {{", text)
    if found is None:
        raise ValueError(f"no function template of a body is `FUNCTION {result} {name}(`")
    return found[1].split(","), [_declared(parameter) for parameter in found[2].split(",")]


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
    """Return the lines inside the function that MLX writes: they call the body.

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
            *_memory(kernel, body, dialect, launched),
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


def _memory(kernel: str, body: Signature, dialect: str, launched: bool) -> Iterator[str]:
    sizes = f"<{', '.join(body.sizes)}>" if body.sizes else ""
    for name, kind in body.shared.items():
        if launched and dialect == "cuda":
            yield f"extern __shared__ {kind} {name}[];\n"
        else:
            yield f"{_SHARED[dialect]} {kind} {name}[{kernel}_memory{sizes}::{name}];\n"


def _calls(kernel: str, body: Signature) -> Iterator[str]:
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


def bounds(threads: int, groups: int) -> str:
    """Return the end of a CUDA header: it limits registers so that ``groups`` threadgroups fit.

    Launch bounds belong into the kernel's first line, which MLX writes. So they go into the
    definition of its ``__global__``.
    """
    words = f"__attribute__((global)) __launch_bounds__({threads}, {groups})"
    return f"#undef __global__\n#define __global__ {words}\n"
