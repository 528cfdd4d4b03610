"""Reverse-mode differentiation of NumPy arrays, in few enough lines to be read completely.

A Value is an array together with the values that it was computed from and a pullback: the
function that turns the cotangent of the array into those of its parents. Every primitive below
states its own derivative once, so gradients taken here share nothing with hand-written ones.

Data are float64. A primitive's forward also takes complex numbers, and pieces chosen by
comparison (a shift, a maximum) look at real parts, so that a test can step in the imaginary
direction and read the derivative off to the last digit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from types import EllipsisType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Operand: TypeAlias = "Value | Array | float"
Pullback: TypeAlias = Callable[[Array], tuple[Array, ...]]
Index: TypeAlias = "int | slice | EllipsisType | None"

_orders = itertools.count()


class Value:
    """An array on the tape."""

    __slots__ = ("data", "order", "parents", "primitive", "pullback")
    # Makes `ndarray + Value` call Value.__radd__ rather than build an array of objects.
    __array_ufunc__ = None

    def __init__(
        self,
        data: Array,
        primitive: str = "leaf",
        parents: tuple[Value, ...] = (),
        pullback: Pullback | None = None,
    ) -> None:
        self.data = data
        self.primitive = primitive
        self.parents = parents
        self.pullback = pullback
        self.order = next(_orders)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    def __add__(self, other: Operand) -> Value:
        return add(self, other)

    def __radd__(self, other: Operand) -> Value:
        return add(other, self)

    def __sub__(self, other: Operand) -> Value:
        return add(self, negative(other))

    def __rsub__(self, other: Operand) -> Value:
        return add(other, negative(self))

    def __mul__(self, other: Operand) -> Value:
        return multiply(self, other)

    def __rmul__(self, other: Operand) -> Value:
        return multiply(other, self)

    def __truediv__(self, other: Operand) -> Value:
        return divide(self, other)

    def __rtruediv__(self, other: Operand) -> Value:
        return divide(other, self)

    def __neg__(self) -> Value:
        return negative(self)

    def __pow__(self, exponent: float) -> Value:
        return power(self, exponent)

    def __matmul__(self, other: Operand) -> Value:
        return matmul(self, other)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Value:
        return take(self, index)

    def reshape(self, *shape: int) -> Value:
        return reshape(self, shape)

    def swapaxes(self, first: int, second: int) -> Value:
        return swapaxes(self, first, second)


def value(x: Operand) -> Value:
    """Put x on the tape as a leaf, unless it is there already."""
    return x if isinstance(x, Value) else Value(np.asarray(x))


def node(primitive: str, data: Array, parents: tuple[Value, ...], pullback: Pullback) -> Value:
    """Record one application of a primitive."""
    return Value(data, primitive, parents, pullback)


def pull_back(
    outputs: Sequence[Value], cotangents: Sequence[Array], inputs: Sequence[Value]
) -> tuple[Array, ...]:
    """Return d sum(cotangent * output) / d input for every input, in order."""
    sums: dict[Value, Array] = {}
    for output, cotangent in zip(outputs, cotangents, strict=True):
        if cotangent.shape != output.shape:
            raise ValueError(
                f"a cotangent has shape {cotangent.shape}, its output {output.shape}; "
                "they must be equal"
            )
        sums[output] = sums.get(output, 0.0) + cotangent
    # A parent is always older than what was computed from it.
    for current in sorted(_ancestry(outputs), key=lambda v: v.order, reverse=True):
        if current.pullback is None:
            continue
        cotangents_of_parents = current.pullback(sums[current])
        for parent, cotangent in zip(current.parents, cotangents_of_parents, strict=True):
            sums[parent] = sums.get(parent, 0.0) + cotangent
    return tuple(np.asarray(sums.get(x, np.zeros(x.shape))) for x in inputs)


def _ancestry(outputs: Iterable[Value]) -> set[Value]:
    seen: set[Value] = set()
    waiting = list(outputs)
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(current.parents)
    return seen


def _unbroadcast(cotangent: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of that shape was repeated."""
    extra = cotangent.ndim - len(shape)
    repeated = [
        extra + axis
        for axis, size in enumerate(shape)
        if size == 1 and cotangent.shape[extra + axis] != 1
    ]
    return np.sum(cotangent, axis=(*range(extra), *repeated)).reshape(shape)


