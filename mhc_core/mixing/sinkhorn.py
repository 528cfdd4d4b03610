"""sinkhorn: alternating normalisation of exp(logits), as in arXiv:2512.24880.

Its options are fields of :class:`mhc_core.Variant`, which passes them.
"""

from __future__ import annotations

import math
from typing import Any

from mhc_core.math import _xp, sinkhorn
from mhc_core.mixer import Mixer

Bounds = tuple[float, float] | None
MIXING = 0.01  # at the start, the share of the other streams in each stream after H_res


def forward(logits: Any, *, n: int, transposed: bool, clamp: Bounds, **options: Any) -> Any:
    """Normalise the logits as [n, n], in H_res's orientation, kept within bounds first."""
    matrix = _square(logits, n, transposed)
    matrix = _xp.clamped(_xp.namespace(matrix), matrix, clamp)
    return sinkhorn.forward(matrix, **options)


def vjp(logits: Any, g: Any, *, n: int, transposed: bool, clamp: Bounds, **options: Any) -> Any:
    """Reverse the iterations."""
    matrix = _square(logits, n, transposed)
    xp = _xp.namespace(matrix)
    (gradient,) = sinkhorn.vjp((_xp.clamped(xp, matrix, clamp),), (g,), **options)
    gradient = _xp.within(xp, gradient, matrix, clamp)
    return xp.reshape(_xp.swap(xp, gradient) if transposed else gradient, logits.shape)


def _square(logits: Any, n: int, transposed: bool) -> Any:
    xp = _xp.namespace(logits)
    matrix = xp.reshape(logits, (*logits.shape[:-1], n, n))
    return _xp.swap(xp, matrix) if transposed else matrix


def _logits(n: int, **_: Any) -> int:
    return n * n


def _init(n: int, **_: Any) -> list[float]:
    """Return the logits of a softmax over n: 1 - MIXING for the stream itself, the rest 0."""
    diagonal = math.log((1 - MIXING) / MIXING) + math.log(max(n - 1, 1))
    return [diagonal if i == j else 0.0 for i in range(n) for j in range(n)]


MIXER = Mixer(
    name="sinkhorn",
    logits=_logits,
    forward=forward,
    vjp=vjp,
    init=_init,
    doubly_stochastic=False,  # only as far as the iterations bring it
)
