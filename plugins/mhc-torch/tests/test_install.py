"""The effects of installing and uninstalling."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import mhc_conformance
import mhc_core

ROOT = Path(__file__).parents[1]


def _run(*command: str | Path, path: str | None = None) -> str:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "200"}
    if path is not None:
        environment["PYTHONPATH"] = path
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_heavy_is_imported_before_the_first_tensor() -> None:
    code = """
import sys, mhc_core, mhc_torch
assert mhc_core.backends()["torch"].available
assert "torch" not in sys.modules and "mhc_torch.ops" not in sys.modules
"""
    _run(sys.executable, "-c", code)


def test_the_readme() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ends = "assert phi.grad.any() and x.grad.any() and len(list(stack.parameters())) == 20"
    _run(sys.executable, "-c", "\n".join([*examples, ends]))


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, str]:
    """Return the Python of a new environment, and a path to everything installed but the plugin."""
    pytest.importorskip("hatchling")
    venv.create(tmp_path / "venv", with_pip=False)
    others = tmp_path / "others"
    others.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "mhc_torch" not in item.name and item.suffix != ".pth":
            (others / item.name).symlink_to(item)
    sources = [Path(package.__file__ or "").parents[1] for package in (mhc_core, mhc_conformance)]
    backends = sources[0] / "backends"  # of a checkout; a wheel has all three in one place
    return tmp_path / "venv/bin/python", os.pathsep.join(map(str, [others, *sources, backends]))


LIST = """
import importlib.metadata as metadata, importlib.util as util, mhc_core
print(*sorted(mhc_core.backends()))
print(*sorted(d.name for d in metadata.distributions() if d.name == "mhc-torch"))
print(util.find_spec("mhc_torch") is not None)
"""


def test_installing_lists_it_and_uninstalling_leaves_no_trace(
    environment: tuple[Path, str],
) -> None:
    python, path = environment
    pip = (python, "-m", "pip")
    files = set(python.parents[1].rglob("*"))
    before = _run(python, "-c", LIST, path=path)
    assert " torch" not in before
    options = ("--no-deps", "--no-build-isolation", "--no-compile", "--quiet")
    _run(*pip, "install", *options, ROOT, path=path)
    installed = _run(python, "-c", LIST, path=path).splitlines()
    names = f"{before.splitlines()[0]} torch torch-cuda torch-metal"
    assert installed == [names, "mhc-torch", "True"]
    listed = _run(python, "-c", "from mhc_core.cli import app; app()", "backends", path=path)
    assert re.search(r"torch\W+torch\.Tensor\W+float32, float16, bfloat16, float64\W+yes", listed)
    _run(*pip, "uninstall", "--yes", "--quiet", "mhc-torch", path=path)
    assert _run(python, "-c", LIST, path=path) == before
    left = {p for p in set(python.parents[1].rglob("*")) - files if "__pycache__" not in p.parts}
    assert left == set()