def real_part(a: Array) -> Array:
    """Return the real part, for comparisons: a test may step in the imaginary direction."""
    return np.asarray(np.real(a), dtype=np.float64)


# --- arithmetic -------------------------------------------------------------------------------


def add(a: Operand, b: Operand) -> Value:
    a, b = value(a), value(b)
    return node(
        "add",
        a.data + b.data,
        (a, b),
        lambda g: (_unbroadcast(g, a.shape), _unbroadcast(g, b.shape)),
    )


def negative(a: Operand) -> Value:
    a = value(a)
    return node("negative", -a.data, (a,), lambda g: (-g,))


def multiply(a: Operand, b: Operand) -> Value:
    a, b = value(a), value(b)
    return node(
        "multiply",
        a.data * b.data,
        (a, b),
        lambda g: (_unbroadcast(g * b.data, a.shape), _unbroadcast(g * a.data, b.shape)),
    )


def divide(a: Operand, b: Operand) -> Value:
    a, b = value(a), value(b)
    quotient = a.data / b.data
    return node(
        "divide",
        quotient,
        (a, b),
        lambda g: (
            _unbroadcast(g / b.data, a.shape),
            _unbroadcast(-g * quotient / b.data, b.shape),
        ),
    )


def power(a: Operand, exponent: float) -> Value:
    a = value(a)
    return node(
        "power",
        a.data**exponent,
        (a,),
        lambda g: (g * exponent * a.data ** (exponent - 1),),
    )


def matmul(a: Operand, b: Operand) -> Value:
    """Multiply matrices in the last two axes; both sides need at least two axes."""
    a, b = value(a), value(b)
    return node(
        "matmul",
        np.matmul(a.data, b.data),
        (a, b),
        lambda g: (
            _unbroadcast(np.matmul(g, np.swapaxes(b.data, -1, -2)), a.shape),
            _unbroadcast(np.matmul(np.swapaxes(a.data, -1, -2), g), b.shape),
        ),
    )


def inverse(a: Operand) -> Value:
    """Invert square matrices in the last two axes."""
    a = value(a)
    result = np.asarray(np.linalg.inv(a.data), dtype=a.data.dtype)
    turned = np.swapaxes(result, -1, -2)
    return node("inverse", result, (a,), lambda g: (-np.matmul(np.matmul(turned, g), turned),))


# --- functions of one number ------------------------------------------------------------------


def exp(a: Operand) -> Value:
    a = value(a)
    result = np.exp(a.data)
    return node("exp", result, (a,), lambda g: (g * result,))


def log(a: Operand) -> Value:
    a = value(a)
    return node("log", np.log(a.data), (a,), lambda g: (g / a.data,))


def sigmoid(a: Operand) -> Value:
    """Return 1 / (1 + exp(-a)), computed so that neither tail overflows or cancels."""
    a = value(a)
    rising, falling = _logistic(a.data), _logistic(-a.data)
    return node("sigmoid", rising, (a,), lambda g: (g * rising * falling,))


def _logistic(a: Array) -> Array:
    positive = real_part(a) >= 0
    small = np.exp(np.where(positive, -a, a))
    return np.where(positive, 1.0, small) / (1.0 + small)


def tanh(a: Operand) -> Value:
    a = value(a)
    result = np.tanh(a.data)
    return node("tanh", result, (a,), lambda g: (g * (1.0 - result) * (1.0 + result),))


def maximum(a: Operand, floor: float) -> Value:
    """Return the larger of a and a constant, NaN for NaN; the constant passes no gradient back."""
    a = value(a)
    below = real_part(a.data) <= floor
    return node("maximum", np.where(below, floor, a.data), (a,), lambda g: (g * ~below,))


