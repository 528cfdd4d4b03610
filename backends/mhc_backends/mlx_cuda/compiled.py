"""The kernels' machine code, put where MLX looks before it compiles.

MLX compiles a custom kernel when it first runs it, one after another, 2 to 3 s each, and keeps none
of them. But it looks for every module in its folder of compiled code first, by a name that it makes
of the kernel's name and of a hash of its whole text (``CustomKernel::eval_gpu`` in
``mlx/backend/cuda/custom_kernel.cpp``, ``JitModule`` and ``read_cached_ptx`` in
``mlx/backend/cuda/jit_module.cpp``; https://github.com/ml-explore/mlx at 846d176). So the kernels
of an op are compiled here, side by side and without MLX's headers, kept in this project's cache,
and written there under that name. Where a name is not what MLX looks for, as with another MLX, or
where NVRTC is missing or a folder cannot be written, MLX compiles as before.
"""

from __future__ import annotations

import contextlib
import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mhc_backends.kernels import nvrtc
from mhc_backends.kernels.cuda_function import NAME, TYPES, constant
from mhc_backends.proof import cache

__all__ = ["Kernel", "architecture", "finish", "folder", "place", "start", "write"]

VERSIONS = ("0.32.",)
"""The releases of MLX whose names and texts are known."""

_AXES = 10  # the lengths of a Shape of MLX's, whatever the array has
_SHAPE = (
    f"struct Shape {{ int at[{_AXES}]; "
    "__device__ int operator[](int axis) const { return at[axis]; } };\n"
)
_LONGEST = 245  # a longer name becomes folders


class Kernel(NamedTuple):
    """A kernel as MLX gets it, for inputs and outputs of given dtypes.

    Attributes
    ----------
    name
        Its name in ``mx.fast.cuda_kernel``.
    passed
        The header and the source that MLX gets, which include files.
    whole
        The header and the source themselves.
    inputs, outputs
        Names and dtypes; an input also says whether it has axes.
    template
        The template arguments.
    """

    name: str
    passed: tuple[str, str]
    whole: tuple[str, str]
    inputs: tuple[tuple[str, str, bool], ...]
    outputs: tuple[tuple[str, str], ...]
    template: tuple[tuple[str, int], ...]


# ---- what MLX would compile ----------------------------------------------------------------------


def mlx_name(kernel: Kernel) -> str:
    """Return the name of the function that MLX writes."""
    return f"custom_kernel_{kernel.name}" + "".join(_hashed(value) for _, value in kernel.template)


def _hashed(value: int) -> str:
    return f"_{str(value).lower()[0] if isinstance(value, bool) else value}"


def mlx_text(kernel: Kernel) -> str:
    """Return the text that MLX writes, in MLX's own words, since its hash must be the same."""
    header, source = kernel.passed
    lines = [
        f"const {TYPES[dtype]}* {name},"
        + (f"\n    const __grid_constant__ Shape {name}_shape," if shape else "")
        for name, dtype, shape in _inputs(kernel)
    ]
    lines += [f"{TYPES[dtype]}* {name}," for name, dtype in kernel.outputs]
    constants = [f"  constexpr {constant(*one)};\n" for one in kernel.template]
    return "".join(
        [
            '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n',
            header,
            "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n",
            f"__global__ void {mlx_name(kernel)}(\n    ",
            "\n    ".join(lines)[:-1],
            ") {\n",
            *constants,
            "\n" if constants else "",
            source,
            "\n}\n\n} // namespace mlx::core::cu\n",
        ]
    )


def _inputs(kernel: Kernel) -> list[tuple[str, str, bool]]:
    """Return the inputs, and whether the shape of each is an argument too."""
    source = kernel.passed[1]
    return [
        (name, dtype, axes and f"{name}_shape" in source) for name, dtype, axes in kernel.inputs
    ]


def module_name(kernel: Kernel) -> str:
    """Return the name by which MLX looks for the compiled module."""
    return f"{mlx_name(kernel)}_{hashed(mlx_text(kernel).encode()):x}"


