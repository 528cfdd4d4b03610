"""A CPU runner of texts in the CUDA dialect, thread by thread: slow, and right where the text is.

No other test without a GPU covers what only this dialect has, above all its matrix products.
Threads take turns at barriers in one order, so a missing barrier is not found here; the simulator
of Metal finds it in the same body.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401 (gives NumPy the name bfloat16)
import numpy as np
import pytest

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["FLAGS", "TYPES", "Device", "launcher", "needs_gcc", "without_ptx"]

needs_gcc = pytest.mark.skipif(
    shutil.which("g++") is None or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="needs g++ on Linux, whose contexts its threads are, and x86-64, whose float16 it has",
)

FOLDER, HEADER = Path(__file__).parent, "cuda_on_cpu.h"
FLAGS = ["-std=c++17", "-O1", "-mf16c", "-mfma", "-ffp-contract=off", "-w", f"-I{FOLDER}"]
TYPES = {
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
}
"""The CUDA types of MLX's dtypes."""
PTX = {
    "mma.sync.aligned.m16n8k8.": "tensor_core<8>(sum, a, b0, b1)",
    "mma.sync.aligned.m16n8k16.": "tensor_core<16>(sum, a, b[0], b[1])",
    "rcp.approx.f32": "out = 1.0f / v",
    "rcp.approx.ftz.f32": "out = 1.0f / v",
    "st.v2.u32": "memcpy(p, w, 8)",
    "st.v4.u32": "memcpy(p, w, 16)",
    "ld.global.": "memcpy(to, p, sizeof(*p))",
    "cp.async.cg.": "memcpy(to, at_vector(from.p, 16), 16)",
    "cp.async.commit_group": "(void)0",
    "cp.async.wait_group": "(void)0",
}
"""The effect of each PTX statement of the dialect, in C++ with the dialect's own names."""


def without_ptx(text: str) -> str:
    """Replace each PTX statement with C++."""
    while found := re.search(r"\basm( volatile)?\(", text):
        end, brackets = found.end(), 1
        while brackets:
            brackets += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        statement = text[found.start() : end]
        (new,) = (cpp for ptx, cpp in PTX.items() if f'"{ptx}' in statement)
        text = text[: found.start()] + new + text[end:]
    return text


def checked(text: str) -> str:
    """Check every address that a vector is loaded from or stored to."""
    return re.sub(
        r"\(((?:const )?DEVICE typename A::type\*)\)\((.*?)\)",
        r"at_vector((\1)(\2), A::BYTES)",
        text,
    )


def launcher(folder: Path) -> Callable[..., Any]:
    """Return a stand-in for ``mx.fast.cuda_kernel`` that compiles programs in a folder."""

    def make(*, name: str, **texts: Any) -> _Kernel:
        return _Kernel(folder, **texts)

    return make


