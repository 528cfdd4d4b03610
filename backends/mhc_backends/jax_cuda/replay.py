"""A plan of mhc-core as JAX operations: its launches are calls of one handler.

All launches that do not wait for an operation of JAX's own are one call, with every buffer that
only they see in one workspace, which is a result like the others: XLA plans its memory, and CUDA
graphs may capture the call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy

from mhc_backends.jax.ops import spread_like, varying_axes
from mhc_backends.jax_cuda.library import Device, Wanted
from mhc_backends.jax_cuda.partition import LAX
from mhc_backends.kernels.cuda_function import function
from mhc_backends.kernels.plan import ITEMSIZE, Buffer, Compute, Launch, Plan, Value

__all__ = ["Replay"]

ALIGNMENT = 256  # bytes, to which each part of the workspace is aligned


class _Call(NamedTuple):
    """Launches that run as one call: what it reads and writes, by number of buffer, and how."""

    operands: tuple[int, ...]
    results: tuple[int, ...]
    room: int  # bytes of the workspace, which is the last result
    functions: str
    launches: numpy.ndarray[Any, Any]
    steps: tuple[Launch, ...]


class Replay:
    """A plan on a device, called with arrays: returns its outputs, and then what it saves.

    A saved value that is an output too is returned once; ``saved`` has the index of each among all
    that is returned, and ``outputs`` is the number of outputs. ``axes`` are those of a mesh whose
    devices share channels.
    """

    def __init__(self, plan: Plan, device: Device, axes: tuple[str, ...] = ()) -> None:
        self._plan, self._target, self._axes = plan, device.target, axes
        self._returned = list(plan.outputs)
        for value in plan.saved:
            if not any(value is other for other in self._returned):
                self._returned.append(value)
        self.outputs = len(plan.outputs)
        self.saved = tuple(
            next(k for k, other in enumerate(self._returned) if other is value)
            for value in plan.saved
        )
        self._steps = _steps(plan, self._returned)
        launches = [step for step in plan.steps if isinstance(step, Launch)]
        device.prepare([_wanted(step) for step in launches])

    def __call__(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Run the plan, or trace it."""
        held: dict[int, Any] = dict(enumerate(arrays))
        for number, buffer in enumerate(self._plan.buffers):
            if buffer.constant is not None:
                held[number] = spread_like(_filled(buffer), arrays[0], self._axes)
        for step in self._steps:
            if isinstance(step, _Call):
                held |= self._call(step, held, arrays[0])
            else:
                made = _computed(step, held, self._axes)
                held[step.out.buffer] = spread_like(made, arrays[0], self._axes)
        return tuple(_viewed(held, value) for value in self._returned)

    def _call(self, call: _Call, held: dict[int, Any], like: jax.Array) -> dict[int, Any]:
        buffers = [self._plan.buffers[number] for number in call.results]
        shapes = [(tuple(one.shape), one.dtype) for one in buffers]
        if call.room:
            shapes.append(((call.room,), "uint8"))
        parts = self._parts(call, held)
        apart = [() if number in parts else self._axes for number in call.results]
        apart += [()] * (len(shapes) - len(apart))
        kinds = [
            _kind(shape, dtype, like, other)
            for (shape, dtype), other in zip(shapes, apart, strict=True)
        ]
        run = jax.ffi.ffi_call(self._target, kinds, vmap_method="sequential")
        results = run(
            *[held[number] for number in call.operands],
            functions=call.functions,
            launches=call.launches,
        )
        return dict(zip(call.results, cast("Sequence[Any]", results), strict=False))

    def _parts(self, call: _Call, held: dict[int, Any]) -> set[int]:
        """Return the buffers of a call of which each device that shares channels has a part."""
        shared = {*self._axes}
        parts = {number for number in call.operands if shared & varying_axes(held[number])}
        for step in call.steps:
            if any(value.buffer in parts for value in step.inputs.values()):
                made = {value.buffer for value in step.outputs.values()}
                parts |= {number for number in made if not self._plan.buffers[number].whole}
        return parts


def _kind(shape: tuple[int, ...], dtype: str, like: jax.Array, apart: Sequence[str]) -> Any:
    """Return the type of a result that varies over mesh axes as an array does, but those apart."""
    if not varying_axes(like):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    # JAX's constructors take no such axes by public means, so it is the type of an array
    return jax.typeof(spread_like(jnp.zeros(shape, dtype), like, apart))


def _wanted(step: Launch) -> Wanted:
    return Wanted(function(step).text, step.program.memory)


# ---- what is decided once ------------------------------------------------------------------------


