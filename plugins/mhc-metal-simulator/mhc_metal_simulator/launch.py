"""One simulated launch: the counterpart of MLX's custom kernel, on NumPy arrays."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mhc_metal_simulator.branches import Branch
from mhc_metal_simulator.compiler import compile_kernel
from mhc_metal_simulator.engine import (
    ALIGNMENT,
    MAX_THREADS,
    Argument,
    Library,
    Schedule,
    Traffic,
    Triple,
)
from mhc_metal_simulator.errors import KernelFaultError, LaunchError
from mhc_metal_simulator.source import Parameter, prepare

__all__ = ["LaunchRecord", "Options", "Output", "current_options", "options", "record", "simulate"]

HostArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Options:
    """The settings of launches.

    Attributes
    ----------
    schedules
        The orders of the threads: ``forward``, ``reversed``, ``random:SEED``. With several, each
        launch runs once per order, and the results must be equal bit for bit.
    unwritten
        ``"error"`` or ``"ignore"``: what to do about output elements that no thread stored.
    """

    schedules: tuple[str, ...] = ("forward",)
    unwritten: str = "error"

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("schedules is empty; name at least one, such as 'forward'")
        for name in self.schedules:
            Schedule.parse(name)
        if self.unwritten not in ("error", "ignore"):
            raise ValueError(f"unwritten is {self.unwritten!r}; it can be 'error' or 'ignore'")


_options: ContextVar[Options | None] = ContextVar("mhc_metal_simulator_options", default=None)


def current_options() -> Options:
    """Return the options in force: of ``with options(...)``, else of the environment."""
    chosen = _options.get()
    if chosen is not None:
        return chosen
    named = os.environ.get("MHC_SIMULATOR_SCHEDULES")
    return Options(tuple(named.split(","))) if named else Options()


@contextlib.contextmanager
def options(
    *, schedules: Sequence[str] | None = None, unwritten: str | None = None
) -> Generator[Options]:
    """Run the launches of this block, in this thread, with other :class:`Options`."""
    chosen = current_options()
    if schedules is not None:
        chosen = replace(chosen, schedules=tuple(schedules))
    if unwritten is not None:
        chosen = replace(chosen, unwritten=unwritten)
    token = _options.set(chosen)
    try:
        yield chosen
    finally:
        _options.reset(token)


# ---- records -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchRecord:
    """One launch: its kernel, its sizes and the bytes that it moved.

    Attributes
    ----------
    kernel, grid, threadgroup
        The arguments of the call.
    threadgroup_bytes
        The threadgroup memory that its text declares.
    traffic
        Of each buffer by name, shapes and strides included (their role is ``"metadata"``).
    shapes
        Of each input and output by name.
    source
        The text that MLX generated.
    branches, took
        Its choices (:mod:`mhc_metal_simulator.branches`), and these with the sides that any thread
        took.
    """

    kernel: str
    grid: Triple
    threadgroup: Triple
    threadgroup_bytes: int
    traffic: dict[str, Traffic] = field(repr=False)
    source: str = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    branches: tuple[Branch, ...] = field(default=(), repr=False)
    took: frozenset[tuple[Branch, str]] = field(default=frozenset(), repr=False)

    @property
    def loaded(self) -> int:
        """Return the bytes loaded from inputs and outputs."""
        return sum(t.loaded for t in self.traffic.values() if t.role != "metadata")

    @property
    def stored(self) -> int:
        """Return the bytes stored to outputs."""
        return sum(t.stored for t in self.traffic.values())


_recorders: list[list[LaunchRecord]] = []
_recorders_lock = threading.Lock()


@contextlib.contextmanager
def record() -> Generator[list[LaunchRecord]]:
    """Collect a :class:`LaunchRecord` per launch, of any thread, while the block runs.

    A launch counts once however many schedules it runs under.
    """
    records: list[LaunchRecord] = []
    with _recorders_lock:
        _recorders.append(records)
    try:
        yield records
    finally:
        with _recorders_lock:
            # By identity: two recorders with the same records are equal as lists.
            _recorders[:] = [other for other in _recorders if other is not records]


# ---- launching -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """An output to make: its name, shape and NumPy dtype, and its initial value."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    init_value: float | None = None


_libraries: dict[tuple[str, str], Library] = {}
_libraries_lock = threading.Lock()


def _library(name: str, source: str) -> Library:
    key = (name, source)
    with _libraries_lock:
        found = _libraries.get(key)
    if found is None:
        prepared = prepare(source, name)
        loaded = Library.load(prepared, compile_kernel(prepared))
        with _libraries_lock:
            found = _libraries.setdefault(key, loaded)
    return found


