"""The kernels' headers as ordinary C++: formatted, and each compiles by itself as CUDA.

The simulator's tests compile each by itself as Metal.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_on_cpu import FLAGS, FOLDER, needs_gcc

from mhc_backends import kernels

KERNELS = Path(kernels.__file__).parent
HEADERS = sorted(KERNELS.glob("**/*.h"))
AS_CUDA = [path for path in HEADERS if "metal" not in path.relative_to(KERNELS).parts]


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=KERNELS
    )
    return "" if done.returncode == 0 else done.stderr or "failed"


def test_they_are_formatted() -> None:
    assert len(HEADERS) > 100
    handlers = [*KERNELS.parent.glob("jax_cuda/*.h"), *KERNELS.parent.glob("jax_cuda/*.cpp")]
    assert len(handlers) == 2
    assert not _run("clang-format", "--dry-run", "--Werror", *HEADERS, *handlers)


@needs_gcc
def test_each_compiles_by_itself_as_cuda(tmp_path: Path) -> None:
    flags = [*FLAGS, "-I.", "-Icuda"]
    shutil.copy(FOLDER / "cuda_on_cpu.h", tmp_path)
    standin = tmp_path / "cuda_on_cpu.h"
    assert not _run("g++", *flags, "-x", "c++-header", standin, "-o", f"{standin}.gch")

    # NVRTC declares no `uint`, as glibc does: it must be that of the dialect
    own_types = tmp_path / "own_types.h"
    own_types.write_text("#define uint uint_of_the_dialect\n")
    included = ["-include", standin, "-include", own_types]

    def compiled(path: Path) -> str:
        return _run("g++", *flags, *included, "-fsyntax-only", "-x", "c++", path)

    with ThreadPoolExecutor(2) as pool:
        errors = dict(zip(AS_CUDA, pool.map(compiled, AS_CUDA), strict=True))
    assert not {path.name: error[:400] for path, error in errors.items() if error}
    alone = tmp_path / "alone.h"  # the check itself: a name that nothing declares
    alone.write_text('#pragma once\n#include "dialect/words.h"\nFUNCTION Position f();\n')
    assert "Position" in compiled(alone)
    alone.write_text("#pragma once\nuint f();\n")
    assert "uint" in compiled(alone)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_they_compile_by_nvcc_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "headers.cu"
    names = [path.relative_to(KERNELS) for path in AS_CUDA]
    before = "#include <cstdint>\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n"  # as MLX does
    source.write_text(before + "".join(f'#include "{name}"\n' for name in names))
    assert not _run(
        "nvcc", "-arch=sm_90", "-std=c++17", "-ptx", "-Xcicc", "-O0", "-I.", "-Icuda",
        "-Werror", "all-warnings", source, "-o", tmp_path / "headers.ptx",
    )  # fmt: skip
