"""Plans: what an op launches for arrays of certain shapes, recorded once and replayed at each call.

An op's module runs once on :class:`Value` objects, which have a shape and a dtype and no numbers.
Every launch and every operation on arrays becomes a step of a :class:`Plan`, a straight list
without branches. A host that replays plans needs no more of an op than that, and pays for no Python
code of the op: it allocates the buffers, and runs the steps in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from mhc_backends.kernels import ops
from mhc_backends.kernels.host import FLOAT32, Channels, Kernels, Out, dtype_name
from mhc_backends.kernels.program import Program
from mhc_core.math import load

__all__ = [
    "ITEMSIZE",
    "Axis",
    "Buffer",
    "Compute",
    "Launch",
    "Plan",
    "Step",
    "Value",
    "record",
]

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}

Shape = tuple[int, ...]


class Axis(int):
    """The length of a leading axis that a compiler leaves open.

    Forwards give their outputs leading axes of their inputs, as they are. So an output's shape has
    the same object again, and with it the compiler's length; its own number stands for any.
    """

    length: Any

    @classmethod
    def of(cls, length: Any) -> Axis:
        """Return an axis for a compiler's length."""
        axis = cls(2)
        axis.length = length
        return axis


class Buffer(NamedTuple):
    """Memory for one array, in row-major order.

    Attributes
    ----------
    shape, dtype
        Of the array that the buffer was made for.
    constant
        The numbers in it, where they are the same at every call.
    whole
        Whether it is the same on all devices that share channels, whatever its launch reads.
    """

    shape: Shape
    dtype: str
    constant: tuple[float, ...] | None = None
    whole: bool = False


