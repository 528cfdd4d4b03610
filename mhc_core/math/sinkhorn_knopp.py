"""sinkhorn_knopp: normalise rows and columns until both sum to 1 within epsilon (mlx-mhc's)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mhc_core import checks
from mhc_core.math import _xp
from mhc_core.math.sinkhorn import enter, half_normalised, leave
from mhc_core.signature import Op, Out

OP = Op(
    name="sinkhorn_knopp",
    arrays={"matrix": "... n n"},
    outputs={"h_res": Out("... n n", "mapping")},
    static={
        "max_iterations": checks.iterations,
        "epsilon": checks.non_negative,
        "log_space": checks.boolean,
    },
)

FLOOR = 1e-10  # of exp(matrix) where log_space is False

# All is computed in the log domain: a line of powers could overflow, or underflow to 0 / 0. And all
# in halves, since the difference of two logits may be beyond the dtype, the half of it may not.


class _State(NamedTuple):
    half: Any  # [a, b, T], half the logarithms; a is summed first and gives the row sums
    active: Any  # [1, 1, T]: which matrices have not converged yet


def forward(matrix: Any, *, max_iterations: int, epsilon: float, log_space: bool) -> Any:
    """Stop each matrix after its first full step that leaves the largest error under epsilon."""
    xp = _xp.namespace(matrix)
    inside = enter(xp, _xp.upcast(xp, matrix), "rows")
    state, _ = _iterate(xp, inside, max_iterations, epsilon, log_space)
    return leave(xp, xp.exp(_xp.doubled(xp, state.half)), matrix.shape, "rows")


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    max_iterations: int,
    epsilon: float,
    log_space: bool,
) -> tuple[Any]:
    """Reverse the steps that were taken: with G = P g, each is G -= P sum(G)."""
    (matrix,), (g,) = primals, cotangents
    xp = _xp.namespace(matrix)
    inside = enter(xp, _xp.upcast(xp, matrix), "rows")
    state, kept = _iterate(xp, inside, max_iterations, epsilon, log_space)
    carried = xp.exp(_xp.doubled(xp, state.half)) * enter(xp, _xp.upcast(xp, g), "rows")

    def undo(state: Any, step: Any) -> Any:
        (g, half), (*terms, active) = state, step
        for (largest, log), axis in ((terms[2:], 1), (terms[:2], 0)):
            pulled = xp.exp(_xp.doubled(xp, half)) * xp.sum(g, axis=axis, keepdims=True)
            g = g - xp.where(active, pulled, xp.zeros_like(pulled))
            half = (half + log) + largest
        return g, half

    g, _ = _xp.scan_reverse(xp, undo, (carried, state.half), kept)
    if not log_space:
        g = xp.where(inside <= math.log(FLOOR), xp.zeros_like(g), g)
    return (_xp.as_dtype_of(xp, leave(xp, g, matrix.shape, "rows"), matrix),)


def _iterate(xp: Any, logits: Any, max_iterations: int, epsilon: float, log_space: bool):
    """Take up to ``max_iterations`` steps; keep each step's divisors and which matrices took it."""
    if not log_space:
        lowest = math.log(FLOOR)
        logits = xp.where(logits <= lowest, xp.full_like(logits, lowest), logits)  # NaN stays

    def step(state: _State) -> tuple[_State, Any]:
        taken, terms = _step(xp, state.half)
        value = xp.exp(_xp.doubled(xp, taken))
        error = xp.maximum(
            xp.max(xp.abs(xp.sum(value, axis=0, keepdims=True) - 1), axis=1, keepdims=True),
            xp.max(xp.abs(xp.sum(value, axis=1, keepdims=True) - 1), axis=0, keepdims=True),
        )
        kept = [xp.where(state.active, d, xp.zeros_like(d)) for d in terms]
        after = _State(
            xp.where(state.active, taken, state.half),
            xp.logical_and(state.active, xp.logical_not(error < epsilon)),
        )
        return after, (*kept, state.active)

    def idle(state: _State) -> tuple[_State, Any]:
        line, column = xp.zeros_like(state.half[:1]), xp.zeros_like(state.half[:, :1])
        return state, (line, line, column, column, state.active)

    start = _State(logits / 2, xp.ones_like(logits[:1, :1]) > 0)
    return _xp.scan_while(xp, step, idle, start, max_iterations)


def _step(xp: Any, half: Any) -> tuple[Any, tuple[Any, ...]]:
    half, a = half_normalised(xp, half, 0)
    half, b = half_normalised(xp, half, 1)
    return half, (*a, *b)
