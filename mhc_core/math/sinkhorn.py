"""sinkhorn: alternating normalisation of the rows and columns of exp(logits)."""

from __future__ import annotations

from typing import Any

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.signature import Op, Out
from mhc_core.variants import check_first

OP = Op(
    name="sinkhorn",
    arrays={"logits": "... n n"},
    outputs={"h_res": Out("... n n", "mapping")},
    static={
        "iterations": checks.iterations,
        "eps": checks.non_negative,
        "first": check_first,
    },
)

# Inside, a matrix is [a, b, T]: the axis that is normalised first, the other, all tokens (in JAX
# the leading axes one by one). So every sum runs over a leading axis, along contiguous tokens, and
# there is one loop for both orders.


def forward(logits: Any, *, iterations: int, eps: float, first: str, start: str = "softmax") -> Any:
    """Compute eq. (9), ``M_t = T_r(T_c(M_{t-1}))``, in float32.

    ``start`` is a variant's, and no argument of the op.
    """
    xp = _xp.namespace(logits)
    inside = enter(xp, _xp.upcast(xp, logits), first)
    matrix, _ = _form(eps, start)[0](xp, inside, iterations, eps, keep=False)
    return leave(xp, matrix, logits.shape, first)


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    iterations: int,
    eps: float,
    first: str,
    start: str = "softmax",
):
    """Reverse the iterations: with G = P g the cotangent of log P, each is G -= P sum(G).

    The iterations are run again, and only their divisors are kept, 2 n numbers for each.
    """
    (logits,), (g,) = primals, cotangents
    xp = _xp.namespace(logits)
    inside = enter(xp, _xp.upcast(xp, logits), first)
    normalise, pullback = _form(eps, start)
    matrix, kept = normalise(xp, inside, iterations, eps, keep=True)
    carried = matrix * enter(xp, _xp.upcast(xp, g), first)
    g = pullback(xp, inside, carried, kept)
    return (_xp.as_dtype_of(xp, leave(xp, g, logits.shape, first), logits),)


def enter(xp: Any, matrix: Any, first: str) -> Any:
    """[..., n, n] -> [a, b, T]."""
    if not _xp.keeps_axes(xp):
        matrix = _xp.tokens(xp, matrix, 2)
    last = matrix.ndim - 2
    a, b = (last, last + 1) if first == "columns" else (last + 1, last)
    return xp.permute_dims(matrix, (a, b, *range(last)))


def leave(xp: Any, inside: Any, shape: tuple[int, ...], first: str) -> Any:
    """[a, b, T] -> [..., n, n]."""
    leading = range(2, inside.ndim)
    out = xp.permute_dims(inside, (*leading, 0, 1) if first == "columns" else (*leading, 1, 0))
    return out if _xp.keeps_axes(xp) else xp.reshape(out, shape)


def _form(eps: float, start: str) -> tuple[Any, Any]:
    """Return the function that normalises and its pullback; with eps = 0 all starts are one."""
    if eps == 0:
        return _normalise_log, _pullback_log
    if start == "exp":
        return _normalise_exp, _pullback_exp
    return _normalise_eps, _pullback_eps


def _normalise_log(xp: Any, logits: Any, iterations: int, _: float, keep: bool) -> tuple[Any, Any]:
    """eps = 0: in the log domain, where no line can underflow to 0 / 0.

    The difference of two logits may overflow the dtype, half of it cannot. So the first step works
    on halves. After it every line has an entry near 0, and -inf elsewhere just stands for a zero.
    """
    half = logits / 2
    first = half_normalised(xp, half, 0)[0]
    start = first, half_normalised(xp, first, 1)[0]

    def step(logs: Any) -> tuple[Any, Any]:
        a = _xp.log_sum_exp(xp, logs, 0)
        logs = logs - a
        b = _xp.log_sum_exp(xp, logs, 1)
        return logs - b, (a, b) if keep else None

    logs, kept = _xp.scan(xp, step, _xp.doubled(xp, start[1]), iterations - 1)
    return xp.exp(logs), (start, logs, kept)


