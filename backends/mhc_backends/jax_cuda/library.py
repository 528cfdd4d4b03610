"""The shared library with the handler that XLA calls: found, built where needed, and registered.

The distribution ``mhc-jax-cuda`` brings it built. Elsewhere a C++ compiler builds it at first use
from the sources beside this file, in seconds and without CUDA's headers, and it stays in the cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mhc_backends.kernels import nvrtc
from mhc_backends.kernels.cuda_function import PRELUDE
from mhc_backends.kernels.nvidia import memory
from mhc_backends.proof.cache import folder
from mhc_core.errors import BackendUnavailableError

__all__ = ["TARGET", "Device", "Gpu", "Wanted", "build", "compiler", "prebuilt"]

TARGET = "mhc_core_plan"
"""The name of the handler in XLA's programs; jax.export asks for permission by it."""

VERSION = 1  # of the attributes' layout, which the library has too
FOLDER = Path(__file__).parent
SOURCE = "cuda.cpp"
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")


class Wanted(NamedTuple):
    """A function that a launch needs: its text, and the bytes of dynamic shared memory."""

    text: str
    memory: int

    @property
    def digest(self) -> str:
        """The name under which programs launch it, wherever and whenever they run."""
        return _digest(self)


@functools.lru_cache(maxsize=4096)
def _digest(wanted: Wanted) -> str:
    return hashlib.sha256(f"{wanted.memory}\n{PRELUDE}{wanted.text}".encode()).hexdigest()


class Device(Protocol):
    """The devices on which plans run, as far as a trace needs to know."""

    target: str
    """The handler's name."""

    @property
    def memory(self) -> int:
        """The bytes of threadgroup memory that a kernel may use on any of them."""
        ...

    def prepare(self, wanted: Sequence[Wanted]) -> None:
        """Make functions ready to be launched."""
        ...


# ---- the library ---------------------------------------------------------------------------------


def prebuilt() -> Path | None:
    """Return the library of the distribution mhc-jax-cuda, if it is installed."""
    found = find_spec("mhc_jax_cuda")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(next(iter(found.submodule_search_locations))) / "cuda.so"
    return path if path.is_file() else None


def compiler() -> str | None:
    """Return the C++ compiler that builds the library, or None."""
    named = os.environ.get("CXX")
    for name in (named, "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def build(source: Path, headers: Path, into: Path) -> None:
    """Build a library; ``headers`` is the folder of jaxlib's headers.

    Others see the file whole or not at all.
    """
    found = compiler()
    if found is None:
        raise BackendUnavailableError(
            "backend 'jax-cuda' needs its library: pip install -e plugins/mhc-jax-cuda, or a C++ "
            "compiler (g++, c++, clang++ or CXX), which builds it at first use"
        )
    into.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=into.parent, suffix=".so")
    os.close(handle)
    try:
        command = [found, *FLAGS, f"-I{headers}", f"-I{FOLDER}", str(source), "-o", name, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendUnavailableError(
                f"backend 'jax-cuda': {' '.join(command)} failed: {done.stderr[:2000]}"
            )
        os.replace(name, into)
    except BaseException:
        os.unlink(name)
        raise


def built(source: Path) -> Path:
    """Return the library that is built from a source and the headers of this jaxlib."""
    import jax

    headers = Path(jax.ffi.include_dir())
    parts = [source, FOLDER / "plan_handler.h", headers / "xla/ffi/api/c_api.h"]
    words = hashlib.sha256(" ".join(FLAGS).encode())
    for part in parts:
        words.update(part.read_bytes())
    place = folder() or Path(tempfile.gettempdir()) / f"mhc-core-{os.getuid()}"
    path = place / "jax-cuda" / f"{source.stem}-{words.hexdigest()[:32]}.so"
    if not path.is_file():
        build(source, headers, path)
    return path


def _load() -> ctypes.CDLL:
    ready = prebuilt()
    if ready is not None:
        library = ctypes.CDLL(str(ready))
        if library.mhc_version() == VERSION:
            return library
    return ctypes.CDLL(str(built(FOLDER / SOURCE)))


# ---- NVIDIA's GPUs -------------------------------------------------------------------------------

FIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)


class Gpu:
    """The NVIDIA GPUs of this process: their handler, and the functions that it launches."""

    target = TARGET

    def __init__(self) -> None:
        import jax

        self._library = _load()
        self._library.mhc_launched.restype = ctypes.c_int64
        self._library.mhc_add.argtypes = (ctypes.c_char_p,) * 3 + (ctypes.c_size_t,)
        self._library.mhc_add.restype = None
        self._find = FIND(self._found)  # kept here: the library calls it at any time
        self._library.mhc_on_missing(self._find)
        for function, platform in (("mhc_plan", "CUDA"), ("mhc_refuse", "cpu")):
            handler = jax.ffi.pycapsule(getattr(self._library, function))
            jax.ffi.register_ffi_target(TARGET, handler, platform=platform)
        self._ready: set[Wanted] = set()

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        """The architectures of this process's GPUs, such as ``"sm_90"``."""
        jax: Any = import_module("jax")
        local = jax.local_devices()
        names = {architecture(one) for one in local if one.platform == "gpu"}
        return tuple(sorted(name for name in names if name))

    @property
    def memory(self) -> int:
        """The bytes of threadgroup memory that a kernel may use on any of them."""
        return min(map(memory, self.architectures), default=memory(""))

    @property
    def launched(self) -> int:
        """The number of launches so far; one that a CUDA graph repeats counts once."""
        return self._library.mhc_launched()

    def prepare(self, wanted: Sequence[Wanted]) -> None:
        """Compile functions for every architecture, and keep their texts for other processes."""
        new = [one for one in dict.fromkeys(wanted) if one not in self._ready]
        if not new:
            return
        pairs = list(product(new, self.architectures))
        with ThreadPoolExecutor(max_workers=8) as pool:
            texts, names = [one.text for one, _ in pairs], [name for _, name in pairs]
            codes = list(pool.map(nvrtc.compiled, texts, names))
        for (one, name), code in zip(pairs, codes, strict=True):
            self._add(one.digest, name, code)
        for one in new:
            path = _text_path(one.digest)
            if path and not path.is_file():
                nvrtc.write(path, one.text.encode())
        self._ready.update(new)

    def _add(self, digest: str, name: str, code: bytes) -> None:
        self._library.mhc_add(digest.encode(), name.encode(), code, len(code))

    def _found(self, digest: bytes, name: bytes) -> int:
        """Compile a function that another process traced; its text is in the cache."""
        path = _text_path(digest.decode())
        text = nvrtc.read(path) if path else None
        if text is None:
            return 0
        try:
            self._add(digest.decode(), name.decode(), nvrtc.compiled(text.decode(), name.decode()))
        except BackendUnavailableError:
            return 0
        return 1


def _text_path(digest: str) -> Path | None:
    base = folder()
    return None if base is None else base / "text" / f"{digest}.cu"


def architecture(device: Any) -> str | None:
    """Return a GPU's architecture, such as ``"sm_90"``, or None if NVIDIA did not make it."""
    major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return f"sm_{major}{minor}" if dot and major.isdigit() and minor.isdigit() else None
