"""Fewer arrays between the launches of a compiled chain of ops.

What MLX does for a launch on the CPU costs more than the kernels of a token or two, and half of
that is for its outputs: 3.5 us for a kernel, 0.3 to 0.6 for an input, 1.6 to 2.5 for an output
(docs/performance.md). So where an op is traced by the caller's own ``mx.compile`` without
gradients, its launches write what only launches read into one array: the new streams and their
sums, and the mappings. The op returns views of it. A later op that gets such a view passes the
array itself to its kernels, which begin to read where the view does. A view that nothing else reads
is no part of the compiled graph.

A view is known by its Python object, which MLX changes in place where a caller writes ``x += 1`` or
``x[0] = 1``. So a view is known only while that object holds the same array, which its memory
tells; where it does not tell, nothing is packed.

An array of T tokens has the parts one after another, each with all of its tokens, so that a part is
contiguous and begins at a multiple of T. The text of a kernel gets pointers to the parts in front
of it, and is otherwise what it is.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import operator
import platform
import re
import weakref
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mhc_backends.kernels.cuda_function import TYPES
from mhc_backends.kernels.function import LENGTH
from mhc_backends.kernels.mlx import Kernels, Out, dtype_name
from mhc_backends.kernels.plan import ITEMSIZE, Launch, Plan, Value, record

__all__ = ["OPS", "Packed"]

OPS = ("combine", "combine_pre", "combine_pre_norm", "pre", "pre_norm")
"""The ops of a chain of layers, whose launches read and write arrays of T tokens."""

MOST_TOKENS = 64
"""With more tokens the kernels take longer than MLX."""

APART = ("h", "y")  # the outputs that a layer reads
_WIDE = 16  # bytes of a token in every part, so that all parts begin where vectors may


class Part(NamedTuple):
    """Where a value is: an array, or some bytes of each token of a packed one.

    Attributes
    ----------
    array
        The MLX array.
    start
        The bytes of a token before it; None if the array is the value itself.
    """

    array: mx.array
    start: int | None = None


class _View(NamedTuple):
    """A view that an op returned: its object, what that object held, that, and where it is."""

    reference: weakref.ref[mx.array]
    memory: bytes
    array: mx.array  # kept, so that no other array gets its place in memory
    part: Part


class Packed:
    """Ops on packed arrays, by the kernels of the CUDA dialect on MLX."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._views: dict[int, _View] = {}

    def __call__(
        self, op: str, static: Mapping[str, Any], arrays: Sequence[mx.array | None]
    ) -> tuple[mx.array, ...] | None:
        """Run an op and return those of its outputs that are not None, or None if it cannot."""
        x = arrays[0]
        if op not in OPS or x is None or x.ndim < 2 or not changes_show():
            return None
        T = math.prod(x.shape[:-2])
        if not 0 < T <= MOST_TOKENS:
            return None
        there = [array for array in arrays if array is not None]
        kinds = tuple((array.shape, dtype_name(array.dtype)) for array in there)
        absent = tuple(k for k, array in enumerate(arrays) if array is None)
        plan = _plan(op, kinds, tuple(static.items()), self._kernels.memory, absent)
        if plan is None:
            return None
        places = {k: self._found(array) for k, array in enumerate(there)}
        for step in plan.steps:
            assert isinstance(step, Launch)
            self._launch(step, T, places)
        return tuple(self._view(places[one.buffer], one, T) for one in plan.outputs)

    def _found(self, array: mx.array) -> Part:
        """Return where an argument is."""
        view = self._views.get(id(array))
        same = view is not None and view.reference() is array and view.memory == _memory_of(array)
        return view.part if view is not None and same else Part(array)

    def _view(self, place: Part, value: Value, T: int) -> mx.array:
        """Return a value as an array of its own, which a later op knows again."""
        if place.start is None:
            return place.array.reshape(value.shape)
        flat = place.array  # one node of MLX's graph for a view, or two, where something reads it
        if value.dtype != "float32":
            flat = flat.view(getattr(mx, value.dtype))
        strides = list(itertools.accumulate(value.shape[:0:-1], operator.mul, initial=1))[::-1]
        first = T * place.start // ITEMSIZE[value.dtype]
        view = mx.as_strided(flat, value.shape, strides, first)
        key = id(view)
        reference = weakref.ref(view, lambda _: self._views.pop(key, None))
        self._views[key] = _View(reference, _memory_of(view), view.astype(view.dtype), place)
        return view

    def _launch(self, step: Launch, T: int, places: dict[int, Part]) -> None:
        """Build a launch, and note where its outputs are."""
        text = _Text(step, T)
        for name, value in step.inputs.items():
            text.read(name, value, places[value.buffer])
        starts = _starts(step, T)
        for name, start in starts.items():
            text.write(name, step.outputs[name], start)
        outputs = {n: Out(v.shape, v.dtype) for n, v in step.outputs.items() if n not in starts}
        if starts:
            bytes_of_all = sum(_bytes(step.outputs[name], T) for name in starts)
            outputs["packed"] = Out((T * bytes_of_all // ITEMSIZE["float32"],), "float32")
        source = text.source()
        digest = f"{step.program.digest}packed{zlib.crc32(source.encode()):x}"
        runs = step.program._replace(source=source, digest=digest)
        made = self._kernels.host.launch(step.kernel, runs, text.arrays, outputs)
        arrays = dict(zip(outputs, made, strict=True))
        for name, value in step.outputs.items():
            apart = name in arrays
            places[value.buffer] = Part(arrays[name]) if apart else Part(made[-1], starts[name])


def _memory_of(array: mx.array) -> bytes:
    """Return the memory of an array's Python object, without its count of references.

    It has the pointer to what the array is, which every change in place replaces.
    """
    head = object.__basicsize__
    return ctypes.string_at(id(array) + head, type(array).__basicsize__ - head)


@functools.cache
def changes_show() -> bool:
    """Return whether the memory of Python objects tells that their arrays were changed."""
    if platform.python_implementation() != "CPython":
        return False
    array = mx.zeros(3)
    memories = [_memory_of(array), _memory_of(array)]
    kept = [array.astype(array.dtype)]  # as _View does
    array += 1
    memories.append(_memory_of(array))
    kept.append(array.astype(array.dtype))
    array[0] = 1
    memories.append(_memory_of(array))
    return memories[0] == memories[1] and len(set(memories)) == len(kept) + 1


class _Text:
    """The text of a launch, with pointers to what is packed."""

    def __init__(self, step: Launch, T: int) -> None:
        self.arrays: dict[str, mx.array] = {}
        self._source = step.program.source
        self._T = T
        self._tokens = ""  # what is T in the text
        self._lengths: dict[tuple[str, str], str] = {}
        self._pointers: list[str] = []

    def read(self, name: str, value: Value, place: Part) -> None:
        """Let the text read an input where it is."""
        if place.start is None:
            self.arrays[name] = place.array.reshape(value.shape)
            length = f"{name}_shape[0]"
        else:
            own = next((k for k, a in self.arrays.items() if a is place.array), None)
            own = own or f"packed_{len(self.arrays)}"
            self.arrays[own] = place.array
            length = f"({own}_shape[0] / {place.array.size // self._T})"
            self._point("const ", name, value, own, f"{length} * {place.start}")
            for axis, count in enumerate(value.shape):
                self._lengths[name, str(axis)] = str(count) if axis else length
        if name == "x":
            self._tokens = length

    def write(self, name: str, value: Value, start: int) -> None:
        """Let the text write an output into the array of those that launches alone read."""
        self._point("", name, value, "packed", f"{self._tokens} * {start}")

    def _point(self, const: str, name: str, value: Value, array: str, start: str) -> None:
        kind = TYPES[value.dtype]
        self._pointers.append(
            f"{const}{kind}* const {name} = ({const}{kind}*)(({const}char*){array} + "
            f"(int64_t){start});\n"
        )

    def source(self) -> str:
        """Return the text."""

        def length(found: re.Match[str]) -> str:
            return self._lengths.get((found[1], found[2]), found[0])

        return "".join(self._pointers) + LENGTH.sub(length, self._source)


def _starts(step: Launch, T: int) -> dict[str, int]:
    """Return the outputs that share an array, each with the bytes of a token before it."""
    shared = [name for name in step.outputs if name not in APART]
    if len(shared) < 2:
        return {}
    ends = itertools.accumulate(_bytes(step.outputs[name], T) for name in shared)
    return dict(zip(shared, [0, *ends], strict=False))


def _bytes(value: Value, T: int) -> int:
    """Return the bytes of a token."""
    return value.size // T * ITEMSIZE[value.dtype]


@functools.cache
def _plan(
    op: str,
    kinds: tuple[tuple[tuple[int, ...], str], ...],
    static: tuple[tuple[str, Any], ...],
    memory: int,
    absent: tuple[int, ...],
) -> Plan | None:
    """Return the plan of an op, if it only launches kernels on whole arrays of T tokens."""
    plan = record("forward", op, [kinds], dict(static), "cuda", memory, absent)
    T = math.prod(kinds[0][0][:-2])
    if any(one.constant for one in plan.buffers) or any(one.offset for one in plan.outputs):
        return None
    for step in plan.steps:
        if not isinstance(step, Launch) or "x" not in step.inputs:
            return None
        if any(value.offset for value in step.inputs.values()):
            return None
        for name, value in step.outputs.items():
            if name not in APART and (value.size % T or _bytes(value, T) % _WIDE):
                return None
    return plan
