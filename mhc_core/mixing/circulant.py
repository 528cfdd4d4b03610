"""circulant: a mean of the cyclic shifts of the streams (C-mHC).

c = (1 - gamma) e_0 + gamma softmax(logits), and H_res = sum_k c_k S_k with
S_k[i, (i + k) mod n] = 1. Source: the code of circulant hyper-connections
(https://github.com/contactsebi/circulant-hyper-connections). Its gamma is 4 / (2 L) for L residual
sublayers.
"""

from __future__ import annotations

import functools
from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.mixer import Mixer, Option
from mhc_core.mixing._parts import gathered, softmax, softmax_vjp, spread


def forward(logits: Any, *, n: int, gamma: float) -> Any:
    """Return the mean of the shifts."""
    xp = _xp.namespace(logits)
    still = _xp.constant(xp, [1 - gamma, *[0.0] * (n - 1)], logits)
    return spread(xp, still + gamma * softmax(xp, logits), _places(n), n)


def vjp(logits: Any, g: Any, *, n: int, gamma: float) -> Any:
    """Pull back through the mean and the softmax."""
    xp = _xp.namespace(logits)
    return softmax_vjp(xp, softmax(xp, logits), gamma * gathered(xp, g, _places(n)))


@functools.cache
def _places(n: int) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(float((i + k) % n == j) for i in range(n) for j in range(n)) for k in range(n)
    )


def _share(owner: str, name: str, value: Any) -> float:
    number = checks.non_negative(owner, name, value)
    if number > 1:
        raise ValueError(f"{owner}: {name} is {number}; needs a number from 0 to 1")
    return number


def _logits(n: int, **_: Any) -> int:
    return n


def _init(n: int, **_: Any) -> list[float]:
    return [0.0] * n


MIXER = Mixer(
    name="circulant",
    logits=_logits,
    forward=forward,
    vjp=vjp,
    init=_init,
    options={"gamma": Option(1.0, _share)},
)
