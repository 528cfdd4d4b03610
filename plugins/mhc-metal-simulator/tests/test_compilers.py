"""The two ways to find a compiler, and the cache of compiled kernels."""

from __future__ import annotations

import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator
from mhc_metal_simulator import compiler, launch
from mhc_metal_simulator.compiler import cache_folder, find_compiler
from mhc_metal_simulator.source import Prepared


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Start with an empty cache, no library in memory, and no compiler chosen."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MHC_SIMULATOR_CACHE", str(folder))
    monkeypatch.setattr(launch, "_libraries", {})
    find_compiler.cache_clear()
    yield folder
    find_compiler.cache_clear()


SOURCE = """
    threadgroup T x[40];
    const uint t = thread_index_in_threadgroup;
    vec<T, 4> v = vec<T, 4>(a[t], T(1), T(2), T(3));
    x[t] = v.x + T(0.1f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[t] = float(x[39 - t]) + precise::exp(0.0f) + simd_sum(1.0f);
"""


@pytest.mark.parametrize("which", ["system", "ziglang"])
def test_each_compiler(run: Run, fresh: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    import mlx.core as mx

    if which == "ziglang":
        pytest.importorskip("ziglang")
        monkeypatch.setenv("MHC_SIMULATOR_CLANG", "ziglang")
    else:
        names = ["clang", *(f"clang-{version}" for version in range(30, 17, -1))]
        found = next((n for n in names if shutil.which(n) and _is_recent(n)), None)
        if found is None:
            pytest.skip("no clang of version 18 or later on this machine")
        monkeypatch.setenv("MHC_SIMULATOR_CLANG", found)
    launch_: dict[str, Any] = {"shape": (40,), "grid": (40,), "group": (40,)}
    for kind in (mx.float32, mx.float16, mx.bfloat16):
        a = mx.arange(40).astype(kind)
        got = run(SOURCE, [a], template=[("T", kind)], **launch_)
        x = np.array((a + mx.array(0.1, kind)).astype(mx.float32))[::-1]
        np.testing.assert_array_equal(
            got, x + np.float32(1) + np.where(np.arange(40) < 32, 32, 8).astype(np.float32)
        )
        with pytest.raises(simulator.KernelFaultError) as caught:
            run(
                SOURCE.replace("mem_threadgroup", "mem_none"),
                [a],
                template=[("T", kind)],
                **launch_,
            )
        assert caught.value.kind in ("race", "unwritten-read")
        assert "x[39 - t]" in str(caught.value)
        with pytest.raises(simulator.CompileError, match="address spaces"):
            run("o[0] = ((const constant T*)a)[0];", [a], template=[("T", kind)])


def _is_recent(name: str) -> bool:
    return compiler._system_clang(name) is not None  # pyright: ignore[reportPrivateUsage]


def test_an_unknown_compiler_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_SIMULATOR_CLANG", "no-such-clang")
    with pytest.raises(simulator.SimulatorUnavailableError, match="no-such-clang"):
        find_compiler()


def test_without_any_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHC_SIMULATOR_CLANG", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(compiler, "_zig", lambda: None)
    with pytest.raises(simulator.SimulatorUnavailableError, match="pip install ziglang"):
        find_compiler()


# ---- the cache ----------------------------------------------------------------------------------


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def test_compiled_once_per_text(run: Run, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    real = compiler._build  # pyright: ignore[reportPrivateUsage]

    def counting(*arguments: Any) -> Path:
        built.append("")
        return real(*arguments)

    monkeypatch.setattr(compiler, "_build", counting)
    assert run("o[0] = 1;") == 1
    assert run("o[0] = 1;") == 1
    monkeypatch.setattr(launch, "_libraries", {})  # as in another process
    assert run("o[0] = 1;") == 1
    assert len(built) == 1
    assert run("o[0] = 2;") == 2
    assert len(built) == 2
    assert len(libraries(fresh)) == 2
    assert all(re.fullmatch(r"[0-9a-f]{40}\.so", path.name) for path in libraries(fresh))


def test_the_cache_is_private(run: Run, fresh: Path) -> None:
    run("o[0] = 1;")
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    fresh.chmod(0o755)
    with pytest.raises(simulator.SimulatorError, match="open to others"):
        cache_folder()


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [halved, flipped, emptied])
def test_what_is_damaged_is_compiled_again(
    run: Run, fresh: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    """Check damaged entries: loading a truncated library would end the process with a bus error."""
    assert run("o[0] = 3;") == 3
    entries = sorted(fresh.iterdir())
    assert sorted(path.suffix for path in entries) == [".o", ".so"]
    sizes = [path.stat().st_size for path in entries]
    for path in entries:
        content = path.read_bytes()
        path.unlink()  # the process has the old file mapped
        path.write_bytes(content)
        damage(path)
    damaged = [path.read_bytes() for path in entries]

    def compiled(prepared: Prepared) -> Path:
        library = compiler.compile_kernel(prepared)
        assert [path.stat().st_size for path in entries] == sizes
        assert all(path.read_bytes() != d for path, d in zip(entries, damaged, strict=True))
        return library

    monkeypatch.setattr(launch, "_libraries", {})
    monkeypatch.setattr(launch, "compile_kernel", compiled)
    assert run("o[0] = 3;") == 3


def test_nothing_half_done_is_left(run: Run, fresh: Path) -> None:
    with pytest.raises(simulator.CompileError):
        run("o[0] = nothing;")
    assert [path.suffix for path in fresh.iterdir()] == [".o"]  # the runtime alone


def test_two_threads_compile_one_kernel(run: Run, fresh: Path) -> None:
    got: list[Any] = []
    workers = [
        threading.Thread(target=lambda: got.append(run("o[0] = 5;").item())) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [5, 5, 5, 5]
    assert len(libraries(fresh)) == 1