class Value:
    """An array of a plan: a part of a buffer, under a shape.

    It has what the ops use of an array: reshapes, indices that take rows of the first axis or add
    axes, and arithmetic, which becomes a step.
    """

    __slots__ = ("_recorder", "buffer", "dtype", "offset", "shape")

    def __init__(
        self, recorder: _Recorder, buffer: int, shape: Shape, dtype: str, offset: int = 0
    ) -> None:
        self._recorder = recorder
        self.buffer = buffer
        self.shape = shape
        self.dtype = dtype
        self.offset = offset  # in elements

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def reshape(self, *shape: Any) -> Value:
        """View the elements in another shape, in which one length may be -1."""
        wanted: list[int] = list(cast("Shape", shape[0]) if isinstance(shape[0], tuple) else shape)
        if -1 in wanted:
            rest = math.prod(length for length in wanted if length != -1)
            wanted[wanted.index(-1)] = self.size // max(rest, 1)
        if math.prod(wanted) != self.size:
            raise ValueError(f"{self.shape} cannot be viewed as {tuple(wanted)}")
        return self._view(tuple(wanted))

    def __getitem__(self, index: Any) -> Value:
        if isinstance(index, tuple):
            return self._view(tuple(self._with_axes(index)))  # pyright: ignore[reportUnknownArgumentType]
        row = self.size // max(self.shape[0], 1)
        if isinstance(index, int):
            return self._view(self.shape[1:], range(self.shape[0])[index] * row)
        start, stop, step = index.indices(self.shape[0])
        if step != 1:
            raise NotImplementedError(f"a plan takes rows one after another, not by {step}")
        return self._view((max(stop - start, 0), *self.shape[1:]), start * row)

    def _with_axes(self, index: tuple[Any, ...]) -> list[int]:
        """Return the shape with an axis for every None."""
        if not all(one is None or one is Ellipsis or one == slice(None) for one in index):
            raise NotImplementedError("a plan takes rows of the first axis, or adds axes")
        named = sum(one is not None and one is not Ellipsis for one in index)
        shape: list[int] = []
        axes = iter(self.shape)
        for one in index:
            if one is Ellipsis:
                shape += [next(axes) for _ in range(self.ndim - named)]
            else:
                shape.append(1 if one is None else next(axes))
        return [*shape, *axes]

    def _view(self, shape: Shape, further: int = 0) -> Value:
        return Value(self._recorder, self.buffer, shape, self.dtype, self.offset + further)

    def __add__(self, other: Value | float) -> Value:
        return self._recorder.binary("add", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self._recorder.binary("mul", self, other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._recorder.binary("div", self, other)

    def sum(self, axis: int) -> Value:
        """Add up along an axis."""
        shape = self.shape[:axis] + self.shape[axis:][1:]
        return self._recorder.compute("sum", (self, axis), shape, self.dtype)


class Launch(NamedTuple):
    """A step that launches a kernel; inputs and outputs are by the names of the kernel's text."""

    kernel: str
    program: Program
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]


class Compute(NamedTuple):
    """A step that the host's own functions compute.

    ``kind`` is "zeros" (of no arguments), "cast" (array), "repeat" (array, n), "add", "mul" or
    "div" (array, array or number), "sum" (array, axis), or "all_reduce" (array), which adds those
    of all devices that share channels.
    """

    kind: str
    arguments: tuple[Any, ...]
    out: Value


Step = Launch | Compute


@dataclass(frozen=True)
class Plan:
    """The launches and buffers of an op for arrays of certain shapes.

    Attributes
    ----------
    inputs
        The number of arrays that are given; they have the first buffers.
    buffers
        All buffers, by the number that :class:`Value` has.
    steps
        The launches and operations, in order.
    outputs
        The values that are returned.
    saved
        The values that the op's vjp reads, where this is a forward that saves some. One may be an
        output too.
    """

    inputs: int
    buffers: Sequence[Buffer]
    steps: Sequence[Step]
    outputs: Sequence[Value]
    saved: Sequence[Value]


def record(
    what: str,
    op: str,
    arrays: Sequence[Sequence[tuple[Sequence[int], Any]]],
    static: Mapping[str, Any],
    dialect: str,
    memory: int,
    absent: Sequence[int] = (),
    devices: int = 1,
) -> Plan:
    """Return the plan of an op.

    Parameters
    ----------
    what
        ``"forward"``, ``"forward_with_saved"`` or ``"vjp"``.
    op
        The op's name.
    arrays
        The shapes and dtypes of the arrays: the primals; for a vjp then the cotangents; and what
        the forward saved, if anything.
    static
        The op's other arguments.
    dialect, memory
        As for :class:`mhc_backends.kernels.host.Kernels`.
    absent
        The places among the primals of those that are None. Neither these nor outputs and
        gradients that are None are arrays of the plan.
    devices
        The number of devices that share channels, of which the arrays are one device's part.
    """
    recorder = _Recorder()
    given: list[list[Value | None]] = [[recorder.given(*one) for one in group] for group in arrays]
    inputs = sum(map(len, given))
    channels = Channels(devices, recorder.all_reduce) if devices > 1 else None
    kernels = Kernels(recorder, dialect, memory, channels)
    module = ops.load(op)
    saved: Sequence[Value] = ()
    for place in absent:
        given[0].insert(place, None)
    if what == "vjp":
        primals, cotangents, *more = map(tuple, given)
        there, kept = iter(cotangents), load(op).OP.kept(static)
        cotangents = tuple(next(there) if is_kept else None for is_kept in kept)
        outputs = module.vjp(kernels, primals, cotangents, (more and more[0]) or None, **static)
    elif what == "forward_with_saved" and hasattr(module, what):
        outputs, saved = module.forward_with_saved(kernels, *given[0], **static)
    else:
        outputs = module.forward(kernels, *given[0], **static)
    many = isinstance(outputs, (tuple, list))
    several = cast("Sequence[Value | None]", outputs) if many else (cast("Value", outputs),)
    made = tuple(one for one in several if one is not None)
    return Plan(inputs, recorder.buffers, recorder.steps, made, tuple(saved))


class _Recorder:
    """The host of a plan."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []

    def given(
        self, shape: Sequence[int], dtype: Any, constant: Any = None, whole: bool = False
    ) -> Value:
        name = dtype_name(dtype)
        self.buffers.append(Buffer(tuple(shape), name, constant, whole))
        return Value(self, len(self.buffers) - 1, tuple(shape), name)

    def compute(self, kind: str, arguments: tuple[Any, ...], shape: Shape, dtype: Any) -> Value:
        out = self.given(shape, dtype)
        self.steps.append(Compute(kind, arguments, out))
        return out

    def binary(self, kind: str, left: Value, right: Value | float) -> Value:
        shape = left.shape
        if isinstance(right, Value):
            if left.dtype != right.dtype:
                raise TypeError(f"a plan does not {kind} {left.dtype} and {right.dtype}")
            shape = _broadcast(left.shape, right.shape)
        return self.compute(kind, (left, right), shape, left.dtype)

    def all_reduce(self, arrays: Sequence[Value]) -> list[Value]:
        return [self.compute("all_reduce", (a,), a.shape, a.dtype) for a in arrays]

    # ---- mhc_backends.kernels.host.Host ----------------------------------------------------------

    def zeros(self, shape: Sequence[int], dtype: Any) -> Value:
        return self.compute("zeros", (), tuple(shape), dtype)

    def constant(self, values: Sequence[Any]) -> Value:
        nested = isinstance(values[0], (tuple, list))
        rows: list[list[float]] = [list(row) for row in values] if nested else [list(values)]
        shape = (len(rows), len(rows[0])) if nested else (len(values),)
        return self.given(shape, FLOAT32, tuple(float(one) for row in rows for one in row))

    def cast(self, array: Value, dtype: Any) -> Value:
        name = dtype_name(dtype)
        return array if array.dtype == name else self.compute("cast", (array,), array.shape, name)

    def repeat(self, array: Value, n: int) -> Value:
        shape = (*array.shape[:-1], n, array.shape[-1])
        return self.compute("repeat", (array, n), shape, array.dtype)

    def launch(
        self, name: str, runs: Program, inputs: Mapping[str, Value], outputs: Mapping[str, Out]
    ) -> list[Value]:
        made = {
            key: self.given(out.shape, out.dtype, whole=out.whole) for key, out in outputs.items()
        }
        self.steps.append(Launch(name, runs, dict(inputs), made))
        return list(made.values())


def _broadcast(left: Shape, right: Shape) -> Shape:
    count = max(len(left), len(right))
    pairs = zip((1,) * (count - len(left)) + left, (1,) * (count - len(right)) + right, strict=True)
    return tuple(b if a == 1 else a for a, b in pairs)