def simulate(
    name: str,
    source: str,
    inputs: dict[str, HostArray],
    outputs: Sequence[Output],
    grid: Triple,
    threadgroup: Triple,
    offsets: Mapping[str, int] | None = None,
) -> list[HostArray]:
    """Run the kernel whose generated text is ``source`` and return its outputs.

    Inputs may be strided; the kernel gets a pointer to their first element and their strides. That
    pointer is ``offsets`` bytes after a multiple of 16, for inputs that are named there.

    Raises
    ------
    CompileError, LaunchError, KernelFaultError
        If a compiler, Metal or a detector refuses it.
    """
    _check_threads(name, threadgroup)
    library = _library(name, source)
    # As MLX dispatches: a threadgroup no larger than the grid.
    group = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
    chosen = current_options()
    results: list[HostArray] = []
    for i, schedule in enumerate(map(Schedule.parse, chosen.schedules)):
        arguments = [_argument(p, inputs, outputs, offsets or {}) for p in library.prepared.buffers]
        traffic, written, marks = library.launch(
            name, arguments, grid, (group[0], group[1], group[2]), schedule
        )
        made = _outputs_of(arguments, outputs)
        if i == 0:
            results = made
            choices = library.prepared.branches
            size, took = library.threadgroup_bytes, _sides(choices, marks)
            shapes = {name: array.shape for name, array in inputs.items()}
            shapes |= {output.name: output.shape for output in outputs}
            done = LaunchRecord(
                name, grid, threadgroup, size, traffic, source, shapes, choices, took
            )
            _record(done)
            if chosen.unwritten == "error":
                _require_written(name, outputs, written)
        else:
            _require_equal(name, outputs, results, made, chosen.schedules[0], schedule.name)
    return results


def _sides(
    branches: Sequence[Branch], marks: npt.NDArray[np.uint8]
) -> frozenset[tuple[Branch, str]]:
    taken = zip(branches, marks.tolist(), strict=False)
    return frozenset((branch, side) for branch, mark in taken for side in branch.sides(mark))


def _check_threads(name: str, threadgroup: Triple) -> None:
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > MAX_THREADS:
        raise LaunchError(
            f"kernel '{name}': threadgroup {threadgroup} has {threads} threads; Metal runs at most "
            f"{MAX_THREADS}"
        )


def _record(done: LaunchRecord) -> None:
    with _recorders_lock:
        for records in _recorders:
            records.append(done)


# ---- buffers -------------------------------------------------------------------------------------


def _argument(
    parameter: Parameter,
    inputs: dict[str, HostArray],
    outputs: Sequence[Output],
    offsets: Mapping[str, int],
) -> Argument:
    for output in outputs:
        if output.name == parameter.name:
            return _output_argument(output)
    if parameter.name in inputs:
        array, offset = inputs[parameter.name], offsets.get(parameter.name, 0)
        return _input_argument(parameter.name, array, offset)
    name, _, what = parameter.name.rpartition("_")
    about: dict[str, Callable[[HostArray], npt.NDArray[Any]]] = {
        "shape": lambda a: np.asarray(a.shape, np.int32),
        "strides": lambda a: np.asarray([s // a.itemsize for s in a.strides], np.int64),
        "ndim": lambda a: np.asarray([a.ndim], np.int32),
    }
    values = about[what](inputs[name])
    return Argument(parameter.name, values.view(np.uint8), values.itemsize, role="metadata")


def _input_argument(name: str, array: HostArray, offset: int) -> Argument:
    """Return the memory that a strided array spans, as an argument."""
    if array.size == 0:
        return Argument(name, np.zeros(0, np.uint8), array.itemsize)
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    low, high = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
    first = array.__array_interface__["data"][0]
    data = np.frombuffer(ctypes.string_at(first + low, high - low + array.itemsize), np.uint8)
    return Argument(name, data, array.itemsize, start=-low, skew=(offset + low) % ALIGNMENT)


def _output_argument(output: Output) -> Argument:
    size = int(np.prod(output.shape, dtype=np.int64)) * output.dtype.itemsize
    if output.init_value is None:
        data = np.full(size, 0xFF, np.uint8)  # NaN in every floating type
    else:
        data = np.full(output.shape, output.init_value, output.dtype).reshape(-1).view(np.uint8)
    given = output.init_value is not None
    return Argument(output.name, data, output.dtype.itemsize, role="output", initialised=given)


def _outputs_of(arguments: list[Argument], outputs: Sequence[Output]) -> list[HostArray]:
    by_name = {argument.name: argument.data for argument in arguments}
    return [by_name[o.name].view(o.dtype).reshape(o.shape) for o in outputs]


# ---- checks on results ---------------------------------------------------------------------------


def _require_written(
    name: str, outputs: Sequence[Output], written: dict[str, npt.NDArray[np.bool_]]
) -> None:
    for output in outputs:
        if output.init_value is not None or written[output.name].all():
            continue
        elements = written[output.name].reshape(-1, output.dtype.itemsize).all(axis=1)
        first = int(np.argmin(elements))
        index = tuple(int(i) for i in np.unravel_index(first, output.shape))
        raise KernelFaultError(
            f"kernel '{name}': output '{output.name}' has {elements.size} elements, and "
            f"{int((~elements).sum())} of them are never written, the first at {index}",
            kind="unwritten-output",
            kernel=name,
            array=output.name,
            offset=first * output.dtype.itemsize,
        )


def _require_equal(
    name: str,
    outputs: Sequence[Output],
    expected: list[HostArray],
    received: list[HostArray],
    first_schedule: str,
    schedule: str,
) -> None:
    for output, one, other in zip(outputs, expected, received, strict=True):
        unequal = one.reshape(-1).view(np.uint8) != other.reshape(-1).view(np.uint8)
        if unequal.any():
            offset = int(np.argmax(unequal))
            raise KernelFaultError(
                f"kernel '{name}': output '{output.name}' depends on the order of the threads: it "
                f"differs at offset {offset} between the schedules {first_schedule!r} and "
                f"{schedule!r}",
                kind="order-dependent",
                kernel=name,
                array=output.name,
                offset=offset,
            )
