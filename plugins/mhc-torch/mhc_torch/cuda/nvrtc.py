"""Compilation by NVRTC, which PyTorch's own wheels bring, and a cache of the results on disk.

cuda-bindings calls it: PyTorch 2.11 and later require that package themselves on Linux, and
NVIDIA keeps it in step with the driver. A result is machine code for one architecture (cubin), so
that no driver compiles again. Its file is named by all that it depends on, and holds its own
digest: a file that was damaged is compiled anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mhc_backends.kernels.cuda_function import PRELUDE
from mhc_backends.proof.cache import folder
from mhc_core.errors import BackendUnavailableError

__all__ = ["compiled"]

OPTIONS = ("-std=c++17",)
HEADERS = ("cuda_bf16.h", "cuda_fp16.h")
_DIGEST = hashlib.sha256().digest_size


def compiled(text: str, architecture: str) -> bytes:
    """Return a function's machine code for an architecture such as ``"sm_90"``."""
    whole = PRELUDE + text
    path = _path(whole, architecture)
    code = _read(path) if path else None
    if code is None:
        code = _compile(whole, architecture)
        if path:
            _write(path, code)
    return code


def _path(text: str, architecture: str) -> Path | None:
    base = folder()
    if base is None:
        return None
    parts = "\n".join([text, architecture, *OPTIONS, _version(), _headers_digest()])
    return base / "cubin" / f"{hashlib.sha256(parts.encode()).hexdigest()}.{architecture}"


def _read(path: Path) -> bytes | None:
    """Return the code in a file if it is whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Write a file that others see whole or not at all, where the cache can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise


@functools.cache
def _nvrtc() -> Any:
    return import_module("cuda.bindings.nvrtc")


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
        f"backend 'torch-cuda' cannot compile its kernels: {' and '.join(HEADERS)} are neither in "
        "the wheel nvidia-cuda-runtime nor under CUDA_HOME: "
        "pip install -e 'plugins/mhc-torch[cuda]'"
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
                f"backend 'torch-cuda': NVRTC cannot compile a kernel for {architecture} "
                f"({error.name}): {_log(program)}"
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
        raise BackendUnavailableError(f"backend 'torch-cuda': {call} failed: {error.name}")
