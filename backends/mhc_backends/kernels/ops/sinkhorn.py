"""sinkhorn: kernels ``sinkhorn`` and ``sinkhorn_vjp``."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens


def forward(
    kernels: Kernels, logits: mx.array, *, iterations: int, eps: float, first: str
) -> mx.array:
    """Compute eq. (9), ``M_t = T_r(T_c(M_{t-1}))``."""
    inputs = {"logits": tokens(logits, 2), "eps": mx.array([eps], mx.float32)}
    outputs = {"out": Out(logits.shape, mx.float32)}
    constants = _constants(iterations, eps, first)
    return kernels("sinkhorn", inputs, outputs, _sizes(logits), **constants)[0]


def vjp(
    kernels: Kernels,
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    iterations: int,
    eps: float,
    first: str,
) -> tuple[mx.array]:
    """Run the iterations again and reverse them."""
    (logits,), (g,) = primals, cotangents
    inputs = {
        "logits": tokens(logits, 2),
        "g": tokens(g, 2),
        "eps": mx.array([eps], mx.float32),
    }
    constants = _constants(iterations, eps, first)
    outputs = {"out": Out.like(logits)}
    return (kernels("sinkhorn_vjp", inputs, outputs, _sizes(logits), **constants)[0],)


def _constants(iterations: int, eps: float, first: str) -> dict[str, int]:
    return {
        "ITERATIONS": iterations,
        "LOG": eps == 0,
        "FIRST_COLUMNS": first == "columns",
    }


def _sizes(matrices: mx.array) -> Sizes:
    return Sizes(math.prod(matrices.shape[:-2]), matrices.shape[-1], 1)
