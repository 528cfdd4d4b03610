"""The machine in a report: hardware and versions, and nothing about its user."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["devices", "machine", "safe", "versions"]

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


HOMES = re.compile(r"(/home|/Users|[A-Za-z]:[/\\]+Users)[/\\]+[^/\\\s'\":,)]+")


def safe(text: str) -> str:
    """Remove what identifies the user from a message: home folders and the user's name."""
    for folder in (str(Path.home()), os.environ.get("HOME", "")):
        if len(folder) > 1:
            text = text.replace(folder, "~")
    text = HOMES.sub("~", text)
    user = os.environ.get("USER") or os.environ.get("USERNAME") or ""
    # a short name, or root, is in many an innocent word
    return re.sub(rf"\b{re.escape(user)}\b", "someone", text) if len(user) > 4 else text


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


def devices(libraries: tuple[str, ...] = ("mlx", "jax", "torch")) -> dict[str, str]:
    """Return the device that each installed array library computes on; imports the libraries."""
    asked = {"mlx": _mlx_device, "jax": _jax_device, "torch": _torch_device}
    found: dict[str, str] = {}
    for name in libraries:
        if name not in asked:
            continue
        try:
            found[name] = asked[name]()
        except ImportError:
            continue
        except Exception as error:  # a driver that is not there, say: that is worth knowing
            found[name] = safe(f"{type(error).__name__}: {error}".splitlines()[0])
    return found


def _mlx_device() -> str:
    mx: Any = import_module("mlx.core")
    kind = "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"
    words: dict[str, Any] = mx.device_info()
    return f"{kind}, {words.get('device_name', 'unknown')}"


def _jax_device() -> str:
    jax: Any = import_module("jax")
    device = jax.devices()[0]
    return f"{device.platform}, {device.device_kind}"


def _torch_device() -> str:
    torch: Any = import_module("torch")
    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.get_device_name()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
