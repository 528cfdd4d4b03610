"""kromhc: a Kronecker product of K 2 x 2 mixes, for n = 2^K streams.

p_k = softmax(logits[2 k : 2 k + 2])[0], U_k = [[p_k, 1 - p_k], [1 - p_k, p_k]], and
H_res = U_0 kron U_1 kron ... kron U_(K - 1). So H_res[i, j] = w[i xor j], where w is the Kronecker
product of the vectors (p_k, 1 - p_k). Source: KromHC, arXiv:2601.21579.
"""

from __future__ import annotations

import functools
from typing import Any

from mhc_core.math import _xp
from mhc_core.mixer import Mixer
from mhc_core.mixing._parts import gathered, spread

SWAPPED = -8.0  # the start of each second logit, which swaps, as in the authors' code


def forward(logits: Any, *, n: int) -> Any:
    """Multiply the mixes."""
    xp = _xp.namespace(logits)
    return spread(xp, _products(xp, _pairs(xp, logits))[-1], _places(n), n)


def vjp(logits: Any, g: Any, *, n: int) -> Any:
    """Pull back through the products, last factor first, and each softmax."""
    xp = _xp.namespace(logits)
    pairs = _pairs(xp, logits)
    products = _products(xp, pairs)
    g = gathered(xp, g, _places(n))
    found: list[Any] = []
    for k in range(len(pairs) - 1, 0, -1):
        g = xp.reshape(g, (*g.shape[:-1], g.shape[-1] // 2, 2))
        found.append(xp.sum(g * products[k - 1][..., :, None], axis=-2))
        g = xp.sum(g * pairs[k][..., None, :], axis=-1)
    slopes = [
        pair[..., 0] * pair[..., 1] * (d[..., 0] - d[..., 1])
        for pair, d in zip(pairs, [g, *reversed(found)], strict=True)
    ]
    return xp.stack([signed for slope in slopes for signed in (slope, -slope)], axis=-1)


def _pairs(xp: Any, logits: Any) -> list[Any]:
    """Return (p_k, 1 - p_k) of each factor: the sigmoids of the logits' difference."""
    pairs: list[Any] = []
    for k in range(0, logits.shape[-1], 2):
        apart = logits[..., k] - logits[..., k + 1]
        pairs.append(xp.stack([_xp.sigmoid(xp, apart), _xp.sigmoid(xp, -apart)], axis=-1))
    return pairs


def _products(xp: Any, pairs: list[Any]) -> list[Any]:
    """Return the Kronecker products of the first factor, of the first two, and so on."""
    products = [pairs[0]]
    for pair in pairs[1:]:
        product = products[-1][..., :, None] * pair[..., None, :]
        products.append(xp.reshape(product, (*product.shape[:-2], 2 * product.shape[-2])))
    return products


@functools.cache
def _places(n: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(i ^ j == k) for i in range(n) for j in range(n)) for k in range(n))


def _factors(n: int) -> int:
    return n.bit_length() - 1


def _logits(n: int) -> int:
    return 2 * _factors(n)


def _init(n: int) -> list[float]:
    return [0.0, SWAPPED] * _factors(n)


def _refuses(n: int) -> str | None:
    return None if n > 1 and 2 ** _factors(n) == n else "takes n that is a power of 2, from 2 on"


MIXER = Mixer(name="kromhc", logits=_logits, forward=forward, vjp=vjp, init=_init, refuses=_refuses)
