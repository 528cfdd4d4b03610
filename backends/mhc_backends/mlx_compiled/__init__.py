"""mlx-compiled: the neutral maths under mx.compile, on MLX's CPU, Metal and CUDA devices."""

from __future__ import annotations

from mhc_backends import mlx_common
from mhc_core import math
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

SPEC = BackendSpec(
    name="mlx-compiled",
    module="mhc_backends.mlx_compiled.ops",
    array_types=("mlx.core.array",),
    ops=math.OPS,
    dtypes=mlx_common.NO_FLOAT64,
    mixers=None,
    neutral=True,
    channels="mlx",
    missing=mlx_common.missing,
    device=mlx_common.device,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
