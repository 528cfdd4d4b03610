"""A new op needs the edits that CONTRIBUTING.md promises, and no others: one is made and tried."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from new_op import NAME, add, copy, edits, promised, run

PYTEST = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")


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
    chosen = ["--op", NAME, "--jobs", "1"]
    for kind in ("forward", "gradient", "grad", "compile"):
        chosen += ["--kind", kind]
    printed = run(tree, "-c", code, "conformance", *backends, *chosen)
    assert re.search(r"\d\d passed, 0 failed", printed)
    code = (
        "from mhc_conformance.generated import MUTANTS, run_mutant\n"
        f"found = [run_mutant(one) for one in MUTANTS.values() if one.op == {NAME!r}]\n"
        "assert len(found) > 30\n"
        "assert not [one for one in found if one.problem], found\n"
    )
    run(tree, "-c", code)


def test_the_lists_of_ops_have_it(tree: Path) -> None:
    chosen = f"public_names or same_everywhere or every_op or help_has or {NAME}"
    files = ("test_import.py", "test_oracle.py", "test_documents.py")
    paths = [f"tests/{name}" for name in files]
    printed = run(tree, *PYTEST, "-k", chosen, *paths)
    assert re.search(r"\d\d passed", printed)


def test_the_torch_plugin_and_its_tests_have_it(tree: Path) -> None:
    if not (find_spec("mhc_torch") and find_spec("torch")):  # not imported here: it takes seconds
        pytest.skip("PyTorch or the plugin for it is not installed")
    code = (
        "import sys; sys.path.insert(0, 'plugins/mhc-torch/tests')\n"
        "import mhc_torch\n"
        "from calls import CALLS, assert_close, gradients\n"
        f"assert {NAME!r} in mhc_torch.SPEC.ops\n"
        f"(call,) = (call for call in CALLS if call.op == {NAME!r})\n"
        "assert_close(call.function(*(arrays := call.arrays())), call.neutral(*arrays))\n"
        "assert_close(gradients(call.function, arrays), gradients(call.neutral, arrays))\n"
    )
    run(tree, "-c", code)
