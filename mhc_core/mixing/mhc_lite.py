"""mhc-lite: a mean of all permutations, H_res = (sum_r a_r P_r)^T with a = softmax(logits).

P_r[i, p_r(i)] = 1, and p_r are the n! permutations of 0 to n - 1 in lexicographic order. Every
doubly stochastic matrix is such a mean (Birkhoff and von Neumann). Source: the code of mHC-lite
(https://github.com/FFTYYY/mhc-lite), which mixes by the transpose, as DeepSeek-V4 does.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

from mhc_core.math import _xp
from mhc_core.mixer import Mixer
from mhc_core.mixing._parts import gathered, softmax, softmax_vjp, spread

MOST = 4  # streams: 5! = 120 permutations would be more logits than four Sinkhorns take
OTHERS = -8.0  # the start of the logits but for the identity's, as in the authors' code


def forward(logits: Any, *, n: int) -> Any:
    """Return the transpose of the mean of the permutations."""
    xp = _xp.namespace(logits)
    return spread(xp, softmax(xp, logits), _places(n), n)


def vjp(logits: Any, g: Any, *, n: int) -> Any:
    """Pull back through the mean and the softmax."""
    xp = _xp.namespace(logits)
    return softmax_vjp(xp, softmax(xp, logits), gathered(xp, g, _places(n)))


@functools.cache
def _places(n: int) -> tuple[tuple[float, ...], ...]:
    """Return each permutation matrix, transposed: 1 at [p(i), i]."""
    return tuple(
        tuple(float(p[i] == j) for j in range(n) for i in range(n))
        for p in itertools.permutations(range(n))
    )


def _logits(n: int) -> int:
    return math.factorial(n)


def _init(n: int) -> list[float]:
    return [0.0, *[OTHERS] * (math.factorial(n) - 1)]


def _refuses(n: int) -> str | None:
    return None if n <= MOST else f"takes n from 1 to {MOST}"


MIXER = Mixer(
    name="mhc-lite", logits=_logits, forward=forward, vjp=vjp, init=_init, refuses=_refuses
)
