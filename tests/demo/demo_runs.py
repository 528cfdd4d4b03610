"""The shared part of mhc demo's tests: a model so small that a step takes milliseconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from mhc_core.cli import app
from mhc_core.cli.demo import _checkpoint, _library, _model
from mhc_core.cli.demo._settings import Settings

SIZES = ("--depth", "4", "--width", "8", "--heads", "2", "--context", "8", "--batch", "2")
BACKENDS = {"jax": "jax", "mlx": "mlx-compiled"}
VARIANTS = ("residual", "HC", "mHC", "single-pass")

Array = Any


def settings(backend: str = "jax", **changed: Any) -> Settings:
    """Return the settings of a small model."""
    small: dict[str, Any] = {
        "depth": 4,
        "width": 8,
        "heads": 2,
        "context": 8,
        "batch": 2,
        "steps": 6,
        "rate": 0.01,
        "seed": 0,
        "text": "",
        "backend": backend,
    }
    return Settings(**{**small, **changed})


def model(library: str, variant: str, **changed: Any) -> tuple[_model.Model, dict[str, Array]]:
    """Return a small model on a library, and its first parameters there."""
    here = _library.library(library)
    chosen = settings(BACKENDS[library], **changed)
    made = _model.Model(chosen, variant, here.xp, here.loop)
    first = _model.initial(chosen, variant)
    return made, {name: here.xp.asarray(array) for name, array in first.items()}


def run(*arguments: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(app, ["demo", *arguments])


def words(out: Path, *more: str, steps: int = 6, variants: str = "mHC") -> list[str]:
    """Return the command line of a small run on MLX, whose processes start fast."""
    chosen = ["--backend", "mlx-compiled", "--variants", variants, "--steps", str(steps)]
    return [*SIZES, *chosen, "--out", str(out), *more]


def process(arguments: Sequence[str], before: str = "") -> subprocess.Popen[str]:
    """Start the command in a process of its own, with some code ahead of it."""
    code = f"import os, signal, sys\n{before}\nfrom mhc_core.cli import app\napp()"
    command = [sys.executable, "-c", code, "demo", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def was_killed(done: subprocess.Popen[str]) -> bool:
    """Wait for the end of a process; return whether it was killed by kill -9."""
    output, _ = done.communicate(timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), output
    return done.returncode == -signal.SIGKILL


def numbers(out: Path, variant: str = "mHC") -> dict[str, Array]:
    """Return everything that a checkpoint holds, except times and memory."""
    from safetensors.numpy import load_file

    arrays = load_file(_checkpoint.path(out, variant))
    measured = ("history/seconds", "history/memory")
    return {name: array for name, array in arrays.items() if name not in measured}


def about(out: Path, variant: str = "mHC") -> dict[str, str]:
    """Read a checkpoint's header."""
    content = _checkpoint.path(out, variant).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]


def same(ours: dict[str, Array], theirs: dict[str, Array]) -> bool:
    """Return whether two sets of arrays are equal bit for bit."""
    assert set(ours) == set(theirs)
    return all(
        ours[k].dtype == theirs[k].dtype and np.array_equal(ours[k], theirs[k]) for k in ours
    )
