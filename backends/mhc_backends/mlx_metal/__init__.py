"""mlx-metal: hand-written kernels for Apple GPUs, through MLX."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from mhc_backends import mlx_common
from mhc_backends.kernels.ops import OPS
from mhc_backends.proof import KernelProof
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

NO_VMAP = (
    "MLX's custom kernels have no vmap rule: give the arrays leading axes instead, or choose "
    "backend='mlx-compiled'"
)


def missing() -> str | None:
    """Return why Metal kernels cannot run here, or None."""
    if sys.platform != "darwin":
        return (
            f"Metal kernels need macOS on Apple silicon, and this is {sys.platform}: "
            "'mlx-compiled' computes the same here"
        )
    if reason := mlx_common.missing():
        return reason
    mx: Any = import_module("mlx.core")
    if mx.metal.is_available():
        return mlx_common.not_the_default()
    return "MLX finds no Metal GPU (mx.metal.is_available())"


SPEC = BackendSpec(
    name="mlx-metal",
    module="mhc_backends.mlx_metal.ops",
    array_types=("mlx.core.array",),
    ops=OPS,
    dtypes=mlx_common.NO_FLOAT64,
    mixers=None,
    channels="mlx",
    sizes=(1, 32),
    priority=10,
    without={"vmap": NO_VMAP},
    missing=missing,
    device=mlx_common.device,
    proof=KernelProof("mlx-metal", "mlx.core:fast.metal_kernel"),
    disabled_by="MHC_MLX_DISABLE_METAL",  # which users of mhc-mlx have in their scripts
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
