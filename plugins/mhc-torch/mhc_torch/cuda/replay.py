"""A plan of mhc-core, run on the tensors of one device.

A call allocates outputs, writes addresses into a table and launches. What does not change between
calls is made once: functions, grids, lengths of axes, and the arrays of the arguments' addresses.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from operator import add, itemgetter
from typing import Any, NamedTuple, cast

import torch

from mhc_backends.kernels.cuda_function import function
from mhc_backends.kernels.plan import ITEMSIZE, Compute, Launch, Plan, Value
from mhc_core.sharding import Group, channel_axis
from mhc_torch.cuda.driver import Driver, Wanted

__all__ = ["DTYPES", "Replay"]

Tensor = torch.Tensor

ALIGNMENT = 256  # bytes, to which each part of the workspace is aligned
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Launched(NamedTuple):
    """A launch, as far as it is the same at every call; ``first`` is of its arguments, in bytes."""

    function: Any
    x: int
    y: int
    threads: int
    memory: int
    first: int


class _Computed(NamedTuple):
    """A step of PyTorch's own, and the place of its result."""

    compute: Callable[[Sequence[Any]], Tensor]
    place: int

    def run(self, held: list[Any]) -> None:
        """Put the result into its place."""
        held[self.place] = self.compute(held)


class _AllReduce(NamedTuple):
    """Sums over the processes that share channels where the plan runs, all in one exchange."""

    readers: tuple[Callable[[Sequence[Any]], Tensor], ...]
    places: tuple[int, ...]

    def run(self, held: list[Any]) -> None:
        """Put the sums into their places."""
        total = cast("Group", channel_axis()).total
        parts = [read(held) for read in self.readers]
        whole = total(torch.cat([one.flatten() for one in parts]) if len(parts) > 1 else parts[0])
        sums = whole.flatten().split([one.numel() for one in parts])
        for place, one, part in zip(self.places, sums, parts, strict=True):
            held[place] = one.view(part.shape)


class _Table:
    """The arguments of all launches of one call: their values, and the addresses of the values."""

    def __init__(self, values: Sequence[int], order: Sequence[int]) -> None:
        self.values = (ctypes.c_uint64 * max(len(values), 1))(*values)
        first = ctypes.addressof(self.values)
        self._order = (ctypes.c_uint64 * max(len(order), 1))(*(first + 8 * k for k in order))
        self.start = ctypes.addressof(self._order)


class Replay:
    """A plan on a device: takes its inputs, and returns its outputs and then what it saves.

    A saved value that is an output too is returned once; ``saved`` has the index of each among all
    that is returned, and ``outputs`` is the number of outputs.
    """

    def __init__(self, plan: Plan, driver: Driver, index: int) -> None:
        self._driver, self._index = driver, index
        returned = list(plan.outputs)
        for value in plan.saved:
            if not any(value is other for other in returned):
                returned.append(value)
        self.outputs = len(plan.outputs)
        self.saved = [
            next(k for k, other in enumerate(returned) if other is value) for value in plan.saved
        ]
        layout = _Layout(plan, returned)
        self._made = [*layout.made, ((layout.room,), (1,), torch.uint8)][: layout.allocated]
        self._results: list[None] = [None] * layout.computed
        self._steps, self._arguments = _steps(plan, driver, index, layout)
        views = [layout.view(value) for value in returned]
        # a result is the caller's alone: not an input, nor another result
        shared = [one[0] < plan.inputs or one in views[:k] for k, one in enumerate(views)]
        self._returned = [(*one, copied) for one, copied in zip(views, shared, strict=True)]
        whole = all(view is None for _, view in views) and not any(shared)
        places = [place for place, _ in views]
        self._take = _items(places) if whole else self._results_of
        self._tables: list[_Table] = []  # threads that run a plan at once have a table each
        self.run = self._run_in_turn if layout.computed else self._launching()

    run: Callable[[list[Any]], Sequence[Tensor]]
    """Run the plan on contiguous tensors, in a list that it may add to."""

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run the plan on tensors of the plan's shapes and dtypes."""
        return self.run([one if one.is_contiguous() else one.contiguous() for one in tensors])

    def _launching(self) -> Callable[[list[Any]], Sequence[Tensor]]:
        """Return the run of a plan of launches alone.

        What it needs are its own variables, as reading attributes is a good part of a small call.
        """
        driver, index, made, steps = self._driver, self._index, self._made, self._steps
        guard, empty, launch, stream = driver.guard, driver.empty, driver.launch, driver.stream
        tables, write, layout = self._tables, self._arguments.write, self._arguments.layout
        take = self._take

        def run(held: list[Any]) -> Sequence[Tensor]:
            if (context := guard(index)) is not None:
                with context:
                    return run(held)
            for one in made:
                held.append(empty(*one))
            try:
                table = tables.pop()
            except IndexError:
                table = _Table(*layout)
            write(table.values, held)
            current, start = stream(index), table.start
            for kernel, x, y, threads, memory, first in steps:
                error = launch(kernel, x, y, threads, memory, current, start + first)
                if error:
                    raise _failed(error)
            tables.append(table)
            return take(held)

        return run

    def _results_of(self, held: list[Any]) -> Sequence[Tensor]:
        results = [(_viewed(held[place], view), copied) for place, view, copied in self._returned]
        return [result.clone() if copied else result for result, copied in results]

    def _run_in_turn(self, held: list[Any]) -> Sequence[Tensor]:
        """Run a plan in which PyTorch's own functions compute some values between launches."""
        if (context := self._driver.guard(self._index)) is not None:
            with context:
                return self._run_in_turn(held)
        held += [self._driver.empty(*one) for one in self._made]
        held += self._results
        try:
            table = self._tables.pop()
        except IndexError:
            table = _Table(*self._arguments.layout)
        written = False
        for step in self._steps:
            if isinstance(step, (_Computed, _AllReduce)):
                step.run(held)
                written = False
                continue
            if not written:
                self._arguments.write(table.values, held)
                written = True
            function, x, y, threads, memory, first = step
            stream = self._driver.stream(self._index)
            error = self._driver.launch(
                function, x, y, threads, memory, stream, table.start + first
            )
            if error:
                raise _failed(error)
        self._tables.append(table)
        return self._take(held)


