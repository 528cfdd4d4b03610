"""The sentences for the faults that the runtime finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mhc_metal_simulator.errors import KernelFaultError
from mhc_metal_simulator.lines import line_of
from mhc_metal_simulator.source import Prepared

__all__ = ["Array", "explain"]

# In the order of enum FaultKind in runtime/abi.h.
_KINDS = (
    "none",
    "out-of-bounds",
    "misaligned",
    "race",
    "unwritten-read",
    "divergence",
    "wild-access",
    "index",
    "division",
    "input-written",
    "missing-lane",
)
_NOBODY = 0xFFFF
_OPERATIONS = ("threadgroup_barrier", "simdgroup_barrier", "simd operation")


@dataclass(frozen=True)
class Array:
    """A buffer or a threadgroup array: its name and its size in bytes."""

    name: str
    size: int


class Fault(Protocol):
    """The fields of ``struct Fault`` of runtime/abi.h that the sentences need."""

    kind: int
    space: int
    array: int
    size: int
    offset: int
    write: int
    other_write: int
    group: Sequence[int]
    thread: int
    other: int
    line: int
    other_line: int
    other_finished: int
    address: int
    text: bytes


class _Library(Protocol):
    @property
    def prepared(self) -> Prepared: ...
    @property
    def path(self) -> Path: ...
    @property
    def shared(self) -> tuple[Array, ...]: ...


@dataclass(frozen=True)
class _Scene:
    """The facts that the sentences are made of."""

    fault: Fault
    kernel: str
    array: Array | None
    extent: tuple[int, ...]

    @property
    def place(self) -> str:
        if self.array is None:
            return f"address {self.fault.offset & (1 << 64) - 1:#x}, which no argument of it has"
        what = "buffer" if self.fault.space == 1 else "threadgroup array"
        return f"offset {self.fault.offset} of {what} '{self.array.name}' ({self.array.size} bytes)"

    @property
    def access(self) -> str:
        verb = "stores" if self.fault.write else "loads"
        return f"{verb} {self.fault.size} bytes at {self.place}"

    def position(self, thread: int) -> tuple[int, int, int]:
        x, y, _ = self.extent
        return thread % x, thread // x % y, thread // (x * y)


def explain(
    fault: Fault,
    kernel: str,
    library: _Library,
    buffers: list[Array],
    grid: tuple[int, ...],
    group: tuple[int, ...],
) -> KernelFaultError:
    """Return the error to raise for a ``Fault`` of runtime/abi.h."""
    spaces: tuple[Sequence[Array], ...] = ((), buffers, library.shared)
    arrays = spaces[fault.space]
    array = arrays[fault.array] if arrays else None
    where = tuple(fault.group)
    left = (g - w * t for g, w, t in zip(grid, where, group, strict=True))
    extent = tuple(min(t, rest) for t, rest in zip(group, left, strict=True))
    scene = _Scene(fault, kernel, array, extent)
    kind = _KINDS[fault.kind]
    line = fault.line or line_of(library.path, fault.address, library.prepared.file)
    message = (
        f"kernel '{kernel}', thread {scene.position(fault.thread)} of threadgroup {where}: "
        f"{_SENTENCES[kind](scene)}{_quote(library.prepared, line)}"
    )
    return KernelFaultError(
        message,
        kind=kind,
        kernel=kernel,
        array=array.name if array else None,
        offset=fault.offset if array else None,
        line=line,
    )


def _quote(prepared: Prepared, line: int | None) -> str:
    lines = prepared.original.splitlines()
    if line is None or not 0 < line <= len(lines):
        return ""
    return f"\n  {prepared.file}:{line}: {lines[line - 1].strip()}"


def _race(scene: _Scene) -> str:
    verb = "stores" if scene.fault.other_write else "loads"
    kind = "device" if scene.fault.space == 1 else "threadgroup"
    if scene.fault.other == _NOBODY:
        return f"{scene.access}; a thread of another threadgroup {verb} there too (race)"
    return (
        f"{scene.access}; thread {scene.position(scene.fault.other)} {verb} there too, with no "
        f"barrier between them that orders {kind} memory (race)"
    )


def _divergence(scene: _Scene) -> str:
    fault = scene.fault
    waits = f"waits at a {_OPERATIONS[fault.size]}"
    other = f"thread {scene.position(fault.other)}"
    if fault.other_finished:
        return f"{waits} that {other} never reaches: it has returned"
    return f"{waits} that {other} does not reach: it waits at line {fault.other_line}"


def _index(scene: _Scene) -> str:
    return f"index {scene.fault.offset} is out of bounds of {scene.fault.text.decode()}"


_SENTENCES: dict[str, Callable[[_Scene], str]] = {
    "out-of-bounds": lambda s: f"{s.access}: out of bounds",
    "misaligned": lambda s: (
        f"{s.access}: misaligned, it needs an address divisible by {s.fault.size}"
    ),
    "race": _race,
    "unwritten-read": lambda s: f"{s.access}, where nothing was written before",
    "divergence": _divergence,
    "wild-access": lambda s: s.access,
    "index": _index,
    "division": lambda s: f"divides {s.fault.text.decode()} by zero, or beyond its range",
    "input-written": lambda s: f"{s.access}, which is an input",
    "missing-lane": lambda s: f"asks for lane {s.fault.size} of its simdgroup, where no thread is",
}
