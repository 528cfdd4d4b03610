"""sinkhorn_knopp: kernels ``sinkhorn_knopp`` and ``sinkhorn_knopp_vjp``."""

from __future__ import annotations

import math
from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(
    kernels: Kernels, matrix: Array, *, max_iterations: int, epsilon: float, log_space: bool
) -> Array:
    """Stop each matrix after its first full step that leaves the largest error under epsilon."""
    inputs = {"logits": tokens(matrix, 2), "epsilon": kernels.host.constant([epsilon])}
    outputs = {"out": Out(matrix.shape, FLOAT32)}
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
) -> tuple[Array]:
    """Reverse the steps that were taken."""
    (matrix,), (g,) = primals, cotangents
    inputs = {
        "logits": tokens(matrix, 2),
        "g": tokens(g, 2),
        "epsilon": kernels.host.constant([epsilon]),
    }
    outputs = {"out": Out.like(matrix)}
    constants = {"ITERATIONS": max_iterations, "LOG_SPACE": log_space}
    return (kernels("sinkhorn_knopp_vjp", inputs, outputs, _sizes(matrix), **constants)[0],)


def _sizes(matrices: Array) -> Sizes:
    return Sizes(math.prod(matrices.shape[:-2]), matrices.shape[-1], 1)
