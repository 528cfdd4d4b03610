"""The command ``mhc-mlx-info``: mhc-mlx's report on what runs here."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version

import mlx.core as mx

import mhc_core

__all__ = ["diagnostics", "main"]


def diagnostics() -> None:
    """Print versions, the device and the backends of MLX arrays; ``mhc info`` says more."""
    for line in _lines():
        print(line)


def _lines() -> Iterator[str]:
    yield f"mhc-core version: {version('mhc-core')} (as mhc-mlx 0.6.3)"
    yield f"MLX version:      {version('mlx')}"
    yield f"Python version:   {sys.version.split()[0]}"
    yield f"Platform:         {platform.platform()}"
    yield f"Machine:          {platform.machine()}"
    yield f"Device:           {mx.default_device()}"
    for name, backend in mhc_core.backends().items():
        if backend.spec is not None and "mlx.core.array" in backend.spec.array_types:
            yield f"{name + ':':17} {backend.reason or 'available'}"
    yield "More: mhc info"


def main() -> None:
    """Print the report; end silently when the reader, such as ``head``, closes the pipe."""
    try:
        diagnostics()
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still held would be written at exit and raise again (docs.python.org, SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
