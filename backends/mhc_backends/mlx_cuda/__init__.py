"""mlx-cuda: the kernels of mlx-metal on MLX's CUDA build, for NVIDIA GPUs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_backends import mlx_common
from mhc_backends.kernels.nvidia import OLDEST
from mhc_backends.kernels.ops import OPS
from mhc_backends.mlx_metal import NO_VMAP
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl


def missing() -> str | None:
    """Return why CUDA kernels cannot run here, or None."""
    if reason := mlx_common.missing():
        return reason
    mx: Any = import_module("mlx.core")
    if not mx.cuda.is_available():
        return (
            "MLX finds no NVIDIA GPU (mx.cuda.is_available() is False): on a machine that has one, "
            "pip install 'mlx[cuda13]'"
        )
    if reason := mlx_common.not_the_default():
        return reason
    device = mx.device_info(mx.Device(mx.gpu))
    if device.get("compute_capability_major", OLDEST) < OLDEST:
        return (
            f"the kernels need compute capability {OLDEST}.0 or later, and this is "
            f"{device.get('architecture')}: 'mlx-compiled' computes the same here"
        )
    return None


SPEC = BackendSpec(
    name="mlx-cuda",
    module="mhc_backends.mlx_cuda.ops",
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
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