def clip(a: Operand, low: float, high: float) -> Value:
    """Return a within bounds, NaN for NaN; beyond them no gradient is passed back."""
    a = value(a)
    below, above = real_part(a.data) < low, real_part(a.data) > high
    clipped = np.where(below, low, np.where(above, high, a.data))
    return node("clip", clipped, (a,), lambda g: (g * ~(below | above),))


# --- sums and choices -------------------------------------------------------------------------


def total(a: Operand, axis: int) -> Value:
    """Sum along an axis, which stays with size 1."""
    a = value(a)
    return node(
        "total",
        np.sum(a.data, axis=axis, keepdims=True),
        (a,),
        lambda g: (np.broadcast_to(g, a.shape),),
    )


def largest(a: Operand, axis: int) -> Value:
    """Return the largest entry along an axis, which stays with size 1; equal ones share its g."""
    a = value(a)
    order = real_part(a.data)
    found = np.argmax(order, axis=axis, keepdims=True)
    ties = order >= np.take_along_axis(order, found, axis)
    counts = np.maximum(np.sum(ties, axis=axis, keepdims=True), 1)
    share = np.asarray(ties / counts, dtype=np.float64)
    return node("largest", np.take_along_axis(a.data, found, axis), (a,), lambda g: (g * share,))


def where(condition: NDArray[np.bool_], a: Operand, b: Operand) -> Value:
    a, b = value(a), value(b)
    return node(
        "where",
        np.where(condition, a.data, b.data),
        (a, b),
        lambda g: (
            _unbroadcast(np.where(condition, g, 0.0), a.shape),
            _unbroadcast(np.where(condition, 0.0, g), b.shape),
        ),
    )


def straight_through(a: Operand, replacement: Array) -> Value:
    """Return ``replacement`` in place of a, and pass the cotangent on to a unchanged."""
    a = value(a)
    if replacement.shape != a.shape:
        raise ValueError(f"a replacement has shape {replacement.shape}; it replaces {a.shape}")
    return node("straight_through", replacement, (a,), lambda g: (g,))


def logsumexp(a: Operand, axis: int) -> Value:
    """Return log(sum(exp(a))) along an axis, which stays with size 1.

    The largest entry is subtracted as a constant: the result does not depend on it.
    """
    a = value(a)
    shift = np.max(real_part(a.data), axis=axis, keepdims=True)
    return log(total(exp(a - shift), axis)) + shift


# --- shapes -----------------------------------------------------------------------------------


def reshape(a: Operand, shape: tuple[int, ...]) -> Value:
    a = value(a)
    return node("reshape", np.reshape(a.data, shape), (a,), lambda g: (np.reshape(g, a.shape),))


def swapaxes(a: Operand, first: int, second: int) -> Value:
    a = value(a)
    return node(
        "swapaxes",
        np.swapaxes(a.data, first, second),
        (a,),
        lambda g: (np.swapaxes(g, first, second),),
    )


def broadcast_to(a: Operand, shape: tuple[int, ...]) -> Value:
    a = value(a)
    return node(
        "broadcast_to",
        np.broadcast_to(a.data, shape),
        (a,),
        lambda g: (_unbroadcast(g, a.shape),),
    )


def take(a: Operand, index: Index | tuple[Index, ...]) -> Value:
    """Return a[index] for integers, slices, None and an ellipsis, which read no entry twice."""
    a = value(a)

    def pullback(g: Array) -> tuple[Array, ...]:
        cotangent = np.zeros(a.shape)
        cotangent[index] = g
        return (cotangent,)

    return node("take", np.asarray(a.data[index]), (a,), pullback)


def concatenate(parts: Sequence[Operand], axis: int) -> Value:
    values = tuple(value(part) for part in parts)
    ends = np.cumsum([part.shape[axis] for part in values])[:-1]
    return node(
        "concatenate",
        np.concatenate([part.data for part in values], axis=axis),
        values,
        lambda g: tuple(np.split(g, ends, axis=axis)),
    )
