"""The shared part of the kernels' tests: small threadgroups, comparisons, and seeded faults."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

import mhc_core as mhc
from mhc_backends import kernels
from mhc_backends.kernels import launch as launches
from mhc_backends.kernels import program as programs
from mhc_backends.kernels import table
from mhc_backends.kernels import text as texts
from mhc_conformance import Subject
from mhc_conformance.cases import declaration
from mhc_conformance.checks import comparisons

import mhc_metal_simulator as simulator
from mhc_metal_simulator.coverage import Coverage

BACKEND = "mlx-metal-simulator"


@contextlib.contextmanager
def cramped() -> Iterator[None]:
    """Make threadgroups few and small, so that each has many tokens, accesses and shares."""
    small = {name: replace(shape, threads=32) for name, shape in table.TABLE.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "TABLE", small)
        patch.setattr(launches, "MOST_GRID", 64)
        patch.setattr(launches, "FILLED", 1)
        patch.setattr(launches, "ROWS", 8)
        patch.setattr(launches, "SHARES", 2)
        for name, choose in _ALL_CHANNELS.items():
            patch.setattr(launches, name, functools.partial(_enough, choose))
        yield


_ALL_CHANNELS: dict[str, Callable[..., launches.Launch]] = {
    "_n_tiles": launches._n_tiles,  # pyright: ignore[reportPrivateUsage]
    "_gated_factors": launches._gated_factors,  # pyright: ignore[reportPrivateUsage]
}


def _enough(choose: Callable[..., launches.Launch], *arguments: Any) -> launches.Launch:
    """Launch at least one threadgroup for all of the channels, as these kernels need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "MOST_GRID", 2**31 - 1)
        return choose(*arguments)


def moved(array: mx.array, start: int) -> mx.array:
    """Return the array as a view that begins so many elements after the start of its buffer."""
    room = mx.concatenate([mx.zeros(start, array.dtype), array.reshape(-1)])
    mx.eval(room)
    return room[start:].reshape(array.shape)


Unit = tuple[str, str, str]
"""An op, a dtype and a check of the kit."""


def keep_coverage(folder: Path, unit: Unit, found: Coverage) -> None:
    """Store what a check covered, whole or not at all."""
    entry = _entry(folder, unit)
    entry.parent.mkdir(exist_ok=True)
    part = entry.with_suffix(f".{os.getpid()}")
    part.write_bytes(pickle.dumps(found))
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


Sizes = tuple[int, int, int]
"""Tokens, streams and channels."""

SIZES = [(1, 1, 7), (1, 5, 1), (5, 4, 8), (7, 3, 37), (33, 2, 5), (5, 9, 37), (3, 4, 520)]


def draw(op: str, sizes: Sizes, dtype: Any = mx.float32, shared: bool = False) -> list[mx.array]:
    """Draw normal numbers in the shapes that an op without phi declares; mappings are float32."""
    T, n, C = sizes
    size = {"...": T, "n": n, "C": C, "D": n * C}
    rng = np.random.default_rng(1)
    arrays: list[mx.array] = []
    for first, *others in declaration(op).patterns.values():
        words = others[0] if shared and others else first
        host = rng.normal(size=[size[word] for word in words]).astype(np.float32)
        arrays.append(mx.array(host).astype(mx.float32 if first[-1] == "n" else dtype))
    return arrays


def outputs(op: str, primals: list[mx.array], backend: str, **static: Any) -> list[mx.array]:
    made = getattr(mhc, op)(*primals, **static, backend=backend)
    return [made] if isinstance(made, mx.array) else list(made)


def cotangents(made: list[mx.array]) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(2), len(made))
    return [
        mx.random.normal(out.shape, key=key).astype(out.dtype)
        for out, key in zip(made, keys, strict=True)
    ]


def as_float64(arrays: list[mx.array]) -> list[Any]:
    return [np.array(array.astype(mx.float32)).astype(np.float64) for array in arrays]


def rounded(wide: Any, like: list[mx.array]) -> list[mx.array]:
    arrays: tuple[Any, ...] = wide if isinstance(wide, tuple) else (wide,)
    pairs = zip(arrays, like, strict=True)
    return [mx.array(array.astype(np.float32)).astype(one.dtype) for array, one in pairs]


def run(op: str, primals: list[mx.array], **static: Any) -> None:
    """Run an op and its vjp on the simulator, in two orders of the threads, and compare.

    The reference is NumPy in float64: in float32 other sums over many channels are less exact.
    """
    with simulator.options(schedules=["forward", "reversed"]):
        got = outputs(op, primals, BACKEND, **static)
        given = cotangents(got)
        gradients = list(mhc.vjp(op, primals, given, **static, backend=BACKEND))
    truth = getattr(mhc, op)(*as_float64(primals), **static, backend="numpy")
    agree(got, rounded(truth, got))
    assert [g.dtype for g in gradients] == [p.dtype for p in primals]
    truth = mhc.vjp(op, as_float64(primals), as_float64(given), **static, backend="numpy")
    agree(gradients, rounded(truth, gradients))


def hold_by_the_kit(op: str, *kinds: str) -> None:
    """Run the kit in the dtype and the checks that see most, up to the first failure."""
    for kind in kinds or ("forward", "gradient"):
        with contextlib.closing(comparisons(Subject(BACKEND), op, "float32", kind)) as every:
            passed = 0
            for one in every:
                assert one.passed, one.says
                passed += 1
        assert passed, f"{op} has no case"


# ---- seeded faults -------------------------------------------------------------------------------


class Fault(NamedTuple):
    """A slip in a copy of a kernel, or of what kernels share, and how it shows."""

    kernel: str  # or "common": all that kernels share
    what: str
    right: str
    wrong: str
    shows: str
    op: str = "combine"
    first: str = ""  # of the checks that are tried, the one that sees it


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
