"""One training step: loss, gradients, their norm, and AdamW; written for every array library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy

__all__ = ["Stepped", "make_step", "rates"]

Array = Any
Arrays = dict[str, Array]

BETAS = (0.9, 0.95)
EPSILON = 1e-8
DECAY = 0.1
DECAYED = (".in", ".out", "logits")  # of the transformer's matrices, not of the connections
LARGEST_NORM = 1.0  # a longer gradient is clipped to it
WARMUP = 0.1  # of the steps
FINAL = 0.1  # of the largest rate


class Stepped(NamedTuple):
    """The result of a step."""

    parameters: Arrays
    first: Arrays  # Adam's moments
    second: Arrays
    loss: Array
    norm: Array  # of the gradient, before clipping


def rates(step: int, steps: int, largest: float) -> numpy.ndarray[Any, Any]:
    """Return the learning rate and Adam's two corrections for a step, counted from 0."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        share = (step + 1) / warmup
    else:
        done = (step - warmup) / max(1, steps - warmup)
        share = FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2
    corrections = [1 / (1 - beta ** (step + 1)) for beta in BETAS]
    return numpy.asarray([share * largest, *corrections], numpy.float32)


def make_step(xp: Any, gradients_of: Callable[..., Any]) -> Callable[..., Stepped]:
    """Return the training step for a function from parameters and tokens to loss and gradients."""

    def step(parameters: Arrays, first: Arrays, second: Arrays, tokens: Array, at: Array):
        loss, gradients = gradients_of(parameters, tokens)
        names = sorted(gradients)  # a checkpoint has its own order
        norm = xp.sqrt(sum(xp.sum(xp.square(gradients[name])) for name in names))
        shorter = LARGEST_NORM / xp.maximum(norm, LARGEST_NORM)
        moved: tuple[Arrays, Arrays, Arrays] = ({}, {}, {})
        for name in names:
            old = (parameters[name], first[name], second[name])
            new = _adam(
                xp, *old, gradients[name] * shorter, at, DECAY if name.endswith(DECAYED) else 0.0
            )
            for target, array in zip(moved, new, strict=True):
                target[name] = array
        return Stepped(*moved, loss, norm)

    return step


def _adam(
    xp: Any, p: Array, m: Array, v: Array, g: Array, at: Array, decay: float
) -> tuple[Array, Array, Array]:
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * xp.square(g)
    change = m * at[1] / (xp.sqrt(v * at[2]) + EPSILON)
    return p - at[0] * (change + decay * p), m, v
