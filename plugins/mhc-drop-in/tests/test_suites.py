"""The originals' own tests, unmodified, against the stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import mlx.core as mx
import pytest
from originals import PINNED, Original

README = (Path(__file__).parents[1] / "README.md").read_text()
GPU = mx.default_device() == mx.Device(mx.gpu)


def unreached(name: str) -> dict[str, str]:
    """Return the tests of the README's table that cannot pass, with the reasons."""
    rows = re.findall(r"^\| ([\w-]+) \| `([\w.:]+)` \| ([^|]+) \|$", README, re.MULTILINE)
    return {test: reason for suite, test, reason in rows if suite == name}


def outcomes(original: Original, folder: Path) -> dict[str, str]:
    """Run a suite as it is published; return the outcome of each test."""
    shutil.copytree(original.root / "tests", folder / "tests")
    report = folder / "report.xml"
    command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}")
    environment = {**os.environ, "MHC_MLX_RUN_STRESS": "1"}  # with those that it leaves out unasked
    done = subprocess.run(
        (*command, "tests"), cwd=folder, env=environment, capture_output=True, text=True
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, group = case.attrib["classname"].removeprefix("tests.").partition(".")
        parts = [f"{module}.py", *filter(None, [group]), case.attrib["name"]]
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found["::".join(parts)] = kinds[0] if kinds else "passed"
    return found


@pytest.mark.parametrize("name", PINNED)
def test_the_suite_passes_but_for_what_the_readme_lists(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original: Original = request.getfixturevalue(f"{name.replace('-', '_')}_original")
    found = outcomes(original, tmp_path)
    listed = unreached(name)
    expected = {test for test, reason in listed.items() if not (GPU and "without a GPU" in reason)}
    assert {test for test, outcome in found.items() if outcome != "passed"} == expected
    passed = len(found) - len(listed)
    assert f"| {name} {PINNED[name][0]} | {passed} of {len(found)} |" in README