def _steps(plan: Plan, returned: Sequence[Value]) -> list[_Call | Compute]:
    """Return a plan's steps, its launches in as few calls as their inputs allow."""
    depth = dict.fromkeys(range(len(plan.buffers)), 0)  # the calls to wait for
    own: set[int] = set()  # buffers that JAX's own operations make
    calls: dict[int, list[Launch]] = {}
    after: dict[int, list[Compute]] = {}
    for step in plan.steps:
        if isinstance(step, Launch):
            given = [value.buffer for value in step.inputs.values()]
            turn = max([1, *[depth[one] + (one in own) for one in given]])
            calls.setdefault(turn, []).append(step)
            depth |= {value.buffer: turn for value in step.outputs.values()}
        else:
            given = [one.buffer for one in step.arguments if isinstance(one, Value)]
            turn = max((depth[one] for one in given), default=0)
            after.setdefault(turn, []).append(step)
            depth[step.out.buffer] = turn
            own.add(step.out.buffer)
    steps: list[_Call | Compute] = [*after.get(0, [])]
    for turn in sorted({*calls, *after} - {0}):
        if turn in calls:
            seen = {value.buffer for value in returned}
            for other, launches in calls.items():
                if other != turn:
                    seen |= {v.buffer for one in launches for v in one.inputs.values()}
            for computes in after.values():
                seen |= {
                    v.buffer for one in computes for v in one.arguments if isinstance(v, Value)
                }
            steps.append(_call(plan, calls[turn], seen))
        steps += after.get(turn, [])
    return steps


def _call(plan: Plan, launches: Sequence[Launch], seen: set[int]) -> _Call:
    """Make one call of launches; ``seen`` are the buffers that others read."""
    made = {value.buffer: None for step in launches for value in step.outputs.values()}
    operands = tuple(
        dict.fromkeys(
            value.buffer
            for step in launches
            for value in step.inputs.values()
            if value.buffer not in made
        )
    )
    results = tuple(number for number in made if number in seen)
    place = {number: (k, 0) for k, number in enumerate((*operands, *results))}
    room = 0
    for number in made:
        if number not in place:
            buffer = plan.buffers[number]
            place[number] = len(operands) + len(results), room
            size = math.prod(buffer.shape) * ITEMSIZE[buffer.dtype]
            room += -(-size // ALIGNMENT) * ALIGNMENT
    digests: dict[str, int] = {}
    numbers: list[int] = []
    for step in launches:
        arguments: list[int] = []
        arrays = {**step.inputs, **step.outputs}
        for argument in function(step).arguments:
            value = arrays[argument.array]
            if argument.axis is None:
                index, start = place[value.buffer]
                arguments += [index, start + value.offset * ITEMSIZE[value.dtype]]
            else:
                arguments += [-1, int(value.shape[argument.axis])]
        index = digests.setdefault(_wanted(step).digest, len(digests))
        shape, memory = step.program.launch, step.program.memory
        threads = shape.threadgroup[0]
        head = [index, shape.grid[0] // threads, shape.grid[1], threads, memory]
        numbers += [*head, len(arguments) // 2, *arguments]
    coded = numpy.array(numbers, numpy.int64)
    return _Call(operands, results, room, "".join(digests), coded, tuple(launches))


# ---- JAX's own steps -----------------------------------------------------------------------------


def _filled(buffer: Buffer) -> jax.Array:
    """Return a buffer's constant numbers, of which custom_partitioning takes no array."""
    runs = [(value, len(list(run))) for value, run in itertools.groupby(buffer.constant or ())]
    parts = [jax.lax.full((count,), value, jnp.float32) for value, count in runs]
    return jnp.concatenate(parts).reshape(buffer.shape)


def _viewed(held: dict[int, Any], value: Value) -> jax.Array:
    array = held[value.buffer]
    if value.size != array.size:
        array = array.reshape(-1)[value.offset : value.offset + value.size]
    return array.reshape(value.shape)


def _computed(step: Compute, held: dict[int, Any], axes: tuple[str, ...]) -> jax.Array:
    shape, dtype = step.out.shape, jnp.dtype(step.out.dtype)
    given = [_viewed(held, one) if isinstance(one, Value) else one for one in step.arguments]
    match step.kind:
        case "zeros":
            made = jnp.zeros(shape, dtype)
        case "cast":
            made = given[0].astype(dtype)
        case "repeat":
            made = jnp.broadcast_to(given[0][..., None, :], shape)
        case "sum":
            made = given[0].sum(step.arguments[1])
        case "all_reduce":
            made = LAX.psum(given[0], axes)
        case kind:
            run = {"add": jnp.add, "mul": jnp.multiply, "div": jnp.divide}[kind]
            made = run(*given)
    return made.astype(dtype)
