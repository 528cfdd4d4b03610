"""The Metal source that MLX would pass to Apple's compiler, obtained without a GPU.

``mx.export_function`` traces a call of an ``mx.fast.metal_kernel`` without running it, and with
``verbose=True`` MLX prints the source that it generated, to file descriptor 1.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from mhc_metal_simulator.errors import SimulatorError

__all__ = ["capture_source"]

_descriptor_lock = threading.Lock()
_GENERATED = re.compile(r"Generated source code for `[^`\n]*`:\n```\n(.*?)\n```\n", re.DOTALL)


def capture_source(call: Callable[..., Any], inputs: list[tuple[Any, Any]]) -> str:
    """Return the text that MLX prints while it traces ``call`` on zeros of these shapes and dtypes.

    Tracing runs on a thread of its own, because the caller may be inside a transformation
    (``mx.grad``, ``mx.checkpoint``).
    """
    failures: list[BaseException] = []
    printed: list[str] = []

    def trace() -> None:
        try:
            printed.append(_output_of_tracing(call, inputs))
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=trace, name="mhc-simulator-capture")
    worker.start()
    worker.join()
    if failures:
        raise failures[0]
    found = _GENERATED.search(printed[0])
    if found is None:
        raise SimulatorError(
            "MLX printed no source for this kernel; the simulator needs an MLX whose "
            f"mx.export_function traces metal_kernel calls (0.32 does). It printed: {printed[0]!r}"
        )
    _print_the_rest(printed[0], found)
    return found.group(1)


def _output_of_tracing(call: Callable[..., Any], inputs: list[tuple[Any, Any]]) -> str:
    import mlx.core as mx

    zeros = [mx.zeros(shape, dtype) for shape, dtype in inputs]
    libc = ctypes.CDLL(None)
    with _descriptor_lock, tempfile.TemporaryDirectory() as folder:
        sys.stdout.flush()
        libc.fflush(None)
        kept = os.dup(1)
        with open(os.path.join(folder, "printed"), "w+b") as file:
            os.dup2(file.fileno(), 1)
            try:
                mx.export_function(os.path.join(folder, "traced.mlxfn"), call, *zeros)
            finally:
                libc.fflush(None)
                os.dup2(kept, 1)
                os.close(kept)
            file.seek(0)
            return file.read().decode()


def _print_the_rest(printed: str, found: re.Match[str]) -> None:
    """Pass on what other threads printed in the meantime."""
    rest = printed[: found.start()] + printed[found.end() :]
    if rest.strip():
        os.write(1, rest.encode())
