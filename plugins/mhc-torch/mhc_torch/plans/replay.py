"""A plan of mhc-core, run on the tensors of one device.

A call allocates outputs and launches. What does not change between calls is made once, by the plan
and by the host that launches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch

from mhc_backends.kernels.plan import ITEMSIZE, Compute, Launch, Plan, Value
from mhc_core.sharding import Group, channel_axis
from mhc_torch.plans.host import DTYPES, Host, Launcher

__all__ = ["Replay", "items", "viewed"]

Tensor = torch.Tensor

ALIGNMENT = 256  # bytes, to which each part of the workspace is aligned


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


class Replay:
    """A plan on a device: takes its inputs, and returns its outputs and then what it saves.

    A saved value that is an output too is returned once; ``saved`` has the index of each among all
    that is returned, and ``outputs`` is the number of outputs.
    """

    def __init__(self, plan: Plan, host: Host, index: int) -> None:
        self._host, self._index = host, index
        returned = list(plan.outputs)
        for value in plan.saved:
            if not any(value is other for other in returned):
                returned.append(value)
        self.outputs = len(plan.outputs)
        self.saved = [
            next(k for k, other in enumerate(returned) if other is value) for value in plan.saved
        ]
        layout = _Layout(plan, returned, host.shared_workspace)
        self._made = layout.made
        self._results: list[None] = [None] * layout.computed
        self._steps = _steps(plan, host, index, layout)
        views = [layout.view(value) for value in returned]
        # a result is the caller's alone: not an input, nor another result
        shared = [one[0] < plan.inputs or one in views[:k] for k, one in enumerate(views)]
        self._returned = [(*one, copied) for one, copied in zip(views, shared, strict=True)]
        whole = all(view is None for _, view in views) and not any(shared)
        places = [place for place, _ in views]
        self._take = items(places) if whole else self._results_of
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
        host, index, made, take = self._host, self._index, self._made, self._take
        guard, empty = host.guard, host.empty
        launch: Any = self._steps[0] if self._steps else None

        def run(held: list[Any]) -> Sequence[Tensor]:
            if (context := guard(index)) is not None:
                with context:
                    return run(held)
            for one in made:
                held.append(empty(*one))
            if launch is not None:
                launch(held)
            return take(held)

        return run

    def _results_of(self, held: list[Any]) -> Sequence[Tensor]:
        results = [(viewed(held[place], view), copied) for place, view, copied in self._returned]
        return [result.clone() if copied else result for result, copied in results]

    def _run_in_turn(self, held: list[Any]) -> Sequence[Tensor]:
        """Run a plan in which PyTorch's own functions compute some values between launches."""
        if (context := self._host.guard(self._index)) is not None:
            with context:
                return self._run_in_turn(held)
        held += [self._host.empty(*one) for one in self._made]
        held += self._results
        for step in self._steps:
            if isinstance(step, (_Computed, _AllReduce)):
                step.run(held)
            else:
                step(held)
        return self._take(held)


def items(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes these items of a sequence."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def viewed(tensor: Tensor, view: tuple[Any, ...] | None) -> Tensor:
    """Return the part of a tensor that a view names, by its shape, strides and offset."""
    if view is None:
        return tensor
    shape, strides, offset = view
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


# ---- what is decided once ------------------------------------------------------------------------


class _Layout:
    """The place of every buffer in the list of a call's tensors.

    First the inputs, then the tensors that the call makes, then the results of PyTorch's own steps.
    The last tensor that a call makes is the workspace, which holds all buffers that only launches
    see, unless the host wants a tensor for each of these.
    """

    def __init__(self, plan: Plan, returned: Sequence[Value], shared_workspace: bool) -> None:
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
        room = 0
        inside: list[int] = []
        for number, buffer in enumerate(plan.buffers):
            self._shape[number] = tuple(buffer.shape)
            if buffer.constant is not None:
                self.constants[number] = buffer.constant
            elif number < plan.inputs or number in results:
                continue
            elif number in seen or not shared_workspace:
                shape = self._shape[number] = tuple(map(int, shapes.get(number, buffer.shape)))
                self._place[number] = plan.inputs + len(self.made)
                self.made.append((shape, _strides(shape), DTYPES[buffer.dtype]))
            else:
                inside.append(number)
                self._offset[number] = room
                size = math.prod(buffer.shape) * ITEMSIZE[buffer.dtype]
                room += -(-size // ALIGNMENT) * ALIGNMENT
        self._place |= dict.fromkeys(inside, plan.inputs + len(self.made))
        if room:
            self.made.append(((room,), (1,), torch.uint8))
        after = plan.inputs + len(self.made)
        self._place |= {number: after + k for k, number in enumerate(results)}
        self.computed = len(results)
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


def _steps(
    plan: Plan, host: Host, index: int, layout: _Layout
) -> list[_Computed | _AllReduce | Launcher]:
    """Return PyTorch's own steps, and a function for each run of launches between them."""
    parts: list[list[Launch]] = []
    order: list[_Computed | _AllReduce | None] = []  # None for the next part
    for step in plan.steps:
        if isinstance(step, Compute) and step.kind == "all_reduce":
            last = order[-1] if order else None
            if isinstance(last, _AllReduce):  # sums do not wait for one another
                order.pop()
            readers, places = last if isinstance(last, _AllReduce) else ((), ())
            read, place = _reader(step.arguments[0], layout), layout.place(step.out)[0]
            order.append(_AllReduce((*readers, read), (*places, place)))
        elif isinstance(step, Compute):
            order.append(_Computed(_compute(step, layout), layout.place(step.out)[0]))
        elif order and order[-1] is None:
            parts[-1].append(step)
        else:
            parts.append([step])
            order.append(None)
    launchers = iter(host.launchers(parts, layout, index))
    return [next(launchers) if one is None else one for one in order]


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
    return lambda held: viewed(held[place], view)
