"""A launch of a plan as a CUDA function of its own: its text, and the arguments it takes.

MLX writes the function around a kernel's text itself. Other libraries get the function whole. It
needs two of CUDA's headers and nothing else, and takes pointers and the lengths of axes.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from mhc_backends.kernels.plan import Launch

__all__ = ["NAME", "PRELUDE", "TYPES", "Argument", "Function", "function"]

NAME = "mhc_kernel"
"""The name of every function; its text tells them apart."""

PRELUDE = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\ntypedef long long int64_t;\n"
"""The text that NVRTC needs before a function's, without an #include of the standard library."""

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
"""The CUDA types of dtypes."""


class Argument(NamedTuple):
    """An argument of eight bytes: the address of an array, or the length of one of its axes.

    Attributes
    ----------
    array
        The name of the input or output.
    axis
        The axis, or None for the address.
    """

    array: str
    axis: int | None = None


class Function(NamedTuple):
    """The text of a function, without :data:`PRELUDE`, and its arguments in order."""

    text: str
    arguments: tuple[Argument, ...]


def function(step: Launch) -> Function:
    """Return the function that a launch runs."""
    return _function(
        step.program.header,
        step.program.source,
        step.program.template,
        step.program.bounds,
        tuple((name, value.dtype) for name, value in step.inputs.items()),
        tuple((name, value.dtype) for name, value in step.outputs.items()),
    )


@functools.cache
def _function(
    header: str,
    source: str,
    template: tuple[tuple[str, int], ...],
    bounds: tuple[int, int] | None,
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[tuple[str, str], ...],
) -> Function:
    arguments: list[Argument] = []
    parameters: list[str] = []
    for name, dtype in inputs:
        arguments.append(Argument(name))
        parameters.append(f"const {TYPES[dtype]}* {name}")
    for name, dtype in outputs:
        arguments.append(Argument(name))
        parameters.append(f"{TYPES[dtype]}* {name}")
    names = {name for name, _ in (*inputs, *outputs)}
    for name, axis in dict.fromkeys(re.findall(r"\b(\w+)_shape\[(\d)\]", source)):
        if name not in names:
            raise ValueError(f"the text asks for the shape of {name}, which is no array")
        arguments.append(Argument(name, int(axis)))
        parameters.append(f"const int64_t {name}_length_{axis}")
    body = re.sub(r"\b(\w+)_shape\[(\d)\]", r"\1_length_\2", source)
    constants = "".join(f"constexpr {_constant(word, value)};\n" for word, value in template)
    limits = f"__launch_bounds__({bounds[0]}, {bounds[1]}) " if bounds else ""
    head = f'extern "C" __global__ {limits}void {NAME}({", ".join(parameters)})'
    return Function(f"{header}{head} {{\n{constants}{body}}}\n", tuple(arguments))


def _constant(word: str, value: int) -> str:
    if isinstance(value, bool):
        return f"bool {word} = {str(value).lower()}"
    return f"int {word} = {value}"
