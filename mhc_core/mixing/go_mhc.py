"""go-mhc: squares of an orthogonal matrix, averaged over blocks of s x s.

theta [n s, n s], A = theta - theta^T, Q = (I - A)^-1 (I + A) (Cayley: orthogonal), and
H_res[i, j] = 1/s sum_(k, l < s) Q[i s + k, j s + l]^2. Source: go-mHC, arXiv:2604.02309, and its
code (https://github.com/itstorque/go-mHC). The README there has (I - A)(I + A)^-1, the transpose of
that Q, and so of H_res; ``res_transposed=True`` gives that one.
"""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.mixer import Mixer, Option

APART = 1e-3  # of two entries of theta at the start; with all alike, H_res = I has no gradient


def forward(logits: Any, *, n: int, s: int) -> Any:
    """Return the means of Q squared."""
    xp = _xp.namespace(logits)
    q = 2 * _half(xp, logits, n * s) - _eye(xp, n * s, logits)
    blocks = xp.reshape(q * q, (*logits.shape[:-1], n, s, n, s))
    return xp.sum(xp.sum(blocks, axis=-1), axis=-2) / s


def vjp(logits: Any, g: Any, *, n: int, s: int) -> Any:
    """Pull back through the squares, and the inverse: d(M^-1) = -M^-1 dM M^-1."""
    xp = _xp.namespace(logits)
    half = _half(xp, logits, n * s)
    q = xp.reshape(2 * half - _eye(xp, n * s, logits), (*logits.shape[:-1], n, s, n, s))
    d_half = xp.reshape(q * g[..., :, None, :, None] * (4 / s), half.shape)
    turned = _xp.swap(xp, half)
    d_skew = _xp.matmul(xp, _xp.matmul(xp, turned, d_half), turned)
    return xp.reshape(d_skew - _xp.swap(xp, d_skew), logits.shape)


def _half(xp: Any, logits: Any, size: int) -> Any:
    """Return (I - A)^-1, of which Q = (I - A)^-1 (2 I - (I - A)) is twice minus I."""
    theta = xp.reshape(logits, (*logits.shape[:-1], size, size))
    return _xp.inverse(xp, _eye(xp, size, logits) - (theta - _xp.swap(xp, theta)))


def _eye(xp: Any, size: int, like: Any) -> Any:
    rows = [[float(i == j) for j in range(size)] for i in range(size)]
    return _xp.constant(xp, rows, like)


def _logits(n: int, s: int) -> int:
    return (n * s) ** 2


def _init(n: int, s: int) -> list[float]:
    """Return an A whose Q is near I, and no two streams of which start alike."""
    size = n * s
    return [APART * (1 + i) / (1 + j) for i in range(size) for j in range(size)]


MIXER = Mixer(
    name="go-mhc",
    logits=_logits,
    forward=forward,
    vjp=vjp,
    init=_init,
    options={"s": Option(2, checks.positive_int)},
)
