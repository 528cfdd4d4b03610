"""sinkhorn-limit: what Sinkhorn tends to, the doubly stochastic diag(u) exp(logits) diag(v).

The limit does not depend on which lines come first. It is found by Newton's method instead of many
iterations, and its gradient follows from the implicit function theorem: of P = H_res and its
cotangent G, with a and b that solve

    a + P b = rowsum(P G),   P^T a + b = colsum(P G),   d logits = P (G - a 1^T - 1 b^T).

Source: mHC-proj (https://github.com/yixuan/mHC-proj).

With rows normalised exactly, P = softmax over rows of (logits + c), and c minimises a convex
function whose gradient is colsum(P) - 1 and whose Hessian is the Laplacian of the graph with
weights P^T P. A step d is damped to log(1 + r) / r of it, with r = max(d) - min(d), which makes it
converge from anywhere (Sun and Tran-Dinh, arXiv:1703.04599: the function is generalised
self-concordant). The first steps go up from a fraction of the logits, as c at twice the logits is
near twice c.
"""

from __future__ import annotations

from typing import Any

from mhc_core.math import _xp
from mhc_core.math.sinkhorn import half_normalised
from mhc_core.mixer import Mixer
from mhc_core.mixing import sinkhorn

UPWARDS = 10  # steps, each with logits sqrt(2) times as large: from 1/32
STEPS = 10  # with the logits themselves
ROOT = 2**0.5


def forward(logits: Any, *, n: int) -> Any:
    """Return the limit: rows sum to 1 to rounding, columns to what the steps leave."""
    return _limit(_xp.namespace(logits), logits, n)


def vjp(logits: Any, g: Any, *, n: int) -> Any:
    """Solve for a and b; a + P b = rowsum(P G) eliminates a."""
    xp = _xp.namespace(logits)
    p = _limit(xp, logits, n)
    weighted = p * g
    rows, columns = xp.sum(weighted, axis=-1), xp.sum(weighted, axis=-2)
    b = _solve(xp, _weights(xp, p), columns - xp.sum(p * rows[..., None], axis=-2), 1e-30)
    a = rows - xp.sum(p * b[..., None, :], axis=-1)
    return xp.reshape(p * (g - a[..., None] - b[..., None, :]), logits.shape)


def _limit(xp: Any, logits: Any, n: int) -> Any:
    """Return P; its derivative is that of the last step alone, which is exact at the solution."""
    half = xp.reshape(logits, (*logits.shape[:-1], n, n)) / 2
    for axis in (-1, -2):
        half, _ = half_normalised(xp, half, axis)
    logs = _xp.doubled(xp, half)
    c = _xp.stopped(xp, _potentials(xp, _xp.stopped(xp, logs)))
    return _normalised(xp, logs, c + _direction(xp, _normalised(xp, logs, c)))


def _potentials(xp: Any, logs: Any) -> Any:
    """Return c of the limit, by Newton's method with a step of Sinkhorn in each."""

    def up(state: Any) -> tuple[Any, Any]:
        some, c = state
        return (ROOT * some, ROOT * _moved(xp, some, c)), None

    def step(c: Any) -> tuple[Any, Any]:
        return _moved(xp, logs, c), None

    start = (logs * ROOT**-UPWARDS, 0 * xp.sum(xp.exp(logs), axis=-2))
    (_, c), _ = _xp.scan(xp, up, start, UPWARDS)
    return _xp.scan(xp, step, c, STEPS)[0]


def _moved(xp: Any, logs: Any, c: Any) -> Any:
    """Normalise rows and columns once, and take a damped step."""
    moved = logs + c[..., None, :]
    moved = moved - _xp.log_sum_exp(xp, moved, -1)
    c = c - _xp.log_sum_exp(xp, moved, -2)[..., 0, :]
    d = _direction(xp, _normalised(xp, logs, c))
    length = xp.max(d, axis=-1, keepdims=True) - xp.min(d, axis=-1, keepdims=True)
    small = length < 1e-3
    damped = xp.log1p(length) / xp.where(small, 1.0, length)
    return c + d * xp.where(small, 1.0, damped)


def _normalised(xp: Any, logs: Any, c: Any) -> Any:
    moved = logs + c[..., None, :]
    return xp.exp(moved - _xp.log_sum_exp(xp, moved, -1))


def _direction(xp: Any, p: Any) -> Any:
    """Return Newton's step; where streams are coupled by less than a rounding, nearly none."""
    rounding = 1e-16 if str(p.dtype).endswith("float64") else 1e-7
    return _solve(xp, _weights(xp, p), 1 - xp.sum(p, axis=-2), rounding)


def _weights(xp: Any, p: Any) -> Any:
    return _xp.matmul(xp, _xp.swap(xp, p), p)


def _solve(xp: Any, weights: Any, right: Any, least: float) -> Any:
    """Solve (D - W) x = right for the Laplacian of weights, with x_0 = 0.

    Nodes are eliminated, last first, and the diagonal D is a sum of weights at every step: nothing
    cancels, however faint the weights (Grassmann, Taksar and Heyman). ``least`` is added to D.
    """
    kept: list[tuple[Any, Any, Any]] = []
    for k in range(weights.shape[-1] - 1, 0, -1):
        row, column, own = weights[..., k, :k], weights[..., :k, k], right[..., k : k + 1]
        total = xp.sum(row, axis=-1, keepdims=True) + least
        kept.append((row, own, total))
        share = column / total
        weights = weights[..., :k, :k] + share[..., :, None] * row[..., None, :]
        right = right[..., :k] + share * own
    x = 0 * right
    for row, own, total in reversed(kept):
        x = xp.concat([x, (own + xp.sum(row * x, axis=-1, keepdims=True)) / total], axis=-1)
    return x


def _logits(n: int) -> int:
    return n * n


MIXER = Mixer(
    name="sinkhorn-limit",
    logits=_logits,
    forward=forward,
    vjp=vjp,
    init=sinkhorn.MIXER.init,
)
