"""sinkhorn: kernels ``sinkhorn`` and ``sinkhorn_vjp``."""

from __future__ import annotations

import math
from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Compute eq. (9), ``M_t = T_r(T_c(M_{t-1}))``."""
    inputs = {"logits": tokens(logits, 2), "eps": kernels.host.constant([eps])}
    outputs = {"out": Out(logits.shape, FLOAT32)}
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
) -> tuple[Array]:
    """Run the iterations again and reverse them."""
    (logits,), (g,) = primals, cotangents
    inputs = {
        "logits": tokens(logits, 2),
        "g": tokens(g, 2),
        "eps": kernels.host.constant([eps]),
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


def _sizes(matrices: Array) -> Sizes:
    return Sizes(math.prod(matrices.shape[:-2]), matrices.shape[-1], 1)
