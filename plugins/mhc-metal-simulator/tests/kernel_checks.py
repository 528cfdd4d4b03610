"""The shared part of the kernels' tests: small threadgroups, comparisons, and seeded faults."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends import kernels
from mhc_backends.kernels import launch as launches
from mhc_backends.kernels import program as programs
from mhc_backends.kernels import text as texts
from mhc_conformance import Subject, check

from mhc_metal_simulator.coverage import Coverage, Ran, covered
from mhc_metal_simulator.launch import LaunchRecord

BACKEND = "mlx-metal-simulator"


@contextlib.contextmanager
def cramped() -> Iterator[None]:
    """Make threadgroups few and small, so that each has many tokens, accesses and shares."""
    small = {name: replace(shape, threads=32) for name, shape in launches.TABLE.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "TABLE", small)
        patch.setattr(launches, "MOST_GRID", 64)
        patch.setattr(launches, "FILLED", 1)
        patch.setattr(launches, "ROWS", 8)
        patch.setattr(launches, "SHARES", 2)
        yield


Unit = tuple[str, str, str]
"""An op, a dtype and a check of the kit."""


def keep_coverage(folder: Path, unit: Unit, ran: Sequence[LaunchRecord]) -> None:
    """Store what a check's launches covered, whole or not at all."""
    op, dtype, kind = unit
    entry = _entry(folder, unit)
    entry.parent.mkdir(exist_ok=True)
    part = entry.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(covered(Ran(op, dtype, f"the check {kind}"), ran)))
    part.replace(entry)


def kept_coverage(folder: Path, unit: Unit) -> Coverage | None:
    """Return what a check covered if it ran in this run of pytest, in whatever worker."""
    entry = _entry(folder, unit)
    return pickle.loads(entry.read_bytes()) if entry.exists() else None


def _entry(folder: Path, unit: Unit) -> Path:
    return folder / "coverage" / "-".join(unit)


def agree(got: Sequence[mx.array], want: Sequence[mx.array]) -> None:
    """Compare with mlx-compiled, which the kit compares with the oracle."""
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        size = mx.max(mx.abs(other.astype(mx.float32))).item()
        off = mx.max(mx.abs(one.astype(mx.float32) - other.astype(mx.float32))).item()
        narrow = {mx.float32: 0.0, mx.float16: 2**-10, mx.bfloat16: 2**-7}
        assert off <= (2e-6 + narrow[one.dtype]) * size, f"is off by {off / size:.2g}"


def hold_by_the_kit(op: str) -> None:
    """Run the kit in the dtype and the checks that see most."""
    for kind in ("forward", "gradient"):
        record = check(Subject(BACKEND), op, "float32", kind)
        assert record.passed, record.detail


# ---- seeded faults -------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A slip in a copy of a kernel, or of what kernels share, and how it shows."""

    kernel: str  # or "common": all that kernels share
    what: str
    right: str
    wrong: str
    shows: str
    op: str = "combine"


WRONG = "is off by"
RACE = r"\(race\)|nothing was written before"
BOUNDS = r"out of bounds|\(race\)"  # beyond a row is the next one, which another thread stores
SPACE = "CompileError|address space|cannot cast from type 'Aligned|no matching function|no viable"


@contextlib.contextmanager
def seeded(fault: Fault) -> Iterator[None]:
    """Put a fault into the kernels' headers; white space in it is any white space there."""
    tokens = re.findall(r"\w+|[^\w\s]", fault.right)
    right = re.compile(r"\s*".join(map(re.escape, tokens)))
    read: Callable[[str], str] = vars(texts)["_read"]
    folders = ("common/", "metal/") if fault.kernel == "common" else (f"bodies/{fault.kernel}.h",)
    files = [path for path in headers() if path.startswith(folders)]
    assert any(right.search(read(path)) for path in files), "the kernel has changed: seed it anew"

    def slip(path: str) -> str:
        text = read(path)
        return right.sub(lambda _: fault.wrong, text) if path in files else text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_read", slip)
        forget()
        try:
            yield
        finally:
            forget()


def headers() -> list[str]:
    """Return the paths of all headers."""
    folder = Path(kernels.__file__).parent
    return [str(path.relative_to(folder)) for path in folder.glob("**/*.h")]


def forget() -> None:
    """Have the texts made anew."""
    for module in (texts, programs):
        for made in vars(module).values():
            if hasattr(made, "cache_clear"):
                made.cache_clear()


def assert_all_are_seeded(faults: Sequence[Fault], names: Sequence[str]) -> None:
    """Check that each kernel has a wrong tail, index and sum, and, with barriers, a missing one."""
    for kernel in names:
        kinds = {fault.what.split()[-1] for fault in faults if fault.kernel == kernel}
        missing = sorted({"tail", "index", "sum"} - kinds)
        assert not missing, f"{kernel}: no FAULTS are seeded of the kind {', '.join(missing)}"
        body = texts.flat("metal", f"bodies/{kernel}.h").partition(f"void {kernel}(")[2]
        # those within a simdgroup order nothing where each lane takes its own copies
        assert not re.search(r"\bBARRIER;", body) or "barrier" in " ".join(
            fault.what for fault in faults if fault.kernel == kernel
        ), f"{kernel}: no FAULTS are seeded of the kind barrier"
