"""A launch of a plan as a CUDA function of its own: its text, and the arguments it takes.

It needs two of CUDA's headers and nothing else, and takes pointers and the lengths of axes.
"""

from __future__ import annotations

import functools

from mhc_backends.kernels.function import LENGTH, NAME, Argument, Function, lengths, typed
from mhc_backends.kernels.plan import Launch

__all__ = ["NAME", "PRELUDE", "TYPES", "Argument", "Function", "constant", "function"]

PRELUDE = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\ntypedef long long int64_t;\n"
"""The text that NVRTC needs before a function's, without an #include of the standard library."""

TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
"""The CUDA types of dtypes."""


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
    for asked in lengths(source, [name for name, _ in (*inputs, *outputs)]):
        arguments.append(asked)
        parameters.append(f"const int64_t {asked.array}_length_{asked.axis}")
    body = LENGTH.sub(r"\1_length_\2", source)
    constants = "".join(f"constexpr {constant(word, value)};\n" for word, value in template)
    limits = f"__launch_bounds__({bounds[0]}, {bounds[1]}) " if bounds else ""
    head = f'extern "C" __global__ {limits}void {NAME}({", ".join(parameters)})'
    return Function(f"{header}{head} {{\n{constants}{body}}}\n", tuple(arguments))


def constant(word: str, value: int) -> str:
    """Return the declaration of a template argument, without what comes before and after it."""
    kind, written = typed(value)
    return f"{kind} {word} = {written}"
