"""mhc-mlx's kernels by their names, computed by the uniform ops on the selected backend.

Every function has gradients, with or without ``autograd`` in its name. Arguments that set the
launches of mhc-mlx's own kernels are accepted and ignored.
"""

from __future__ import annotations

import mlx.core as mx

import mhc_core as mhc
from mhc_mlx.reference import mhc_forward_fused_reference, mixing_matrix_from_logits
from mhc_mlx.utils import residual_add_agg

__all__ = [
    "mhc_forward_fused_metal",
    "mhc_forward_fused_metal_autograd",
    "residual_add_agg_metal",
    "sinkhorn_knopp_metal",
    "sinkhorn_knopp_metal_autograd",
    "stream_mix_add_metal",
    "stream_mix_add_metal_autograd",
]


def sinkhorn_knopp_metal(
    H_res_raw: mx.array,
    iters: int = 20,
    eps: float = 1e-5,
    threads_per_group: int | None = None,
    verbose: bool = False,
) -> mx.array:
    """Return ``sinkhorn(H_res_raw, first="rows")``."""
    return mixing_matrix_from_logits(H_res_raw, iters, eps)


def mhc_forward_fused_metal(
    x: mx.array,
    M: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    rms_weight: mx.array,
    eps: float = 1e-5,
    threads_per_group: int | None = None,
    output_dtype: mx.Dtype | None = None,
    mix_kernel: str = "auto",
    verbose: bool = False,
) -> mx.array:
    """Return the layer's output ``[B, n, C]`` from its mapped parameters."""
    out = mhc_forward_fused_reference(x, M, H_pre, H_post, rms_weight, eps)
    return out if output_dtype is None else out.astype(output_dtype)


def mhc_forward_fused_metal_autograd(
    x: mx.array,
    M: mx.array,
    H_pre: mx.array,
    H_post: mx.array,
    rms_weight: mx.array,
    eps: float = 1e-5,
    threads_per_group: int | None = None,
    fused_backward: bool = True,
    output_dtype: mx.Dtype | None = None,
    mix_kernel: str = "auto",
    verbose: bool = False,
) -> mx.array:
    """Return the layer's output ``[B, n, C]`` from its mapped parameters."""
    return mhc_forward_fused_metal(x, M, H_pre, H_post, rms_weight, eps, output_dtype=output_dtype)


def stream_mix_add_metal(
    x: mx.array,
    M: mx.array,
    y_dist: mx.array,
    threads_per_group: int | None = None,
    verbose: bool = False,
) -> mx.array:
    """Return ``sum_j M[i, j] x_j + y_i``, ``[B, n, C]``, float32."""
    ones = mx.ones(M.shape[:1])
    wide, y = (array.astype(mx.float32).flatten(-2) for array in (x, y_dist))
    return mhc.gated_combine(wide, y, ones, ones, M).reshape(x.shape)


def residual_add_agg_metal(
    x: mx.array,
    res: mx.array,
    H_pre: mx.array,
    threads_per_group: int | None = None,
    output_dtype: mx.Dtype | None = None,
    verbose: bool = False,
) -> tuple[mx.array, mx.array]:
    """Return ``x' = x + res`` and ``sum_i H_pre_i x'_i``."""
    out, h = residual_add_agg(x, res, H_pre)
    return (out if output_dtype is None else out.astype(output_dtype)), h


sinkhorn_knopp_metal_autograd = sinkhorn_knopp_metal
stream_mix_add_metal_autograd = stream_mix_add_metal
