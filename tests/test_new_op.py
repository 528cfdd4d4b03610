"""A new op needs the edits that CONTRIBUTING.md promises, and no others: one is made and tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from new_op import NAME, add, copy, edits, promised, run


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree with a new op in it."""
    root = copy(tmp_path_factory.mktemp("tree"))
    add(root)
    return root


def test_the_edits_are_those_that_contributing_promises(tree: Path) -> None:
    assert edits(tree) == promised(kernels=False)


def test_the_kit_passes_and_sees_every_wrong_version(tree: Path) -> None:
    code = "from mhc_core.cli import app; app(prog_name='mhc')"
    backends = ("numpy", "jax", "mlx-compiled")
    printed = run(tree, "-c", code, "conformance", *backends, "--op", NAME, "--jobs", "1")
    assert re.search(r"\d\d passed, 0 failed", printed)
    code = (
        "from mhc_conformance.generated import MUTANTS, hunt\n"
        f"found = [hunt(one) for one in MUTANTS.values() if one.op == {NAME!r}]\n"
        "assert len(found) > 30\n"
        "assert not [one for one in found if one.problem], found\n"
    )
    run(tree, "-c", code)


def test_the_lists_of_ops_have_it(tree: Path) -> None:
    chosen = (
        "public_names or same_everywhere or every_op or of_its_declared or help_has or wrong_op "
        f"or {NAME}"
    )
    files = ("test_import.py", "test_oracle.py", "test_documents.py", "test_golden.py")
    paths = [f"tests/{name}" for name in files]
    printed = run(
        tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", chosen, *paths
    )
    assert re.search(r"\d\d passed", printed)


def test_the_torch_plugins_tests_have_it(tree: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    tests = "plugins/mhc-torch/tests/test_autograd.py"
    printed = run(
        tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", NAME, tests
    )
    assert re.search(r"\d passed", printed)
