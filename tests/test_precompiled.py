"""The header that g++ reads for MLX's CPU kernels, precompiled while the kit runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mhc_backends.mlx_compiled._precompiled import FLAGS, HEADER, hurried

INCLUDE = Path(mx.__file__).parent / "include"
on_cpu = mx.default_device().type == mx.DeviceType.cpu


@pytest.mark.skipif(not (on_cpu and shutil.which("g++")), reason="MLX calls no g++ here")
def test_gcc_takes_it_and_what_was_there_comes_back(tmp_path: Path) -> None:
    before = os.environ["PATH"]
    source = tmp_path / "kernel.cpp"
    source.write_text(f'#include "{HEADER}"\nextern "C" float twice(float v) {{ return 2 * v; }}\n')
    # what MLX runs; -H names what is read, a precompiled header after "!"
    command = ["g++", "-H", *FLAGS.split(), "-I", str(INCLUDE), str(source), "-o", "kernel.so"]

    def read() -> list[str]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return [line for line in done.stderr.splitlines() if line.startswith("! ")]

    with hurried():
        wrapper = Path(shutil.which("g++") or "")
        made = wrapper.parent / f"{HEADER}.gch"
        source_of = [sys.executable, "-c", "import shutil; print(shutil.which('g++'))"]
        assert subprocess.check_output(source_of, text=True).strip() == str(wrapper)
        until = time.monotonic() + 120
        while not made.is_file() and time.monotonic() < until:
            time.sleep(0.05)
        assert read() == [f"! {made}"]
    assert os.environ["PATH"] == before
    assert not wrapper.parent.exists()


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with hurried():
        assert os.environ["PATH"] == "/nowhere"
