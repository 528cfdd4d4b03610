"""The one tolerance table: a result may be off by K roundings of the computation, and its own.

The error of an array is ``max |got - want| / max |want|``. What is allowed is::

    K[op, kind] * eps(computation) * condition + eps(array) / 2

The computation is in float32 (float64 for float64 streams). The second term is there only for an
array that is narrower than the computation, which is rounded once, at the end: H_res of bfloat16
streams is float32 and is held to float32, and a sum taken in bfloat16 fails. The condition is 1
plus how far the oracle's own result moves, in roundings, when all input moves by one rounding: a
sum that happens to cancel is not blamed on the backend.

The factors were measured on the built-in backends, the worst of ten seeds rounded up to a power of
two and doubled, at least 4. A plugin cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import ml_dtypes
import numpy as np

__all__ = ["DIFFERENCES", "Kind", "eps", "tolerance"]

Kind = Literal["forward", "gradient", "second"]
KINDS: tuple[Kind, ...] = get_args(Kind)

K: Mapping[str, tuple[float, float, float]] = {
    # op: (forward, gradient, second derivatives)
    "aggregate": (4, 16, 64),
    "combine": (4, 16, 64),
    "combine_pre": (16, 64, 64),
    "contract": (4, 4, 64),
    "expand": (0, 4, 64),
    "gated_combine": (4, 16, 64),
    "head": (8, 64, 64),
    "mappings": (16, 32, 64),
    "pre": (32, 32, 64),
    "pre_scale": (4, 16, 64),
    "residual_add_aggregate": (4, 16, 64),
    "rms_norm": (4, 64, 64),
    "sinkhorn": (4, 64, 64),
    "sinkhorn_knopp": (4, 4, 64),
    "static_layer": (4, 64, 64),
    "static_mappings": (4, 8, 64),
}

DIFFERENCES = 1e-8
"""How far a gradient in float64 may be off differences of values, along a direction: measured."""


def eps(dtype: str) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    info = cast("np.finfo[np.floating]", ml_dtypes.finfo(dtype))
    return float(info.eps)


def tolerance(op: str, kind: Kind, dtype: str, condition: float = 1.0) -> float:
    """Return the largest relative error allowed for an array of that dtype."""
    computed = "float64" if dtype == "float64" else "float32"
    last = eps(dtype) / 2 if dtype != computed else 0.0
    return K[op][KINDS.index(kind)] * eps(computed) * condition + last
