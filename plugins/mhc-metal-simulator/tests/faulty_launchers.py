"""Faulty launchers of the simulator, for a process of its own that tries kernels.

Each spoils, in one way, the kernel that ``MHC_TEST_KERNEL`` names. All of them append the name of
each kernel that is launched to the file that ``MHC_TEST_LAUNCHES`` names.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import mlx.core as mx

from mhc_metal_simulator.kernel import metal_kernel as simulated

Launch = Any


def _spoiled(name: str, launch: Launch, **texts: Any) -> Launch:
    """Return a kernel that is launched by another function, if it is the kernel to spoil."""
    kernel = simulated(name, **texts)

    def counted(**arguments: Any) -> Any:
        with open(os.environ["MHC_TEST_LAUNCHES"], "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        return launch(kernel, arguments) if _is_it(name) else kernel(**arguments)

    return counted


def _is_it(name: str) -> bool:
    return name.startswith(f"mhc_{os.environ.get('MHC_TEST_KERNEL', 'none')}_")


def sound(*, name: str, **texts: Any) -> Launch:
    return _spoiled(name, None, **texts)


def compile_error(*, name: str, **texts: Any) -> Launch:
    if _is_it(name):
        texts["source"] += "int a_name = another;\n"
    return simulated(name, **texts)


def refused(*, name: str, **texts: Any) -> Launch:
    def launch(kernel: Any, arguments: dict[str, Any]) -> Any:
        return kernel(**{**arguments, "grid": (2048, 1, 1), "threadgroup": (2048, 1, 1)})

    return _spoiled(name, launch, **texts)


def wrong(*, name: str, **texts: Any) -> Launch:
    def launch(kernel: Any, arguments: dict[str, Any]) -> Any:
        return [output * 1.001 for output in kernel(**arguments)]

    return _spoiled(name, launch, **texts)


def nan(*, name: str, **texts: Any) -> Launch:
    def launch(kernel: Any, arguments: dict[str, Any]) -> Any:
        return [mx.full(output.shape, mx.nan, output.dtype) for output in kernel(**arguments)]

    return _spoiled(name, launch, **texts)


def aborted(*, name: str, **texts: Any) -> Launch:
    def launch(*_: Any) -> Any:
        os.write(2, b"[METAL] Command buffer execution failed: Caused GPU Hang Error\n")
        os.abort()

    return _spoiled(name, launch, **texts)


def killed(*, name: str, **texts: Any) -> Launch:
    def launch(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    return _spoiled(name, launch, **texts)


def hanging(*, name: str, **texts: Any) -> Launch:
    def launch(*_: Any) -> Any:
        time.sleep(600)

    return _spoiled(name, launch, **texts)
