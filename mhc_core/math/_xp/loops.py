"""Iterations: as loops, or unrolled where a library or a device is faster so; and an inverse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from typing import Any

from mhc_core.math._xp.arrays import constant
from mhc_core.math._xp.libraries import Array, by_platform, is_from, lax

__all__ = [
    "FUSED_STEPS",
    "MOST_UNROLLED",
    "inverse",
    "scan",
    "scan_reverse",
    "scan_while",
]


def inverse(xp: Any, matrix: Array) -> Array:
    """Invert matrices [..., N, N] whose symmetric part is positive definite.

    MLX inverts on the CPU alone, and without a derivative; JAX's products on a GPU would be TF32.
    There it is Gauss-Jordan elimination, in place and a column at a time. Such matrices need no
    pivots: after every step, what is left of them has a positive definite symmetric part too.
    """
    if not (is_from(xp, "jax") or is_from(xp, "mlx")):
        return xp.linalg.inv(matrix)
    size = matrix.shape[-1]

    def step(state: Any) -> tuple[Any, Any]:
        a, e = state  # e is 1 at the column that is eliminated
        across, down = 1 - e, (1 - e)[:, None]
        column = xp.sum(a * e, axis=-1, keepdims=True) * down
        row = xp.sum(a * e[:, None], axis=-2, keepdims=True)
        row = (row * across + e) / xp.sum(row * e, axis=-1, keepdims=True)
        a = a * across * down - column * row + e[:, None] * row
        return (a, xp.roll(e, 1)), None

    first = constant(xp, [1.0, *[0.0] * (size - 1)], matrix)
    return scan(xp, step, (matrix, first), size)[0][0]


def scan(xp: Any, step: Callable[[Any], tuple[Any, Any]], state: Any, length: int) -> Any:
    """Apply ``state, kept = step(state)`` repeatedly; return the state and all that was kept."""
    if is_from(xp, "jax"):

        def forward(state: Any, _: Any) -> Any:
            return step(state)

        return _scan_in_jax(forward, state, None, length)
    kept: list[Any] = []
    for _ in range(length):
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def scan_reverse(xp: Any, step: Callable[[Any, Any], Any], state: Any, kept: Any) -> Any:
    """Apply ``state = step(state, keep)`` to all that :func:`scan` kept, last first."""
    if is_from(xp, "jax"):

        def backward(state: Any, keep: Any) -> Any:
            return step(state, keep), None

        return _scan_in_jax(backward, state, kept, _length(kept), reverse=True)[0]
    for keep in reversed(kept):
        state = step(state, keep)
    return state


# On a CPU a loop runs faster than its unrolled steps and compiles in a tenth of the time: 0.5 s
# against 3 to 9 for 20 iterations of Sinkhorn. On a GPU every step of a loop is a few launches by
# the host, and pre of one token takes twice the time on the device: 71 us against 32 on an H200.
MOST_UNROLLED = 32


# XLA fuses small sums into all that reads them, again and again: it compiles the vjp of one token's
# 20 iterations, unrolled, for more than 200 s. With a barrier after every second step of a vjp it
# takes 3 s, and no more launches; after every fourth, 16 (JAX 0.10, compiled for an H200).
FUSED_STEPS = 2


def _scan_in_jax(function: Any, state: Any, kept: Any, length: int, reverse: bool = False) -> Any:
    """Apply jax.lax.scan, unrolled where XLA compiles for a GPU; only that form is lowered."""

    def rolled(state: Any, kept: Any) -> Any:
        return lax().scan(function, state, kept, length=length, reverse=reverse)

    def unrolled(state: Any, kept: Any) -> Any:
        return _unrolled_scan(function, state, kept, length, reverse)

    if not 1 < length <= MOST_UNROLLED:
        return rolled(state, kept)
    return by_platform(unrolled, rolled, state, kept)


def _unrolled_scan(function: Any, state: Any, kept: Any, length: int, reverse: bool) -> Any:
    mapped, stack = import_module("jax").tree.map, import_module("jax.numpy").stack
    outs: list[Any] = []
    steps = range(length)
    for k in reversed(steps) if reverse else steps:
        state, out = function(state, mapped(operator.itemgetter(k), kept))
        outs.append(out)
        of_vjp = kept is not None or out is not None
        if of_vjp and len(outs) % FUSED_STEPS == 0:
            state = lax().optimization_barrier(state)

    def stacked(*some: Array) -> Array:
        return stack(some)

    return state, mapped(stacked, *(outs[::-1] if reverse else outs))


def _length(kept: Any) -> int:
    (length, *_), *_ = (leaf.shape for leaf in import_module("jax").tree.leaves(kept))
    return length


def scan_while(
    xp: Any,
    step: Callable[[Any], tuple[Any, Any]],
    idle: Callable[[Any], tuple[Any, Any]],
    state: Any,
    length: int,
) -> Any:
    """Scan while ``state.active`` is true anywhere.

    ``step`` must leave inactive entries unchanged, so that stopping early changes no bit. Where
    values can be read, the loop stops; in JAX the remaining steps run ``idle``, which costs
    nothing; inside MLX's transformations values cannot be read, so every step is taken.
    """
    if is_from(xp, "jax"):

        def either(state: Any, _: Any) -> Any:
            return lax().cond(xp.any(state.active), step, idle, state)

        return lax().scan(either, state, None, length=length)
    kept: list[Any] = []
    for _ in range(length):
        if _known_false(xp, state.active):
            break
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def _known_false(xp: Any, active: Array) -> bool:
    try:
        return not bool(xp.any(active))
    except ValueError:  # MLX's word for a value that is being traced
        return False
