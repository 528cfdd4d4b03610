"""Compilation by NVRTC, and a cache of the results on disk, for all hosts but MLX.

NVRTC is called through cuda-bindings where that is installed, which PyTorch 2.11 and later require
on Linux, and else through ctypes: the wheels of PyTorch and of JAX for CUDA bring the library. A
result is machine code for one architecture (cubin), so that no driver compiles again. Its file is
named by all that it depends on, and holds its own digest: a file that was damaged is compiled anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mhc_backends.kernels.cuda_function import PRELUDE
from mhc_backends.proof.cache import folder, replace
from mhc_core.errors import BackendUnavailableError

__all__ = ["compiled", "missing", "read", "write"]

INSTALL = (
    "pip install nvidia-cuda-nvrtc nvidia-cuda-runtime (for CUDA 12, those names with -cu12), or "
    "-e 'plugins/mhc-torch[cuda]'"
)
OPTIONS = ("-std=c++17",)
HEADERS = ("cuda_bf16.h", "cuda_fp16.h")
_DIGEST = hashlib.sha256().digest_size


def compiled(text: str, architecture: str) -> bytes:
    """Return a function's machine code for an architecture such as ``"sm_90"``."""
    whole = PRELUDE + text
    path = _path(whole, architecture)
    code = read(path) if path else None
    if code is None:
        code = _compile(whole, architecture)
        if path:
            write(path, code)
    return code


def _path(text: str, architecture: str) -> Path | None:
    base = folder()
    if base is None:
        return None
    parts = "\n".join([text, architecture, *OPTIONS, _version(), _headers_digest()])
    return base / "cubin" / f"{hashlib.sha256(parts.encode()).hexdigest()}.{architecture}"


def read(path: Path) -> bytes | None:
    """Return what :func:`write` wrote to a file, if it is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Write a file with its digest, whole or not at all; nothing where that cannot be done."""
    with contextlib.suppress(OSError):
        replace(path, hashlib.sha256(code).digest() + code)


def missing() -> str | None:
    """Return why nothing can be compiled here, or None; no CUDA context is started."""
    try:
        _nvrtc()
        _headers()
    except (BackendUnavailableError, ImportError, OSError) as error:
        return str(error)
    return None


@functools.cache
def _nvrtc() -> Any:
    try:
        return import_module("cuda.bindings.nvrtc")
    except ImportError:
        return _Library(_library())


class _Library:
    """NVRTC's own library under the calls of cuda-bindings, each of which returns a tuple."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _call(self, name: str, *arguments: Any) -> tuple[Any]:
        code = getattr(self._library, name)(*arguments)
        return (_Error(code),)

    def nvrtcVersion(self) -> tuple[Any, int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        done = self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return (*done, major.value, minor.value)

    def nvrtcCreateProgram(self, text: bytes, name: bytes, *_: Any) -> tuple[Any, Any]:
        program = ctypes.c_void_p()
        none = 0, None, None
        done = self._call("nvrtcCreateProgram", ctypes.byref(program), text, name, *none)
        return (*done, program)

    def nvrtcCompileProgram(self, program: Any, count: int, options: list[bytes]) -> tuple[Any]:
        given = (ctypes.c_char_p * count)(*options)
        return self._call("nvrtcCompileProgram", program, count, given)

    def nvrtcGetCUBINSize(self, program: Any) -> tuple[Any, int]:
        return self._size("nvrtcGetCUBINSize", program)

    def nvrtcGetProgramLogSize(self, program: Any) -> tuple[Any, int]:
        return self._size("nvrtcGetProgramLogSize", program)

    def _size(self, name: str, program: Any) -> tuple[Any, int]:
        size = ctypes.c_size_t()
        return (*self._call(name, program, ctypes.byref(size)), size.value)

    def nvrtcGetCUBIN(self, program: Any, into: bytes) -> tuple[Any]:
        return self._call("nvrtcGetCUBIN", program, into)

    def nvrtcGetProgramLog(self, program: Any, into: bytes) -> tuple[Any]:
        return self._call("nvrtcGetProgramLog", program, into)

    def nvrtcDestroyProgram(self, program: Any) -> tuple[Any]:
        return self._call("nvrtcDestroyProgram", ctypes.byref(program))


class _Error(int):
    """A result of NVRTC, which is false for success."""

    @property
    def name(self) -> str:
        """The number, since NVRTC has the names."""
        return f"nvrtcResult {int(self)}"


def _library() -> ctypes.CDLL:
    """Load NVRTC: from a wheel, from a toolkit, or by its name alone."""
    windows = sys.platform == "win32"
    files = [
        Path(str(distribution.locate_file(file)))
        for distribution in distributions()
        if (distribution.metadata["Name"] or "").startswith("nvidia-cuda-nvrtc")
        for file in distribution.files or ()
        if file.name.startswith("nvrtc64_" if windows else "libnvrtc.so")
    ]
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    pattern = "bin/**/nvrtc64_*.dll" if windows else "lib64/libnvrtc.so*"
    files += [file for root in roots if root for file in sorted(Path(root).glob(pattern))]
    names = [*map(str, files), "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    for name in names:
        if "alt" not in Path(name).name and "builtins" not in name:
            with contextlib.suppress(OSError):
                return ctypes.CDLL(name)
    raise BackendUnavailableError(
        f"NVRTC, which compiles kernels for NVIDIA GPUs, is not installed: {INSTALL}"
    )


@functools.cache
def _version() -> str:
    error, major, minor = _nvrtc().nvrtcVersion()
    _check(error, "nvrtcVersion")
    return f"nvrtc {major}.{minor}"


@functools.cache
def _headers_digest() -> str:
    files = sorted(file for name in HEADERS for file in _headers().glob(f"{name.split('.')[0]}.h*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _headers() -> Path:
    """Return the folder of CUDA's headers: of a wheel that PyTorch requires, or of a toolkit."""
    candidates = [
        Path(str(distribution.locate_file(file))).parent
        for distribution in distributions()
        if (distribution.metadata["Name"] or "").startswith("nvidia-cuda-runtime")
        for file in distribution.files or ()
        if file.name == HEADERS[0]
    ]
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [Path(root) / "include" for root in roots if root]
    for candidate in candidates:
        if all((candidate / name).is_file() for name in HEADERS):
            return candidate
    raise BackendUnavailableError(
        f"the kernels for NVIDIA GPUs cannot be compiled: {' and '.join(HEADERS)} are neither in "
        f"the wheel nvidia-cuda-runtime nor under CUDA_HOME: {INSTALL}"
    )


def _compile(text: str, architecture: str) -> bytes:
    nvrtc = _nvrtc()
    options = [f"-arch={architecture}", f"-I{_headers()}", *OPTIONS]
    error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"mhc.cu", 0, [], [])
    _check(error, "nvrtcCreateProgram")
    try:
        encoded = [option.encode() for option in options]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if error:
            raise BackendUnavailableError(
                f"NVRTC cannot compile a kernel for {architecture} ({error.name}): {_log(program)}"
            )
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(error, "nvrtcGetCUBINSize")
        code = bytes(size)
        (error,) = nvrtc.nvrtcGetCUBIN(program, code)
        _check(error, "nvrtcGetCUBIN")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(program: Any) -> str:
    _, size = _nvrtc().nvrtcGetProgramLogSize(program)
    log = bytes(size)
    _nvrtc().nvrtcGetProgramLog(program, log)
    return log.decode(errors="replace").strip("\0 \n")[:2000]


def _check(error: Any, call: str) -> None:
    if error:
        raise BackendUnavailableError(f"NVRTC: {call} failed: {error.name}")
