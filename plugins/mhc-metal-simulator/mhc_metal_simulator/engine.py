"""A loader of compiled kernels, which runs grids of threads on NumPy buffers."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mhc_metal_simulator.branches import MOST
from mhc_metal_simulator.errors import LaunchError
from mhc_metal_simulator.faults import Array, explain
from mhc_metal_simulator.source import Prepared

__all__ = [
    "ALIGNMENT",
    "MAX_BUFFERS",
    "MAX_THREADGROUP_BYTES",
    "MAX_THREADS",
    "Argument",
    "Library",
    "Schedule",
    "Traffic",
    "Triple",
]

MAX_THREADS = 1024
MAX_BUFFERS = 31
MAX_THREADGROUP_BYTES = 32 * 1024
_MAX_SHARED = 128  # MAX_SHARED of runtime/memory.h
ALIGNMENT = 16  # of the widest vector in memory
_PAGE = 4096
_GAP = 1 << 20  # unused addresses around each buffer; costs no memory
_STACK = 256 * 1024
_MAP_NORESERVE = 0x4000  # Linux; the mmap module has had it since Python 3.13 only
_CELL = np.dtype([("bytes", "u1", (24,))])  # struct Cell of runtime/abi.h

Bytes = npt.NDArray[np.uint8]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Schedule:
    """An order in which threads and threadgroups take turns."""

    name: str
    order: int
    seed: int

    @classmethod
    def parse(cls, name: str) -> Schedule:
        """Read ``forward``, ``reversed``, ``random`` or ``random:SEED``."""
        word, _, seed = name.partition(":")
        orders = {"forward": 0, "reversed": 1, "random": 2}
        if word not in orders or (seed and (word != "random" or not seed.isdigit())):
            raise ValueError(
                f"schedule is {name!r}; it can be 'forward', 'reversed' or 'random:SEED'"
            )
        return cls(name, orders[word], int(seed or 0))


@dataclass
class Argument:
    """One buffer of a launch.

    Attributes
    ----------
    name
        Its name in the kernel's text.
    data
        Its bytes. For an output, its content before the launch, which the launch changes.
    itemsize
        The bytes of an element.
    start
        The position in ``data`` of the kernel's pointer (not 0 for arrays with negative strides).
    role
        ``"input"``, ``"output"`` or ``"metadata"`` (shapes and strides).
    initialised
        Whether an output may be read before it is written, and may stay unwritten.
    skew
        How many bytes after a multiple of 16 ``data`` begins in memory.
    """

    name: str
    data: Bytes
    itemsize: int
    start: int = 0
    role: str = "input"
    initialised: bool = True
    skew: int = 0


@dataclass(frozen=True)
class Traffic:
    """The bytes of one buffer that a launch moved: in all, and each byte counted once."""

    role: str
    size: int
    loaded: int
    stored: int
    loaded_unique: int
    stored_unique: int


# ---- the structs of runtime/abi.h ----------------------------------------------------------------


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("pointer", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("element_shift", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("loaded_bits", ctypes.c_void_p),
        ("stored_bits", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
        ("loaded", ctypes.c_uint64),
        ("stored", ctypes.c_uint64),
        ("loaded_unique", ctypes.c_uint64),
        ("stored_unique", ctypes.c_uint64),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("space", ctypes.c_uint32),
        ("array", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("offset", ctypes.c_int64),
        ("write", ctypes.c_uint32),
        ("other_write", ctypes.c_uint32),
        ("group", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32),
        ("other", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("column", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("other_finished", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("text", ctypes.c_char_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint64),
        ("arena", ctypes.c_void_p),
        ("arena_size", ctypes.c_uint64),
        ("page_owner", ctypes.c_void_p),
        ("stacks", ctypes.c_void_p),
        ("stack_size", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("marks", ctypes.c_void_p),
        ("fault", _Fault),
    )


class _SharedArray(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("size", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    )


# ---- memory for a launch -------------------------------------------------------------------------


class _Stacks:
    """The fibers' stacks, lent to one launch after another."""

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, MAX_THREADS * _STACK, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        protect = ctypes.CDLL(None).mprotect
        for i in range(MAX_THREADS):  # a page without access below each stack
            protect(ctypes.c_void_p(self.address + i * _STACK), ctypes.c_size_t(_PAGE), 0)


_idle_stacks: list[_Stacks] = []
_stacks_lock = threading.Lock()


@contextlib.contextmanager
def _stacks() -> Generator[_Stacks]:
    with _stacks_lock:
        stacks = _idle_stacks.pop() if _idle_stacks else _Stacks()
    try:
        yield stacks
    finally:
        with _stacks_lock:
            _idle_stacks.append(stacks)


