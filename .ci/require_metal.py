"""Stop unless Metal kernels run on this machine: where nothing can be tested, nothing may pass."""

from __future__ import annotations

import sys
from typing import Any

import mhc_core

SOURCE = "o[thread_position_in_grid.x] = 2 * a[thread_position_in_grid.x];"


def problem() -> str | None:
    """Return why Metal kernels cannot be tested here, or None."""
    backend = mhc_core.backends()["mlx-metal"]
    if not backend.available:
        return f"mlx-metal cannot run here: {backend.reason}"
    import mlx.core as mx

    if mx.default_device() != mx.gpu:
        return f"MLX computes on {mx.default_device()}, not on the GPU"
    return wrong(mx, mx.fast.metal_kernel)


def wrong(mx: Any, metal_kernel: Any) -> str | None:
    """Return what is wrong with a one-line kernel: virtual devices are known to leave zeros."""
    a = mx.arange(1.0, 1001.0)
    doubled = metal_kernel(name="doubled", input_names=["a"], output_names=["o"], source=SOURCE)
    (o,) = doubled(
        inputs=[a],
        grid=(1000, 1, 1),
        threadgroup=(250, 1, 1),
        output_shapes=[a.shape],
        output_dtypes=[a.dtype],
    )
    if mx.array_equal(o, 2 * a):
        return None
    return f"a Metal kernel that doubles 1, 2, 3 gives {o[:3].tolist()} on this device"


if __name__ == "__main__":
    sys.exit(problem())
