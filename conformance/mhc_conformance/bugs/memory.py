"""Bugs of memory: strides, aliases, overwritten inputs, results that vary."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from mhc_conformance.bugs.declaration import Array, bug, right, with_changed_gradients


@bug(
    "inputs-written-over",
    "inputs written over",
    op="aggregate",
    fails=("forward", "strided", "repeated", "host", "updated"),
    says="raised ValueError",
    shipped=False,
)
def writing_over_input(x: Array, h_pre: Array) -> Array:
    """Double the streams in place after reading them."""
    h = right("aggregate")(x, h_pre)
    x *= 2
    return h


@bug(
    "shared-memory",
    "an output that shares its memory with an input",
    op="expand",
    fails=("updated",),
    says="changed when the inputs were written over",
    shipped=False,
)
def view_of_input(h: Array, *, n: int) -> Array:
    """Repeat a hidden state without copying it: a write to one stream writes to all streams."""
    return np.broadcast_to(h[..., None, :], (*h.shape[:-1], n, h.shape[-1]))


@bug(
    "one-array-twice",
    "one array given for two gradients",
    op="residual_add_aggregate",
    half="vjp",
    fails=("updated",),
    says="changed when another result was written over",
    shipped=False,
)
@with_changed_gradients
def one_for_two(dx: Array, dres: Array, dh_pre: Array) -> Any:
    """Return the same array for two gradients that are equal."""
    return dx, dx, dh_pre


@bug(
    "strides-ignored",
    "strides ignored",
    op="aggregate",
    fails=("strided",),
    says="h of",
    shipped=False,
)
def strideless(x: Array, h_pre: Array) -> Array:
    """Ignore strides: read the array as if it were contiguous."""
    base = x if x.base is None or x.flags.c_contiguous else x.base
    flat = np.ravel(base)[: x.size].reshape(x.shape)
    return right("aggregate")(flat, h_pre)


@bug(
    "unsteady",
    "not twice the same",
    op="aggregate",
    fails=("repeated",),
    says="differs between two runs on the same input",
    shipped=False,
)
class Unsteady:
    """An aggregate that rounds every second result differently."""

    def __init__(self) -> None:
        self._calls = itertools.count()

    def __call__(self, x: Array, h_pre: Array) -> Array:
        """Return aggregate's output."""
        h = right("aggregate")(x, h_pre).astype(np.float32)
        return (h * (1 + 1e-7 * (next(self._calls) % 2))).astype(x.dtype)
