"""Facts about NVIDIA's GPUs that are asked for without CUDA."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["OLDEST", "devices", "memory"]

OLDEST = 8
"""The compute capability whose tensor cores multiply bfloat16."""

# What a threadgroup may have, by the machine: CUDA programming guide, technical specifications.
_MEMORY = {"sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227}  # KiB
_LEAST_MEMORY = 99


def memory(architecture: str) -> int:
    """Return the bytes of threadgroup memory that a kernel may use, as on ``"sm_90"``."""
    return _MEMORY.get(architecture, _LEAST_MEMORY) * 1024


def devices() -> int:
    """Count the GPUs by NVML: CUDA itself would forbid forks from then on.

    Raises
    ------
    OSError
        Where no driver is installed.
    """
    name = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
    nvml, count = ctypes.CDLL(name), ctypes.c_uint(0)
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return 0
    nvml.nvmlShutdown()
    return count.value
