"""The one tolerance table: a result may be off by K roundings of the computation, plus its own.

The error of an array is ``max |got - want| / max |want|``. What is allowed is::

    K[op, quantity] * eps(computation) * condition + eps(array) / 2

The computation is in float32 (float64 for float64 streams). The second term applies only to an
array that is narrower than the computation, which is rounded once, at the end. H_res of bfloat16
streams is float32, so it must be right to float32, and a sum taken in bfloat16 fails. The condition
is 1 plus how far the oracle's own result moves, in roundings, when every input moves by one
rounding: a sum that happens to cancel is not blamed on the backend.

The factors were measured with up to 20 iterations of Sinkhorn, as in released models. Each
iteration adds roundings: 130 iterations that do not converge needed 2.2 times as much (the gradient
of sinkhorn_knopp on mlx-compiled, ten seeds). With more than 20 iterations, the condition is
multiplied by iterations / 20.

The factors were measured on the built-in backends, the worst of ten seeds rounded up to a power of
two and doubled, at least 4. Those of second derivatives were measured on mlx-compiled and torch. A
plugin cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import ml_dtypes
import numpy as np

__all__ = ["DIFFERENCES", "Quantity", "eps", "rounds", "tolerance"]

Quantity = Literal["forward", "gradient", "second"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

K: Mapping[str, tuple[float, float, float]] = {
    # op: (forward, gradient, second derivatives)
    "aggregate": (4, 16, 4),
    "combine": (4, 16, 4),
    "combine_pre": (16, 64, 8),
    "combine_pre_norm": (16, 64, 8),
    "contract": (4, 4, 4),
    "expand": (0, 4, 4),
    "gated_combine": (4, 8, 8),
    "gated_head": (4, 16, 4),
    "gated_pre": (8, 16, 4),
    "head": (8, 64, 32),
    "mappings": (16, 32, 8),
    "pre": (32, 32, 8),
    "pre_norm": (32, 64, 8),
    "pre_residual": (32, 32, 8),
    "pre_scale": (4, 16, 4),
    "residual_add_aggregate": (4, 16, 4),
    "rms_norm": (4, 64, 4),
    "sinkhorn": (4, 64, 8),
    "sinkhorn_knopp": (4, 4, 4),
    "static_layer": (4, 64, 8),
    "static_mappings": (4, 8, 8),
}

ITERATIONS = 20
"""The number of iterations that the factors were measured with."""

DIFFERENCES = 1e-8
"""The measured limit on how far a float64 gradient is from differences along a direction."""


def rounds(iterations: int) -> float:
    """Return the factor by which more iterations than the measured 20 add roundings."""
    return max(1.0, iterations / ITERATIONS)


def eps(dtype: str) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    info = cast("np.finfo[np.floating]", ml_dtypes.finfo(dtype))
    return float(info.eps)


def tolerance(op: str, quantity: Quantity, dtype: str, condition: float = 1.0) -> float:
    """Return the largest relative error allowed for an array of that dtype."""
    computed = "float64" if dtype == "float64" else "float32"
    last = eps(dtype) / 2 if dtype != computed else 0.0
    return K[op][QUANTITIES.index(quantity)] * eps(computed) * condition + last
