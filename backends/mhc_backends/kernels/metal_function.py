"""A launch of a plan as a Metal function of its own: its text, and the arguments it takes.

The function is written as MLX writes it (``mlx/backend/metal/custom_kernel.cpp``), so no word of it
is new to Apple's compiler. The text needs none of the utilities that MLX puts before its own. All
arrays are in device memory; the lengths of their axes are one more argument, an array of int64_t in
constant memory.
"""

from __future__ import annotations

import functools
import re

from mhc_backends.kernels.function import NAME, Argument, Function, lengths, typed
from mhc_backends.kernels.plan import Launch

__all__ = ["LENGTHS", "MOST_BUFFERS", "NAME", "TYPES", "function", "written"]

LENGTHS = "mhc_lengths"
"""The name of the parameter that has the lengths of axes."""

MOST_BUFFERS = 31
"""The buffers that a function may have: "Maximum number of entries in the buffer argument table,
per graphics or kernel function" in Apple's Metal Feature Set Tables.
"""

TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
"""The Metal types of dtypes; bfloat is of Metal 3.1."""

_POSITIONS = {
    "thread_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_threadgroup": "uint3",
}
_INSTANCE = "mhc_instance"


def function(step: Launch) -> Function:
    """Return the function that a launch runs; its lengths come last, as one argument."""
    return written(
        step.program.header,
        step.program.source,
        step.program.template,
        tuple((name, value.dtype) for name, value in step.inputs.items()),
        tuple((name, value.dtype) for name, value in step.outputs.items()),
    )


@functools.cache
def written(
    header: str,
    source: str,
    template: tuple[tuple[str, int], ...],
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[tuple[str, str], ...],
) -> Function:
    """Return a function from the texts of a program, and the names and dtypes of its arrays."""
    arrays = [name for name, _ in (*inputs, *outputs)]
    asked = lengths(source, arrays)
    body = source
    for place, (array, axis) in enumerate(asked):
        body = re.sub(rf"\b{array}_shape\[{axis}\]", f"{LENGTHS}[{place}]", body)
    parameters = [f"const device {TYPES[dtype]}* {name}" for name, dtype in inputs]
    parameters += [f"device {TYPES[dtype]}* {name}" for name, dtype in outputs]
    parameters += [f"const constant int64_t* {LENGTHS}"] if asked else []
    if len(parameters) > MOST_BUFFERS:
        raise ValueError(
            f"a launch has {len(parameters)} arrays and lengths; Metal takes {MOST_BUFFERS}"
        )
    places = [f"{one} [[buffer({k})]]" for k, one in enumerate(parameters)]
    places += [f"{kind} {name} [[{name}]]" for name, kind in _POSITIONS.items()]
    name = _INSTANCE if template else NAME
    head = f"[[kernel]] void {name}(\n  " + ",\n  ".join(places) + f") {{\n{body}}}\n"
    if template:
        values = [typed(value) for _, value in template]
        words = ", ".join(
            f"{kind} {word}" for (word, _), (kind, _) in zip(template, values, strict=True)
        )
        instance = f"{name}<{', '.join(value for _, value in values)}>"
        head = (
            f"template <{words}>\n{head}"
            f'template [[host_name("{NAME}")]] [[kernel]] decltype({instance}) {instance};\n'
        )
    arguments = (*map(Argument, arrays), *asked)
    return Function(header + head, arguments)
