"""The backend ``mlx-metal-simulator``: the ops and kernels of ``mlx-metal``, simulated.

It is selected only by name. Importing this module imports neither MLX nor the simulator.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from mhc_backends import mlx_common
from mhc_backends.mlx_metal import SPEC as METAL
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

__all__ = ["SPEC", "mhc_backend_specs"]

_NO_COMPILE = (
    "the simulator runs a kernel as it is called, and mx.compile has no values then: call it "
    "outside of mx.compile, or choose backend='mlx-compiled'"
)


def missing() -> str | None:
    """Return what the simulator lacks here, or None."""
    if sys.platform != "linux":  # its fibers, and how it loads the libraries that it compiles
        return f"the simulator runs on Linux, and this is {sys.platform}"
    if reason := mlx_common.missing():
        return reason
    from mhc_metal_simulator.compiler import find_compiler
    from mhc_metal_simulator.errors import SimulatorError

    try:
        find_compiler()
    except SimulatorError as error:
        return str(error)
    return None


SPEC = BackendSpec(
    name="mlx-metal-simulator",
    module=__name__,
    api_version=1,
    array_types=METAL.array_types,
    ops=METAL.ops,
    dtypes=METAL.dtypes,
    mixers=METAL.mixers,
    channels=METAL.channels,
    sizes=METAL.sizes,
    automatic=False,
    without={**METAL.without, "compile": _NO_COMPILE},
    missing=missing,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the spec of the backend."""
    return [SPEC]


@functools.cache
def _ops() -> Any:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    from mhc_metal_simulator.kernel import metal_kernel

    return Ops(Kernels(metal_kernel, "metal"))


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "from_host", "grad", "to_host"):
        return getattr(mlx_common, name)
    if name == "vjp" or name in METAL.ops:
        return getattr(_ops(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
