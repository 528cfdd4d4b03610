"""The soak scripts in small, so that they still run when somebody needs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMALL = {
    "threads.py": ["--threads=6", "--seconds=1"],
    "shapes.py": ["--calls=200", "--shapes=20", "--backend=numpy"],
    "recompute.py": ["--layers=2"],
    "beyond_int32.py": ["--C=8", "--tokens=40", "--backend=mlx-compiled"],
}


@pytest.mark.parametrize("script", SMALL)
def test_it_runs(script: str) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    pytest.importorskip("jax", reason="JAX is not installed")
    command = [sys.executable, str(HERE / script), *SMALL[script]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
