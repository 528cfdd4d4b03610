"""The machine in a report: hardware, devices and versions, and nothing about its user."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mhc_core.discovery import by_priority, missing_reason
from mhc_core.text import safe

__all__ = ["devices", "machine", "versions"]

PACKAGES = (
    "mhc-core",
    "numpy",
    "mlx",
    "mlx-metal",
    "mlx-cuda-12",
    "mlx-cuda-13",
    "mlx-cpu",
    "jax",
    "jaxlib",
    "torch",
    "mhc-mlx",
    "mlx-mhc",
    "mlx-lm",
    "mlx-vlm",
)


def machine() -> dict[str, Any]:
    """Return the system, the processor, its cores and the memory."""
    release = platform.mac_ver()[0] or platform.release()
    return {
        "system": f"{platform.system()} {release} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    if sys.platform == "darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return round(size / 2**30, 1)


def versions() -> dict[str, str]:
    """Return the versions of the relevant packages that are installed."""
    return dict(_installed())


def _installed() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def devices(libraries: Collection[str] | None = None) -> dict[str, str]:
    """Return the device that each array library computes on, as its backends say; imports them.

    Of a library's backends, the best that runs here is asked.

    Parameters
    ----------
    libraries
        The names of the libraries, such as ``"jax"``; all that have a backend if left out.
    """
    found: dict[str, str] = {}
    for spec in sorted(by_priority(), key=lambda spec: missing_reason(spec) is not None):
        library = spec.array_types[0].partition(".")[0]
        if spec.device is None or library in found:
            continue
        if libraries is not None and library not in libraries:
            continue
        try:
            found[library] = spec.device()
        except ImportError:
            continue
        except Exception as error:  # a driver that is not there, say: that is worth knowing
            found[library] = safe(f"{type(error).__name__}: {error}".splitlines()[0])
    return found
