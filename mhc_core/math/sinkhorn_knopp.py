"""sinkhorn_knopp: normalise rows and columns until both sum to 1 within epsilon (mlx-mhc's)."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhc_core import _checks
from mhc_core._signature import Op, Out
from mhc_core.math import _xp
from mhc_core.math.sinkhorn import enter, leave

OP = Op(
    name="sinkhorn_knopp",
    arrays={"matrix": "... n n"},
    outputs={"h_res": Out("... n n", "mapping")},
    static={
        "max_iterations": _checks.iterations,
        "epsilon": _checks.non_negative,
        "log_space": _checks.boolean,
    },
)

FLOOR = 1e-10  # of exp(matrix) where log_space is False


class _State(NamedTuple):
    matrix: Any  # [a, b, T], in the log domain or not; a is summed first and gives the row sums
    active: Any  # [1, 1, T]: which matrices have not converged yet


def forward(matrix: Any, *, max_iterations: int, epsilon: float, log_space: bool) -> Any:
    """Each matrix stops by itself, after a full step, once its largest error is under epsilon."""
    xp = _xp.namespace(matrix)
    inside = enter(xp, _xp.up(xp, matrix), "rows")
    state, _ = _iterate(xp, inside, max_iterations, epsilon, log_space)
    return leave(xp, _value(xp, state.matrix, log_space), matrix.shape, "rows")


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    max_iterations: int,
    epsilon: float,
    log_space: bool,
) -> tuple[Any]:
    """Back through the steps that were taken: with G = P g, each is G -= P sum(G)."""
    (matrix,), (g,) = primals, cotangents
    xp = _xp.namespace(matrix)
    inside = enter(xp, _xp.up(xp, matrix), "rows")
    state, kept = _iterate(xp, inside, max_iterations, epsilon, log_space)
    carried = _value(xp, state.matrix, log_space) * enter(xp, _xp.up(xp, g), "rows")

    def undo(state: Any, step: Any) -> Any:
        (g, matrix), (a, b, active) = state, step
        for divisor, axis in ((b, 1), (a, 0)):
            pulled = _value(xp, matrix, log_space) * xp.sum(g, axis=axis, keepdims=True)
            g = g - xp.where(active, pulled, xp.zeros_like(pulled))
            matrix = matrix + divisor if log_space else matrix * divisor
        return g, matrix

    g, _ = _xp.scan_back(xp, undo, (carried, state.matrix), kept)
    if not log_space:
        g = xp.where(xp.exp(inside) <= FLOOR, xp.zeros_like(g), g)
    return (_xp.cast(xp, leave(xp, g, matrix.shape, "rows"), matrix),)


def _value(xp: Any, matrix: Any, log_space: bool) -> Any:
    return xp.exp(matrix) if log_space else matrix


def _iterate(xp: Any, matrix: Any, max_iterations: int, epsilon: float, log_space: bool):
    """Take up to ``max_iterations`` steps; keep each step's divisors and who took it."""
    if not log_space:
        powers = xp.exp(matrix)
        matrix = xp.where(powers <= FLOOR, xp.full_like(powers, FLOOR), powers)  # NaN stays
    one_line = matrix[:1, :1]

    def step(state: _State) -> tuple[_State, Any]:
        taken, divisors = (_step_log if log_space else _step_direct)(xp, state.matrix)
        value = _value(xp, taken, log_space)
        error = xp.maximum(
            xp.max(xp.abs(xp.sum(value, axis=0, keepdims=True) - 1), axis=1, keepdims=True),
            xp.max(xp.abs(xp.sum(value, axis=1, keepdims=True) - 1), axis=0, keepdims=True),
        )
        kept = [xp.where(state.active, d, _nothing(xp, d, log_space)) for d in divisors]
        after = _State(
            xp.where(state.active, taken, state.matrix),
            xp.logical_and(state.active, xp.logical_not(error < epsilon)),
        )
        return after, (*kept, state.active)

    def idle(state: _State) -> tuple[_State, Any]:
        lines = (state.matrix[:1], state.matrix[:, :1])
        return state, (*(_nothing(xp, line, log_space) for line in lines), state.active)

    start = _State(matrix, xp.ones_like(one_line) > 0)
    return _xp.scan_while(xp, step, idle, start, max_iterations)


def _nothing(xp: Any, like: Any, log_space: bool) -> Any:
    """Give the divisor that changes nothing."""
    return xp.zeros_like(like) if log_space else xp.ones_like(like)


def _step_log(xp: Any, logs: Any) -> tuple[Any, tuple[Any, Any]]:
    a = _xp.log_sum_exp(xp, logs, 0)
    logs = logs - a
    b = _xp.log_sum_exp(xp, logs, 1)
    return logs - b, (a, b)


def _step_direct(xp: Any, matrix: Any) -> tuple[Any, tuple[Any, Any]]:
    a = xp.sum(matrix, axis=0, keepdims=True)
    matrix = matrix / a
    b = xp.sum(matrix, axis=1, keepdims=True)
    return matrix / b, (a, b)
