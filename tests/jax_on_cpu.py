"""The backend jax-cuda without a GPU: its plans, its handler, and CUDA texts that g++ compiles.

The module is that of a backend, as ``mhc_backends.jax_cuda.ops`` is. The handler is registered for
XLA's CPU under a name of its own.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from cuda_on_cpu import Device as Functions
from cuda_on_cpu import needs_gcc

from mhc_backends import jax_cuda
from mhc_backends.jax.ops import checkpoint, compile, from_host, grad, to_host, vmap
from mhc_backends.jax_cuda.functions import Ops
from mhc_backends.jax_cuda.library import Wanted, built
from mhc_backends.kernels.cuda_function import function
from mhc_backends.kernels.plan import Launch, record

__all__ = [
    "DEVICE", "SPEC", "checkpoint", "compile", "from_host", "grad", "needs_gcc", "to_host", "vjp",
    "vmap",
]  # fmt: skip

NAME = "jax-cuda-on-cpu"
TARGET = "mhc_core_plan_on_cpu"
SPEC = replace(
    jax_cuda.SPEC, name=NAME, module=__name__, missing=lambda: None, takes=None, automatic=False
)
_FOLDER = tempfile.TemporaryDirectory(prefix="mhc-jax-on-cpu-")


class Cpu:
    """A stand-in for ``mhc_backends.jax_cuda.library.Gpu``."""

    target = TARGET
    memory = 227 * 1024

    def __init__(self) -> None:
        self._functions = Functions(Path(_FOLDER.name))
        library = ctypes.CDLL(str(built(Path(__file__).with_suffix(".cpp"))))
        library.mhc_add.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        library.mhc_launched.restype = ctypes.c_int64
        handler = jax.ffi.pycapsule(library.mhc_plan)
        jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
        self._library = library
        self._known: dict[str, int | None] = {}

    @property
    def launched(self) -> int:
        return self._library.mhc_launched()

    def prepare(self, wanted: Sequence[Wanted]) -> None:
        ready = self._functions.functions(0, wanted)
        for one, found in zip(wanted, ready, strict=True):
            self._known[one.digest] = ctypes.cast(found, ctypes.c_void_p).value
        self.restore()

    def forget(self) -> None:
        """Be as in a process that traced nothing."""
        self._library.mhc_forget()

    def restore(self) -> None:
        """Know again what was prepared."""
        for digest, address in self._known.items():
            self._library.mhc_add(digest.encode(), address)

    def prepare_calls(self, calls: Iterable[tuple[str, Any, Any, Sequence[int]]]) -> None:
        """Compile all that calls launch, forward and back, as one program.

        A call is an op, the shapes and dtypes of its arrays, its static arguments, and the places
        of the arrays that are absent.
        """
        wanted: list[Wanted] = []
        for op, primals, static, absent in calls:
            asked = static, "cuda", self.memory, absent
            forward = record("forward_with_saved", op, [primals], *asked)
            outputs, saved = (
                [(one.shape, one.dtype) for one in values]
                for values in (forward.outputs, forward.saved)
            )
            plans = [forward, record("forward", op, [primals], *asked)]
            for more in ([outputs], [outputs, saved]) if saved else ([outputs],):
                plans.append(record("vjp", op, [primals, *more], *asked))
            for plan in plans:
                for step in plan.steps:
                    if isinstance(step, Launch):
                        wanted.append(Wanted(function(step).text, step.program.memory))
        self.prepare(wanted)


DEVICE = Cpu()
_OPS = Ops(DEVICE)
vjp = _OPS.vjp


def __getattr__(name: str) -> Any:
    return getattr(_OPS, name)