def _items(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes these items of a sequence."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _viewed(tensor: Tensor, view: tuple[Any, ...] | None) -> Tensor:
    if view is None:
        return tensor
    shape, strides, offset = view
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


def _failed(error: Any) -> Exception:
    name = getattr(error, "name", error)
    return RuntimeError(f"backend 'torch-cuda': a kernel could not be launched: {name}")


# ---- what is decided once ------------------------------------------------------------------------


class _Layout:
    """The place of every buffer in the list of a call's tensors.

    First the inputs, then the tensors that the call makes, then the workspace, which holds all
    buffers that only launches see, then the results of PyTorch's own steps.
    """

    def __init__(self, plan: Plan, returned: Sequence[Value]) -> None:
        self._plan = plan
        computes = [step for step in plan.steps if isinstance(step, Compute)]
        results = [step.out.buffer for step in computes]
        seen = {value.buffer for step in computes for value in _values(step.arguments)}
        seen |= {value.buffer for value in returned}
        shapes = {
            value.buffer: value.shape
            for value in reversed(returned)
            if value.offset == 0 and value.size == math.prod(plan.buffers[value.buffer].shape)
        }
        self.made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]] = []
        self._place = {number: number for number in range(plan.inputs)}
        self._offset: dict[int, int] = {}
        self._shape: dict[int, tuple[int, ...]] = {}
        self.constants: dict[int, tuple[float, ...]] = {}
        self.room = 0
        inside: list[int] = []
        for number, buffer in enumerate(plan.buffers):
            self._shape[number] = tuple(buffer.shape)
            if buffer.constant is not None:
                self.constants[number] = buffer.constant
            elif number < plan.inputs or number in results:
                continue
            elif number in seen:
                shape = self._shape[number] = tuple(map(int, shapes.get(number, buffer.shape)))
                self._place[number] = plan.inputs + len(self.made)
                self.made.append((shape, _strides(shape), DTYPES[buffer.dtype]))
            else:
                inside.append(number)
                self._offset[number] = self.room
                size = math.prod(buffer.shape) * ITEMSIZE[buffer.dtype]
                self.room += -(-size // ALIGNMENT) * ALIGNMENT
        after = plan.inputs + len(self.made)
        self._place |= dict.fromkeys(inside, after)
        after += self.room > 0
        self._place |= {number: after + k for k, number in enumerate(results)}
        self.computed = len(results)
        self.allocated = len(self.made) + (self.room > 0)
        self.count = after + self.computed  # the tensors of a call

    def place(self, value: Value) -> tuple[int, int]:
        """Return the place of a value's tensor, and its offset in it in bytes."""
        offset = self._offset.get(value.buffer, 0) + value.offset * ITEMSIZE[value.dtype]
        return self._place[value.buffer], offset

    def view(self, value: Value) -> tuple[int, tuple[Any, ...] | None]:
        """Return a value's place, and its shape, strides and offset if it is a part of a tensor."""
        shape = tuple(map(int, value.shape))
        if value.offset == 0 and shape == self._shape[value.buffer]:
            return self._place[value.buffer], None
        return self._place[value.buffer], (shape, _strides(shape), value.offset)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[k + 1 :]) for k in range(len(shape)))


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [one for one in arguments if isinstance(one, Value)]