@dataclass
class _Arena:
    """All buffers of a launch in one range of addresses, with gaps between them."""

    memory: mmap.mmap
    address: int
    size: int
    starts: list[int]
    owner: npt.NDArray[np.uint16]

    @classmethod
    def holding(cls, arguments: list[Argument]) -> _Arena:
        starts: list[int] = []
        at = _GAP
        for argument in arguments:
            starts.append(at + argument.skew)
            at += -(-(argument.skew + argument.data.size) // _PAGE) * _PAGE + _GAP
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        memory = mmap.mmap(-1, at, flags=flags)
        owner = np.zeros(at // _PAGE, np.uint16)
        for i, start in enumerate(starts):
            owner[(start - _GAP // 2) // _PAGE :] = i
        view = np.frombuffer(memory, np.uint8)
        for start, argument in zip(starts, arguments, strict=True):
            view[start : start + argument.data.size] = argument.data
        return cls(memory, view.ctypes.data, at, starts, owner)

    def bytes_of(self, i: int, size: int) -> Bytes:
        return np.frombuffer(self.memory, np.uint8, size, self.starts[i])


@dataclass
class _Shadow:
    """The record of one buffer's loads and stores while a launch runs."""

    loaded: npt.NDArray[np.uint64]
    stored: npt.NDArray[np.uint64]
    cells: npt.NDArray[Any]

    @classmethod
    def of(cls, argument: Argument) -> _Shadow:
        words = argument.data.size // 64 + 1
        writable = argument.role == "output"
        elements = -(-argument.data.size // argument.itemsize) if writable else 0
        return cls(
            np.zeros(words, np.uint64), np.zeros(words, np.uint64), np.zeros(elements, _CELL)
        )

    def stored_bytes(self, size: int) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self.stored.view(np.uint8), bitorder="little")[:size].astype(np.bool_)


# ---- libraries -----------------------------------------------------------------------------------


@dataclass
class Library:
    """A compiled kernel in memory. One launch at a time runs in it."""

    prepared: Prepared
    path: Path
    shared: tuple[Array, ...] = ()
    _handle: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, prepared: Prepared, path: Path) -> Library:
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)  # expf and its like
        handle = ctypes.CDLL(str(path))
        count = ctypes.c_uint64()
        handle.mhc_shared_arrays.restype = ctypes.POINTER(_SharedArray)
        found = handle.mhc_shared_arrays(ctypes.byref(count))
        handle.mhc_launch.argtypes = [ctypes.POINTER(_Launch)]
        shared = tuple(
            Array(found[i].name.decode(), int(found[i].size)) for i in range(count.value)
        )
        return cls(prepared, path, shared, handle)

    @property
    def threadgroup_bytes(self) -> int:
        return sum(array.size for array in self.shared)

    def launch(
        self, name: str, arguments: list[Argument], grid: Triple, group: Triple, schedule: Schedule
    ) -> tuple[dict[str, Traffic], dict[str, npt.NDArray[np.bool_]], npt.NDArray[np.uint8]]:
        """Run the grid. Outputs change in place.

        Returns
        -------
        The traffic of each buffer, for each output which of its bytes the kernel stored, and the
        marks of its branches.
        """
        self.check_limits(name, grid, group)
        arena = _Arena.holding(arguments)
        shadows = [_Shadow.of(argument) for argument in arguments]
        buffers = (_Buffer * len(arguments))()
        for i, (argument, shadow) in enumerate(zip(arguments, shadows, strict=True)):
            buffers[i] = _buffer(argument, arena.address + arena.starts[i], shadow)
        marks = np.zeros(MOST, np.uint8)
        with _stacks() as stacks, self._lock:
            launch = _Launch(
                buffers=buffers,
                buffer_count=len(arguments),
                arena=arena.address,
                arena_size=arena.size,
                page_owner=arena.owner.ctypes.data,
                stacks=stacks.address,
                stack_size=_STACK,
                grid=(ctypes.c_uint32 * 3)(*grid),
                group=(ctypes.c_uint32 * 3)(*group),
                order=schedule.order,
                seed=schedule.seed,
                marks=marks.ctypes.data,
            )
            failed = self._handle.mhc_launch(ctypes.byref(launch))
        if failed:
            arrays = [Array(a.name, a.data.size) for a in arguments]
            raise explain(launch.fault, name, self, arrays, grid, group)
        written: dict[str, npt.NDArray[np.bool_]] = {}
        for i, argument in enumerate(arguments):
            if argument.role == "output":
                argument.data[:] = arena.bytes_of(i, argument.data.size)
                written[argument.name] = shadows[i].stored_bytes(argument.data.size)
        moved = {a.name: _traffic(a, b) for a, b in zip(arguments, buffers, strict=True)}
        return moved, written, marks

    def check_limits(self, name: str, grid: Triple, group: Triple) -> None:
        """Refuse what Metal refuses before any thread runs."""
        if any(extent < 1 for extent in (*grid, *group)):
            raise LaunchError(
                f"kernel '{name}': grid {grid} in threadgroups of {group} has no threads; "
                "skip the launch where there is nothing to do"
            )
        if len(self.prepared.buffers) > MAX_BUFFERS:
            raise LaunchError(
                f"kernel '{name}': {len(self.prepared.buffers)} buffers, shapes and strides "
                f"included; Metal has {MAX_BUFFERS}"
            )
        if len(self.shared) >= _MAX_SHARED:
            raise LaunchError(f"kernel '{name}': more than {_MAX_SHARED - 1} threadgroup arrays")
        if self.threadgroup_bytes > MAX_THREADGROUP_BYTES:
            arrays = ", ".join(f"{a.name} {a.size}" for a in self.shared)
            raise LaunchError(
                f"kernel '{name}': {self.threadgroup_bytes} bytes of threadgroup memory "
                f"({arrays}); Metal has {MAX_THREADGROUP_BYTES}"
            )


def _buffer(argument: Argument, address: int, shadow: _Shadow) -> _Buffer:
    return _Buffer(
        data=address,
        pointer=address + argument.start,
        size=argument.data.size,
        element_shift=argument.itemsize.bit_length() - 1,
        writable=argument.role == "output",
        initialised=argument.initialised,
        loaded_bits=shadow.loaded.ctypes.data,
        stored_bits=shadow.stored.ctypes.data,
        cells=shadow.cells.ctypes.data,
    )


def _traffic(argument: Argument, buffer: _Buffer) -> Traffic:
    return Traffic(
        argument.role,
        argument.data.size,
        buffer.loaded,
        buffer.stored,
        buffer.loaded_unique,
        buffer.stored_unique,
    )