def _pullback_log(xp: Any, _: Any, carried: Any, kept: Any) -> Any:
    start, logs, divisors = kept

    def step(state: Any, divisor: Any) -> Any:
        (g, logs), (a, b) = state, divisor
        g = g - xp.exp(logs) * xp.sum(g, axis=1, keepdims=True)
        logs = logs + b
        g = g - xp.exp(logs) * xp.sum(g, axis=0, keepdims=True)
        return g, logs + a

    g, _ = _xp.scan_reverse(xp, step, (carried, logs), divisors)
    g = g - xp.exp(_xp.doubled(xp, start[1])) * xp.sum(g, axis=1, keepdims=True)
    return g - xp.exp(_xp.doubled(xp, start[0])) * xp.sum(g, axis=0, keepdims=True)


def half_normalised(xp: Any, half: Any, axis: int) -> tuple[Any, tuple[Any, Any]]:
    """Normalise half the logarithms of a matrix along an axis; return the two terms subtracted.

    The terms are subtracted one by one: added first, large logits would round the logarithm away.
    """
    largest = _xp.shift(xp, half, axis)
    below = half - largest
    total = xp.sum(xp.exp(_xp.doubled(xp, below)), axis=axis, keepdims=True)
    log = xp.log(total) / 2
    return below - log, (largest, log)


def _normalise_eps(xp: Any, logits: Any, iterations: int, eps: float, keep: bool):
    """eps > 0: softmax + eps, then every division by (sum + eps)."""
    start = _softmax(xp, logits) + eps
    first_b = xp.sum(start, axis=1, keepdims=True) + eps
    matrix, kept = _iterate(xp, start / first_b, iterations - 1, eps, keep)
    return matrix, (matrix, eps, kept)


def _iterate(xp: Any, matrix: Any, iterations: int, eps: float, keep: bool) -> tuple[Any, Any]:
    def step(matrix: Any) -> tuple[Any, Any]:
        a = xp.sum(matrix, axis=0, keepdims=True) + eps
        matrix = matrix / a
        b = xp.sum(matrix, axis=1, keepdims=True) + eps
        return matrix / b, (a, b) if keep else None

    return _xp.scan(xp, step, matrix, iterations)


def _pullback_eps(xp: Any, logits: Any, carried: Any, kept: Any) -> Any:
    matrix, eps, divisors = kept
    g, matrix = _reverse(xp, carried, matrix, divisors)
    g = g - matrix * xp.sum(g, axis=1, keepdims=True)
    # the start, log(S + eps) with S a softmax along a
    start = _softmax(xp, logits)
    g = g * (start / (start + eps))
    return g - start * xp.sum(g, axis=0, keepdims=True)


def _reverse(xp: Any, carried: Any, matrix: Any, divisors: Any) -> tuple[Any, Any]:
    """Return the cotangent of the logarithm of the matrix before all divisions, and that matrix."""

    def step(state: Any, divisor: Any) -> Any:
        (g, matrix), (a, b) = state, divisor
        g = g - matrix * xp.sum(g, axis=1, keepdims=True)
        matrix = matrix * b
        g = g - matrix * xp.sum(g, axis=0, keepdims=True)
        return g, matrix * a

    return _xp.scan_reverse(xp, step, (carried, matrix), divisors)


def _softmax(xp: Any, logits: Any) -> Any:
    half = logits / 2
    powers = xp.exp(_xp.doubled(xp, half - _xp.shift(xp, half, 0)))
    return powers / xp.sum(powers, axis=0, keepdims=True)


def _normalise_exp(xp: Any, logits: Any, iterations: int, eps: float, keep: bool):
    """eps > 0, without a softmax: exp(L - largest), then every division by (sum + eps)."""
    half = logits / 2
    start = xp.exp(_xp.doubled(xp, half - _xp.largest(xp, half, 0)))
    matrix, kept = _iterate(xp, start, iterations, eps, keep)
    return matrix, (matrix, kept)


def _pullback_exp(xp: Any, logits: Any, carried: Any, kept: Any) -> Any:
    """Let the cotangent of the largest logit of a line, where eps leaves any, reach that logit."""
    g, _ = _reverse(xp, carried, *kept)
    return g - _xp.share_of_largest(xp, logits, 0) * xp.sum(g, axis=0, keepdims=True)
