"""sinkhorn_knopp: kernels ``sinkhorn_knopp`` and ``sinkhorn_knopp_vjp``."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens


def forward(
    kernels: Kernels, matrix: mx.array, *, max_iterations: int, epsilon: float, log_space: bool
) -> mx.array:
    """Stop each matrix after its first full step that leaves the largest error under epsilon."""
    inputs = {"logits": tokens(matrix, 2), "epsilon": mx.array([epsilon], mx.float32)}
    outputs = {"out": Out(matrix.shape, mx.float32)}
    constants = {"ITERATIONS": max_iterations, "LOG_SPACE": log_space}
    return kernels("sinkhorn_knopp", inputs, outputs, _sizes(matrix), **constants)[0]


def vjp(
    kernels: Kernels,
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    max_iterations: int,
    epsilon: float,
    log_space: bool,
) -> tuple[mx.array]:
    """Reverse the steps that were taken."""
    (matrix,), (g,) = primals, cotangents
    inputs = {
        "logits": tokens(matrix, 2),
        "g": tokens(g, 2),
        "epsilon": mx.array([epsilon], mx.float32),
    }
    outputs = {"out": Out.like(matrix)}
    constants = {"ITERATIONS": max_iterations, "LOG_SPACE": log_space}
    return (kernels("sinkhorn_knopp_vjp", inputs, outputs, _sizes(matrix), **constants)[0],)


def _sizes(matrices: mx.array) -> Sizes:
    return Sizes(math.prod(matrices.shape[:-2]), matrices.shape[-1], 1)
