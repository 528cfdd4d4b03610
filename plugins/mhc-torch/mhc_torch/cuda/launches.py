"""The launches of a plan on NVIDIA's GPUs: their functions, grids, and tables of arguments.

A call writes the addresses of its tensors into a table and launches. What does not change between
calls is made once: functions, grids, lengths of axes, and the arrays of the arguments' addresses.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import add
from typing import Any, NamedTuple

import torch

from mhc_backends.kernels.cuda_function import function
from mhc_backends.kernels.plan import ITEMSIZE, Launch, Value
from mhc_torch.cuda.driver import Driver, Wanted
from mhc_torch.plans.host import Launcher, Places
from mhc_torch.plans.replay import items

__all__ = ["Cuda"]

Tensor = torch.Tensor


class Cuda:
    """The devices of a driver as the host of plans."""

    dialect = "cuda"
    shared_workspace = True

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.memory, self.guard, self.empty = driver.memory, driver.guard, driver.empty

    def launchers(
        self, parts: Sequence[Sequence[Launch]], places: Places, index: int
    ) -> list[Launcher]:
        """Return a function that launches them for each part of a plan."""
        launches = [step for part in parts for step in part]
        functions = [function(step) for step in launches]
        wanted = [
            Wanted(one.text, step.program.memory)
            for one, step in zip(functions, launches, strict=True)
        ]
        ready = iter(self._driver.functions(index, wanted))  # all are compiled at once
        constants = {
            number: self._driver.constant(index, numbers)
            for number, numbers in places.constants.items()
        }
        return [self._launcher(part, ready, places, constants, index) for part in parts]

    def _launcher(
        self,
        part: Sequence[Launch],
        ready: Iterator[Any],
        places: Places,
        constants: Mapping[int, int],
        index: int,
    ) -> Launcher:
        arguments = _Arguments(places, constants)
        steps = [_launched(step, next(ready), arguments) for step in part]
        arguments.close()
        tables: list[_Table] = []  # threads that run a plan at once have a table each
        write, layout = arguments.write, arguments.layout
        launch, current_stream = self._driver.launch, self._driver.stream

        def run(held: Sequence[Any]) -> None:
            try:
                table = tables.pop()
            except IndexError:
                table = _Table(*layout)
            write(table.values, held)
            current, start = current_stream(index), table.start
            for kernel, x, y, threads, memory, first in steps:
                error = launch(kernel, x, y, threads, memory, current, start + first)
                if error:
                    raise _failed(error)
            tables.append(table)

        return run


class _Launched(NamedTuple):
    """A launch, as far as it is the same at every call; ``first`` is of its arguments, in bytes."""

    function: Any
    x: int
    y: int
    threads: int
    memory: int
    first: int


class _Table:
    """The arguments of a part's launches at one call: their values, and the addresses of these."""

    def __init__(self, values: Sequence[int], order: Sequence[int]) -> None:
        self.values = (ctypes.c_uint64 * max(len(values), 1))(*values)
        first = ctypes.addressof(self.values)
        self._order = (ctypes.c_uint64 * max(len(order), 1))(*(first + 8 * k for k in order))
        self.start = ctypes.addressof(self._order)


def _launched(step: Launch, ready: Any, arguments: _Arguments) -> _Launched:
    """Add a launch's arguments to those of its part."""
    made, first = step.program.launch, 8 * len(arguments)
    arrays = {**step.inputs, **step.outputs}
    for argument in function(step).arguments:
        value = arrays[argument.array]
        if argument.axis is None:
            arguments.address(value)
        else:
            arguments.number(int(value.shape[argument.axis]))
    threads, memory = made.threadgroup[0], step.program.memory
    return _Launched(ready, made.grid[0] // threads, made.grid[1], threads, memory, first)


def _failed(error: Any) -> Exception:
    name = getattr(error, "name", error)
    return RuntimeError(f"backend 'torch-cuda': a kernel could not be launched: {name}")


class _Arguments:
    """The arguments of a part's launches, each value once: addresses, then what is fixed."""

    def __init__(self, places: Places, constants: Mapping[int, int]) -> None:
        self._places, self._constants = places, constants
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
            place = self._places.place(value)
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
        take = items(places)

        def write_in_order(values: Any, held: Sequence[Any]) -> None:
            pack(values, 0, *map(address, held))

        def write(values: Any, held: Sequence[Any]) -> None:
            pack(values, 0, *map(add, take([*map(address, held)]), offsets))

        def write_what_is_there(values: Any, held: Sequence[Any]) -> None:
            base = [0 if one is None else address(one) for one in held]
            pack(values, 0, *map(add, take(base), offsets))

        if self._places.computed:
            self.write = write_what_is_there
        elif places == tuple(range(self._places.count)) and not any(offsets):
            self.write = write_in_order
        else:
            self.write = write

    write: Callable[[Any, Sequence[Any]], None]
    """Write the addresses of a call's tensors; a result that is not there yet has none."""
