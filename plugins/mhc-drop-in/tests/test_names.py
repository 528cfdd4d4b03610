"""The names that the drop-in provides, and the packages that it refuses to stand beside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import mlx.core as mx
import pytest

import mhc_mlx
import mlx_mhc
from mhc_core import mlx as ours

NAMES = ("mhc_mlx", "mlx_mhc")


@pytest.mark.parametrize("name", ["MHCLayer", "MHCRewire", "AutoPatcher", "residual_add_agg"])
def test_the_names_of_mhc_mlx_are_ours(name: str) -> None:
    assert getattr(mhc_mlx, name) is getattr(ours, name)


@pytest.mark.parametrize("name", ["sinkhorn_knopp", "compare_models", "GradientTracker"])
def test_the_names_of_mlx_mhc_are_ours(name: str) -> None:
    assert getattr(mlx_mhc, name) is getattr(ours, name)


def test_the_alias_of_mhc_mlx_is_there() -> None:
    assert mlx_mhc.MHCLayer is mhc_mlx.MHCLayer
    assert mlx_mhc.MHCRewire is mhc_mlx.MHCRewire


def test_the_versions_are_those_stood_in_for() -> None:
    assert (mhc_mlx.__version__, mlx_mhc.__version__) == ("0.6.3", "0.4.1")


@pytest.mark.parametrize(
    "module",
    [f"mhc_mlx.{m}" for m in ("layer", "patching", "utils", "reference", "metal")]
    + [f"mlx_mhc.{m}" for m in ("mhc", "sinkhorn", "benchmark", "version")],
)
def test_their_modules_can_be_imported(module: str) -> None:
    assert import_module(module)


def test_the_connection_shows_what_it_keeps_by_the_private_names() -> None:
    connection = mlx_mhc.ManifoldHyperConnection(8, 2).eval()
    names = ("_cached_h_pre", "_cached_h_post", "_cached_h_res")
    assert [getattr(connection, name) for name in names] == [None] * 3
    x = mx.ones((1, 2, 8))
    connection(x, x)
    assert all(getattr(connection, name) is not None for name in names)
    kept = [getattr(connection, name) for name in names]
    connection.train()  # hands out the parameters, and so forgets what was made of them
    for name, array in zip(names, kept, strict=True):
        projected = name.replace("_cached", "_project")
        assert mx.array_equal(array, getattr(connection, projected)()), name
        connection.eval()
    connection.train()
    assert [getattr(connection, name) for name in names] == [None] * 3


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    subprocess.run((sys.executable, "-W", "error", "-c", example), check=True)


def test_the_commands_are_declared() -> None:
    found = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert found["mhc-mlx-info"] == "mhc_mlx.diagnostics:main"
    assert found["mhc-mlx-bench"] == "mhc_mlx.benchmark:main"


def beside(original: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python with metadata that says an original is installed."""
    metadata = folder / f"{original.replace('-', '_')}-9.8.7.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {original}\nVersion: 9.8.7\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run((sys.executable, *words), env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("original", ["mhc-mlx", "mlx-mhc"])
def test_beside_an_original_it_says_which_to_remove(
    name: str, original: str, tmp_path: Path
) -> None:
    done = beside(original, tmp_path, "-c", f"import {name}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: mhc-drop-in stands in for mhc-mlx and mlx-mhc, but {original} 9.8.7 is "
        f"installed beside it, under the same import names. To use mhc-drop-in: pip uninstall "
        f"{original}, then install mhc-drop-in again, from its checkout, with --force-reinstall "
        f"--no-deps. To use {original} 9.8.7: pip uninstall mhc-drop-in, then reinstall it."
    )


@pytest.mark.parametrize("module", ["mhc_mlx.diagnostics", "mhc_mlx.benchmark"])
def test_beside_an_original_the_commands_refuse_too(module: str, tmp_path: Path) -> None:
    done = beside("mhc-mlx", tmp_path, "-m", module, "--help")
    assert done.returncode != 0
    assert "pip uninstall mhc-mlx" in done.stderr
