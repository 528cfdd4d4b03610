"""The printed report of mhc-mlx."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version

import mlx.core as mx

import mhc_core

__all__ = ["diagnostics"]


def diagnostics() -> None:
    """Print versions, the device and the backends of MLX arrays; ``mhc info`` prints more.

    Notes
    -----
    ``diagnostics`` of mhc-mlx 0.6.3.
    """
    for line in _lines():
        print(line)


def _lines() -> Iterator[str]:
    yield f"mhc-core version: {version('mhc-core')} (in place of mhc-mlx 0.6.3)"
    yield f"MLX version:      {version('mlx')}"
    yield f"Python version:   {sys.version.split()[0]}"
    yield f"Platform:         {platform.platform()}"
    yield f"Machine:          {platform.machine()}"
    yield f"Device:           {mx.default_device()}"
    for name, backend in mhc_core.backends().items():
        if backend.spec is not None and "mlx.core.array" in backend.spec.array_types:
            yield f"{name + ':':17} {backend.reason or 'available'}"
    yield "More: mhc info"
