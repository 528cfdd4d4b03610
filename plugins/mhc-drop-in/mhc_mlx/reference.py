"""mhc-mlx's formulas by their names, computed by the uniform ops on the selected backend.

As there, results are float32 for half-precision arrays too. ``eps`` of Sinkhorn, under which
mhc-mlx stops dividing, is accepted and ignored: ours divides in the log domain, where no line
underflows.
"""

from __future__ import annotations

import mlx.core as mx

import mhc_core as mhc

__all__ = [
    "activate_pre_post",
    "mhc_forward_fused_reference",
    "mhc_forward_reference",
    "mixing_matrix_from_logits",
    "rms_norm",
    "stream_aggregate",
    "stream_distribute",
    "stream_mix_ref",
]


def activate_pre_post(H_pre_raw: mx.array, H_post_raw: mx.array) -> tuple[mx.array, mx.array]:
    """Return ``sigmoid(H_pre_raw)`` and ``2 sigmoid(H_post_raw)``."""
    return mx.sigmoid(_float32(H_pre_raw)), 2.0 * mx.sigmoid(_float32(H_post_raw))


def mixing_matrix_from_logits(H_res_raw: mx.array, iters: int = 20, eps: float = 1e-5) -> mx.array:
    """Return ``sinkhorn(H_res_raw, first="rows")``."""
    return mhc.sinkhorn(_float32(H_res_raw), iters, first="rows")


def stream_aggregate(x_expanded: mx.array, H_pre: mx.array) -> mx.array:
    """Return ``sum_i H_pre_i x_i``, ``[B, C]``."""
    return mhc.aggregate(_float32(x_expanded), H_pre)


def rms_norm(x: mx.array, weight: mx.array, eps: float = 1e-5) -> mx.array:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``."""
    return mhc.rms_norm(_float32(x), weight, eps)


def stream_distribute(y_norm: mx.array, H_post: mx.array) -> mx.array:
    """Return ``H_post_i y``, ``[B, n, C]``."""
    return _float32(H_post)[:, None] * _float32(y_norm)[..., None, :]


def stream_mix_ref(x_expanded: mx.array, M: mx.array) -> mx.array:
    """Return ``sum_j M[i, j] x_j``, ``[B, n, C]``."""
    nothing = mx.zeros(x_expanded.shape[-1:])
    y = mx.broadcast_to(nothing, (*x_expanded.shape[:-2], nothing.size))
    return mhc.combine(_float32(x_expanded), y, mx.zeros(M.shape[:1]), M)


def mhc_forward_fused_reference(
    x_expanded: mx.array,
    M: mx.array,
    H_pre_act: mx.array,
    H_post_act: mx.array,
    rms_weight: mx.array,
    eps: float = 1e-5,
) -> mx.array:
    """Return the layer's output ``[B, n, C]`` from its mapped parameters."""
    y = rms_norm(stream_aggregate(x_expanded, H_pre_act), rms_weight, eps)
    return mhc.combine(_float32(x_expanded), y, H_post_act, M)


def mhc_forward_reference(
    x_expanded: mx.array,
    H_pre_raw: mx.array,
    H_post_raw: mx.array,
    H_res_raw: mx.array,
    rms_weight: mx.array,
    sinkhorn_iters: int = 20,
    eps: float = 1e-5,
) -> mx.array:
    """Return the layer's output ``[B, n, C]`` from its raw parameters."""
    raw = (H_pre_raw, H_post_raw, H_res_raw)
    return mhc.static_layer(_float32(x_expanded), *raw, rms_weight, eps, sinkhorn_iters)


def _float32(array: mx.array) -> mx.array:
    return array.astype(mx.float32)
