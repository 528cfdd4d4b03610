"""A new op with kernels needs the edits that CONTRIBUTING.md promises, and no others."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

ROOT = Path(__file__).parents[3]


def _edits() -> Any:
    """Import the module that makes the edits, which the tests of mhc-core use too."""
    spec = importlib.util.spec_from_file_location("new_op", ROOT / "tests" / "new_op.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


new_op = _edits()
PYTEST = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree with a new op in it, and its kernels."""
    root = new_op.copy(tmp_path_factory.mktemp("tree"))
    new_op.add(root)
    new_op.add_kernels(root)
    return root


def test_the_edits_are_those_that_contributing_promises(tree: Path) -> None:
    assert new_op.edits(tree) == new_op.promised(kernels=True)


def test_the_kit_passes_on_its_kernels(tree: Path) -> None:
    code = "from mhc_core.cli import app; app(prog_name='mhc')"
    chosen = ("--op", new_op.NAME, "--dtype", "bfloat16", "--jobs", "1")
    printed = new_op.run(tree, "-c", code, "conformance", "mlx-metal-simulator", *chosen)
    assert re.search(r"\d passed, 0 failed", printed)


def test_its_traffic_is_counted(tree: Path) -> None:
    module = "mhc_metal_simulator.traffic"
    printed = new_op.run(tree, "-m", module, "--op", new_op.NAME, "--T", "4", "--C", "64")
    rows = [line.split("|") for line in printed.splitlines() if new_op.NAME in line]
    assert len(rows) == 2
    assert all(float(row[-2]) < 1.05 for row in rows)


def test_the_tests_of_kernels_have_it(tree: Path) -> None:
    chosen = f"has_a_launch or size_of_each or stands_twice or directive or {new_op.NAME}"
    printed = new_op.run(tree, *PYTEST, "-k", chosen, "tests/test_kernels.py")
    assert re.search(r"\d passed", printed)
    # few small threadgroups, odd sizes and any address, as follows from its declaration
    own = "plugins/mhc-metal-simulator/tests/test_every_op.py"
    printed = new_op.run(tree, *PYTEST, "-k", f"{new_op.NAME} and (odd or whole)", own)
    assert re.search(r"2 passed", printed)