class _Arguments:
    """The arguments of all launches of a plan, each value once: addresses, then what is fixed."""

    def __init__(self, layout: _Layout, constants: Mapping[int, int]) -> None:
        self._layout, self._constants = layout, constants
        self._moving: dict[tuple[int, int], int] = {}
        self._fixed: dict[int, int] = {}
        self._order: list[tuple[bool, int]] = []

    def __len__(self) -> int:
        return len(self._order)

    def address(self, value: Value) -> None:
        """Add the address of an array."""
        if value.buffer in self._constants:
            at = self._constants[value.buffer] + value.offset * ITEMSIZE[value.dtype]
            self.number(at)
        else:
            place = self._layout.place(value)
            self._order.append((True, self._moving.setdefault(place, len(self._moving))))

    def number(self, number: int) -> None:
        """Add a number that is the same at every call."""
        self._order.append((False, self._fixed.setdefault(number, len(self._fixed))))

    def close(self) -> None:
        """Fix the layout, after the last argument."""
        count = len(self._moving)
        self.layout = (
            [0] * count + list(self._fixed),
            [k if moving else count + k for moving, k in self._order],
        )
        pack, address = struct.Struct(f"{count}Q").pack_into, Tensor.data_ptr
        places, offsets = zip(*self._moving, strict=True) if self._moving else ((), ())
        items = _items(places)

        def write_in_order(values: Any, held: Sequence[Any]) -> None:
            pack(values, 0, *map(address, held))

        def write(values: Any, held: Sequence[Any]) -> None:
            pack(values, 0, *map(add, items([*map(address, held)]), offsets))

        def write_what_is_there(values: Any, held: Sequence[Any]) -> None:
            base = [0 if one is None else address(one) for one in held]
            pack(values, 0, *map(add, items(base), offsets))

        if self._layout.computed:
            self.write = write_what_is_there
        elif places == tuple(range(self._layout.count)) and not any(offsets):
            self.write = write_in_order
        else:
            self.write = write

    write: Callable[[Any, Sequence[Any]], None]
    """Write the addresses of a call's tensors; a result that is not there yet has none."""


def _steps(plan: Plan, driver: Driver, index: int, layout: _Layout) -> tuple[list[Any], _Arguments]:
    launches = [step for step in plan.steps if isinstance(step, Launch)]
    functions = [function(step) for step in launches]
    wanted = [
        Wanted(one.text, step.program.memory) for one, step in zip(functions, launches, strict=True)
    ]
    loaded = zip(functions, driver.functions(index, wanted), strict=True)
    constants = {
        number: driver.constant(index, numbers) for number, numbers in layout.constants.items()
    }
    arguments = _Arguments(layout, constants)
    steps: list[Any] = []
    for step in plan.steps:
        if isinstance(step, Compute) and step.kind == "all_reduce":
            joins = steps and isinstance(steps[-1], _AllReduce)  # sums do not wait for one another
            readers, places = steps.pop() if joins else ((), ())
            read, place = _reader(step.arguments[0], layout), layout.place(step.out)[0]
            steps.append(_AllReduce((*readers, read), (*places, place)))
            continue
        if isinstance(step, Compute):
            steps.append(_Computed(_compute(step, layout), layout.place(step.out)[0]))
            continue
        text, ready = next(loaded)
        made, first = step.program.launch, 8 * len(arguments)
        arrays = {**step.inputs, **step.outputs}
        for argument in text.arguments:
            value = arrays[argument.array]
            if argument.axis is None:
                arguments.address(value)
            else:
                arguments.number(int(value.shape[argument.axis]))
        threads = made.threadgroup[0]
        steps.append(
            _Launched(
                ready, made.grid[0] // threads, made.grid[1], threads, step.program.memory, first
            )
        )
    arguments.close()
    return steps, arguments


# ---- PyTorch's own steps -------------------------------------------------------------------------


def _compute(step: Compute, layout: _Layout) -> Callable[[Sequence[Any]], Tensor]:
    """Return a function from a call's tensors to the result of a step."""
    kind, (shape, dtype) = step.kind, (tuple(map(int, step.out.shape)), DTYPES[step.out.dtype])
    readers = [_reader(one, layout) for one in step.arguments]
    if kind == "zeros":
        return lambda held: torch.zeros(shape, dtype=dtype, device=held[0].device)
    functions: dict[str, Callable[..., Tensor]] = {
        "cast": functools.partial(Tensor.to, dtype=dtype),
        "repeat": _repeated,
        "add": torch.add,
        "mul": torch.mul,
        "div": torch.div,
        "sum": torch.sum,
    }
    run = functions[kind]
    return lambda held: run(*[read(held) for read in readers]).contiguous()


def _repeated(a: Tensor, n: int) -> Tensor:
    return a.unsqueeze(-2).expand(*a.shape[:-1], n, a.shape[-1])


def _constant(numbers: Sequence[float], shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """Return a function of a call's tensors to numbers on their device, where they stay."""
    kept: list[Tensor] = []

    def read(held: Sequence[Any]) -> Tensor:
        if not kept:
            kept.append(torch.tensor(numbers, device=held[0].device).reshape(shape))
        return kept[0]

    return read


def _reader(argument: Any, layout: _Layout) -> Callable[[Sequence[Any]], Any]:
    if not isinstance(argument, Value):
        return lambda _: argument
    if argument.buffer in layout.constants:
        return _constant(layout.constants[argument.buffer], tuple(map(int, argument.shape)))
    place, view = layout.view(argument)
    return lambda held: _viewed(held[place], view)
