"""A simulator that runs kernels of ``mx.fast.metal_kernel`` on a Linux machine without a GPU.

:func:`metal_kernel` takes the place of ``mx.fast.metal_kernel``. clang compiles the text that
MLX would pass to Apple's compiler, and it runs thread by thread. Behaviour that a GPU leaves
undefined raises an error that names the kernel, the thread and the array.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_metal_simulator.errors import (
        CompileError,
        KernelFaultError,
        LaunchError,
        SimulatorError,
        SimulatorUnavailableError,
        TracedCallError,
    )
    from mhc_metal_simulator.kernel import SimulatedKernel, metal_kernel
    from mhc_metal_simulator.launch import LaunchRecord, Options, Output, options, record, simulate

__all__ = [
    "CompileError",
    "KernelFaultError",
    "LaunchError",
    "LaunchRecord",
    "Options",
    "Output",
    "SimulatedKernel",
    "SimulatorError",
    "SimulatorUnavailableError",
    "TracedCallError",
    "metal_kernel",
    "options",
    "record",
    "simulate",
]

# Nothing is imported until a name is used, above all not MLX.
_HOMES = ("errors", "kernel", "launch")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