@dataclass(frozen=True)
class _Kernel:
    """A kernel as MLX makes one from texts; a call runs it."""

    folder: Path
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str
    shared_memory: int = 0

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        arguments, parameters = self._inputs(inputs)
        made = list(zip(output_shapes, output_dtypes, strict=True))
        arguments += [
            np.full((math.prod(shape), dtype.size), 0xFF, np.uint8) for shape, dtype in made
        ]
        parameters += [
            f"{_type(dtype)}* {name}"
            for name, dtype in zip(self.output_names, output_dtypes, strict=True)
        ]
        constants = "".join(f"constexpr int {k} = {int(value)};\n" for k, value in template)
        text = _program(self.header, parameters, constants + self.source, self.shared_memory)
        pointers = [array.ctypes.data for array in arguments]
        blocks = [-(-size // threads) for size, threads in zip(grid, threadgroup, strict=True)]
        misaligned = _compiled(self.folder, text).run(
            (ctypes.c_void_p * len(pointers))(*pointers), *blocks[:2], threadgroup[0]
        )
        assert misaligned == 0, "a vector is misaligned"
        raw = arguments[len(arguments) - len(made) :]
        return [_to_mlx(array, *out) for array, out in zip(raw, made, strict=True)]

    def _inputs(self, inputs: Sequence[mx.array]) -> tuple[list[Any], list[str]]:
        """Return arrays and shapes as MLX passes them, and the parameters that declare them."""
        arguments: list[Any] = []
        parameters: list[str] = []
        for name, array in zip(self.input_names, inputs, strict=True):
            arguments.append(_to_host(array))
            parameters.append(f"const {_type(array.dtype)}* {name}")
            if f"{name}_shape" in self.source:
                arguments.append(np.array(array.shape, np.int32))
                parameters.append(f"const Shape& {name}_shape")
        return arguments, parameters


def _program(header: str, parameters: Sequence[str], body: str, memory: int) -> str:
    header = re.sub(r"#(undef|define) __global__.*\n", "", header)
    body = re.sub(r"extern (__shared__ uint4 \w+)\[\];", rf"\1[{memory // 16 + 1}];", body)
    given = ", ".join(
        f"*static_cast<const Shape*>(a[{k}])"
        if "Shape&" in parameter
        else f"({parameter.rpartition(' ')[0]})a[{k}]"
        for k, parameter in enumerate(parameters)
    )
    text = (
        "struct Shape { int at[10]; int operator[](int k) const { return at[k]; } };\n"
        f"{without_ptx(checked(header))}\n"
        f"static void kernel({', '.join(parameters)}) {{\n{without_ptx(body)}\n}}\n"
    )
    return _INCLUDE + text + _run("run", f"kernel({given})")


def _compiled(folder: Path, text: str) -> ctypes.CDLL:
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        header = folder / f"{HEADER}.gch"  # which g++ finds beside the source: most of its time
        if not header.exists():
            _compile(["-x", "c++-header", str(FOLDER / HEADER)], header)
        source = path.with_suffix(".cpp")
        source.write_text(text)
        _compile(["-shared", str(source)], path)
    return ctypes.CDLL(str(path))


def _compile(words: Sequence[str], path: Path) -> None:
    new = path.with_suffix(f".{os.getpid()}")
    command = ["g++", *FLAGS, "-fPIC", *words, "-o", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    new.rename(path)  # whole for others


class Device:
    """A stand-in for ``mhc_torch.cuda.driver.Nvidia``, which runs plans on the CPU.

    A program costs the compiler two seconds and each function in it a tenth, so :meth:`prepare`
    takes all that a test will launch.
    """

    device_type = "cpu"

    def __init__(self, folder: Path, memory: int = 227 * 1024) -> None:
        self._folder, self._memory = folder, memory
        self._constants: dict[tuple[float, ...], Any] = {}
        self._functions: dict[Any, Any] = {}
        self.launched = 0

    def memory(self, index: int) -> int:
        return self._memory

    def prepare(self, wanted: Sequence[Any]) -> None:
        """Compile functions, all as one program."""
        new = [one for one in dict.fromkeys(wanted) if one not in self._functions]
        if new:
            parts = [_part(k, one.text, one.memory) for k, one in enumerate(new)]
            library = _compiled(self._folder, _INCLUDE + "".join(parts))
            self._functions |= {one: library[f"run_{k}"] for k, one in enumerate(new)}

    def functions(self, index: int, wanted: Sequence[Any]) -> list[Any]:
        self.prepare(wanted)
        return [self._functions[one] for one in wanted]

    def constant(self, index: int, numbers: tuple[float, ...]) -> int:
        array = self._constants.setdefault(numbers, np.array(numbers, np.float32))
        return array.ctypes.data

    def guard(self, index: int) -> Any:
        return None

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: Any) -> Any:
        import torch

        return torch.full(shape, 0xFF if dtype == torch.uint8 else math.nan, dtype=dtype)

    def stream(self, index: int) -> Any:
        return None

    def launch(
        self, function: Any, x: int, y: int, threads: int, memory: int, stream: Any, arguments: int
    ) -> str | None:
        self.launched += 1
        wrong = function(ctypes.c_void_p(arguments), x, y, threads)
        return "a vector is misaligned" if wrong else None


_INCLUDE = f'#include "{HEADER}"\n'


def _part(number: int, text: str, memory: int) -> str:
    """Return a namespace whose ``run`` reads a plan's arguments as a launch in CUDA does."""
    text = re.sub(r"extern (__shared__ uint4 \w+)\[\];", rf"\1[{memory // 16 + 1}];", text)
    head = r'extern "C" __global__ __launch_bounds__\(\d+, \d+\) void mhc_kernel\((.*)\)'
    (parameters,) = re.findall(head, text)
    text = re.sub(head, r"static void mhc_kernel(\1)", text)
    given = ", ".join(
        f"*({parameter.rpartition(' ')[0]} *)a[{k}]"
        for k, parameter in enumerate(parameters.split(", "))
    )
    inside = f"{without_ptx(checked(text))}\n" + _run(f"run_{number}", f"mhc_kernel({given})")
    return f"namespace part_{number} {{\n{inside}}}\n"


def _run(name: str, call: str) -> str:
    return (
        f'extern "C" int {name}(void** a, unsigned x, unsigned y, unsigned threads) {{\n'
        "gridDim = {x, y, 1}, blockDim = {threads, 1, 1};\n"
        "for (unsigned k = 0; k < x * y; k++) {\n"
        "blockIdx = {k % x, k / x, 0};\n"
        f"run_block(threads, [&] {{ {call}; }});\n}}\nreturn misaligned;\n}}\n"
    )


def _type(dtype: mx.Dtype) -> str:
    from mhc_backends.kernels.mlx import dtype_name

    return TYPES[dtype_name(dtype)]


def _to_host(array: mx.array) -> Any:
    """Copy an array to an address as far from a multiple of 16 bytes as a view's in its buffer."""
    import mlx.core as mx

    def address(array: mx.array) -> int:
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        mx.eval(bits)
        view = np.asarray(memoryview(bits))
        return view.ctypes.data if view.flags.c_contiguous else fresh

    from mhc_backends.mlx_common import to_host

    fresh = 0
    fresh = address(mx.zeros(64))
    host = np.ascontiguousarray(to_host(array))
    if host.size == 0:
        return host
    room = np.empty(host.nbytes + 32, np.uint8)
    start = -room.ctypes.data % 16 + (address(array) - fresh) % 16
    placed = room[start : start + host.nbytes].view(host.dtype).reshape(host.shape)
    placed[...] = host
    return placed


def _to_mlx(raw: Any, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    from mhc_backends.kernels.mlx import dtype_name
    from mhc_backends.mlx_common import from_host

    return from_host(raw.reshape(-1).view(np.dtype(dtype_name(dtype))).reshape(shape))