def hashed(content: bytes) -> int:
    """Return ``std::hash<std::string>`` of libstdc++ on 64 bits: MurmurHash64A, seed 0xc70f6907."""
    factor, whole = 0xC6A4A7935BD1E995, (1 << 64) - 1

    def mixed(word: int) -> int:
        word = word * factor & whole
        return (word ^ word >> 47) * factor & whole

    found = 0xC70F6907 ^ len(content) * factor & whole
    end = len(content) & ~7
    for at in range(0, end, 8):
        found = (found ^ mixed(int.from_bytes(content[at : at + 8], "little"))) * factor & whole
    if end < len(content):
        found = (found ^ int.from_bytes(content[end:], "little")) * factor & whole
    found = (found ^ found >> 47) * factor & whole
    return found ^ found >> 47


def folder() -> Path:
    """Return MLX's folder of compiled code, as ``ptx_cache_dir`` finds it."""
    if named := os.environ.get("MLX_PTX_CACHE_DIR"):
        return Path(named)
    words = "TMPDIR", "TMP", "TEMP", "TEMPDIR"
    base = next((os.environ[word] for word in words if os.environ.get(word)), "/tmp")
    return Path(base, "mlx", _version(), "ptx")


def _version() -> str:
    core: Any = mx  # MLX's stubs do not have it
    return str(core.__version__)


def _file(base: Path, name: str) -> Path:
    """Return a module's file without its suffix."""
    parts = [name[at : at + _LONGEST] for at in range(0, len(name), _LONGEST)]
    return base.joinpath(*parts)


# ---- what is compiled in its place ---------------------------------------------------------------


def function_text(kernel: Kernel) -> str:
    """Return a function with the same parameters, which needs none of MLX's headers."""
    header, source = kernel.whole
    parameters: list[str] = []
    for name, dtype, shape in _inputs(kernel):
        parameters.append(f"const {TYPES[dtype]}* {name}")
        if shape:
            parameters.append(f"const __grid_constant__ Shape {name}_shape")
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in kernel.outputs]
    constants = "".join(f"constexpr {constant(*one)};\n" for one in kernel.template)
    head = f'extern "C" __global__ void {NAME}({", ".join(parameters)})'
    return f"{_SHAPE}{header}{head} {{\n{constants}{source}\n}}\n"


def place(kernel: Kernel, architecture: str) -> Path:
    """Compile a kernel, or read it from this project's cache, and write it to MLX's folder.

    Raises
    ------
    BackendUnavailableError, OSError
        If it cannot be compiled or written.
    """
    file = _file(folder(), module_name(kernel))
    code = nvrtc.compiled(function_text(kernel), architecture)
    names = f"mlx::core::cu::{mlx_name(kernel)}\t{NAME}\n".encode()
    # MLX reads the names once it has the code
    for path, content in ((f"{file}.txt", names), (f"{file}.ptx", code)):
        write(Path(path), content)
    return Path(f"{file}.ptx")


def write(path: Path, content: bytes) -> None:
    """Write a file whole, unless it is there already; OSError where that cannot be done."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == content:
            return
    cache.replace(path, content)


# ---- side by side --------------------------------------------------------------------------------

_running: set[Future[Any]] = set()


def start(kernel: Kernel) -> None:
    """Begin to place a kernel, where that can be done; :func:`finish` waits for it."""
    name = architecture()
    known = all(dtype in TYPES for _, dtype, *_ in (*kernel.inputs, *kernel.outputs))
    if name is not None and known:
        _running.add(_pool().submit(place, kernel, name))


def finish() -> None:
    """Wait for all kernels that are being placed. One that failed is left to MLX."""
    if _running:
        mine = list(_running)
        wait(mine)
        _running.difference_update(mine)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="mhc-nvrtc")


@functools.cache
def architecture() -> str | None:
    """Return this GPU's architecture, or None where nothing can be placed."""
    if not _version().startswith(VERSIONS) or nvrtc.missing():
        return None
    found: Any = mx.device_info(mx.Device(mx.gpu)).get("architecture")
    return found if isinstance(found, str) and found.startswith("sm_") else None
