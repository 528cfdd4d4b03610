"""The text of the kernels: one body per kernel, in words that Metal and CUDA both have.

``<kernel>.h`` is the body of a kernel; ``dialect_metal.h`` and ``dialect_cuda.h`` define the words
that it is written in, and ``common.h``, written in them too, what several bodies use. MLX makes the
function around a body: its arguments from the names of the inputs and outputs, ``x_shape`` and the
like where the body says so, and its template arguments.
"""

from __future__ import annotations

import functools
from importlib.resources import files

__all__ = ["DIALECTS", "KERNELS", "header", "source"]

DIALECTS = ("metal", "cuda")
_FIRST_LINES = "//// the first lines of every kernel ////\n"
_FOLDER = files(__name__)

KERNELS = tuple(
    sorted(
        name.removesuffix(".h")
        for name in (file.name for file in _FOLDER.iterdir())
        if name.endswith(".h") and name != "common.h" and not name.startswith("dialect_")
    )
)
"""The names of all kernels: one body file each."""


@functools.cache
def header(dialect: str) -> str:
    """Return what comes before the kernel's function: the dialect's words and the common parts."""
    return _dialect(dialect)[0] + "\n" + _read("common.h")


@functools.cache
def source(name: str, dialect: str) -> str:
    """Return the text inside the function of a kernel."""
    if name not in KERNELS:
        raise ValueError(f"no kernel is named {name!r}; known are {', '.join(KERNELS)}")
    return _dialect(dialect)[1] + "\n" + _read(f"{name}.h")


def _dialect(dialect: str) -> tuple[str, str]:
    if dialect not in DIALECTS:
        raise ValueError(f"no dialect is named {dialect!r}; known are {', '.join(DIALECTS)}")
    words, _, first_lines = _read(f"dialect_{dialect}.h").partition(_FIRST_LINES)
    return words, first_lines


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
