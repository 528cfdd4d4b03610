"""docs/writing-a-backend.md, followed to the letter in an empty folder."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "writing-a-backend.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(
    re.findall(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
)
COMMANDS: list[str] = "".join(re.findall(r"^```bash\n(.*?)^```", GUIDE, re.M | re.S)).splitlines()


def test_the_guide_is_short() -> None:
    assert list(FILES) == [
        "pyproject.toml",
        "mhc_mine/__init__.py",
        "mhc_mine/ops.py",
        "test_mine.py",
    ]
    lines = sum(len([line for line in text.splitlines() if line]) for text in FILES.values())
    assert lines < 60
    assert f"Four files, {lines} lines of code:" in GUIDE
    blocks = re.findall(r"^```(\w+)$", GUIDE, re.MULTILINE)
    assert sorted(blocks) == ["bash", *["python"] * 3, "toml"]  # all of them are followed
    assert len(COMMANDS) == 3


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Write the files into an empty folder and run the commands there, one after another."""
    pytest.importorskip("hatchling", reason="the plugin's build backend: pip install hatchling")
    folder, site = tmp_path_factory.mktemp("mhc-mine"), tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    run = functools.partial(_run, folder, _environment(site))
    outcomes = {command: run(command) for command in COMMANDS}
    return {"folder": folder, "site": site, "run": run, **outcomes}


def _environment(site: Path) -> dict[str, str]:
    """Let pip install only from the packages here, into a folder of its own."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    pip = {
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which is how pip spells that there is to be none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    left = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "MHC_"))}
    return {**left, **pip, "PYTHONPATH": path, "PATH": scripts, "COLUMNS": "200"}


def _run(folder: Path, environment: dict[str, str], command: str) -> Any:
    options: Any = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, shell=True, check=False, **options)


def test_every_command_succeeds(followed: dict[str, Any]) -> None:
    for command in COMMANDS:
        done = followed[command]
        assert done.returncode == 0, done.stdout + done.stderr
    installed = {path.name for path in followed["site"].iterdir()}
    assert {"mhc_mine", "mhc_mine-0.1.0.dist-info"} <= installed


def test_the_kit_has_run_on_all_that_the_plugin_declares(followed: dict[str, Any]) -> None:
    text = followed["pytest"].stdout
    passed, skipped = map(int, re.findall(r"(\d+) (?:passed|skipped)", text.splitlines()[-1]))
    # two ops: two numeric checks in two dtypes, five others in one; the rest is left out
    assert passed == 2 * (2 * 2 + 5)
    assert skipped > 100
    shown = followed[COMMANDS[-1]].stdout
    assert f"{passed} passed, 0 failed, " in shown
    page = (followed["folder"] / "mine.html").read_text(encoding="utf-8")
    assert f"mine: {passed} passed, 0 failed, " in page
    assert "NumPy has neither autodiff nor a compiler" in page


def test_the_plugin_is_there_and_can_be_left_out(followed: dict[str, Any]) -> None:
    run: Callable[[str], Any] = followed["run"]
    assert re.search(r"mine\W+numpy\.ndarray\W+float32, float64\W+yes", run("mhc backends").stdout)
    assert "mine" not in run("MHC_DISABLE_PLUGINS=mine mhc backends").stdout


def test_a_slip_in_it_is_found(followed: dict[str, Any]) -> None:
    """Check that the kit fails the same files with one sign changed."""
    ops = followed["site"] / "mhc_mine" / "ops.py"
    right = ops.read_text(encoding="utf-8")
    wrong = right.replace("(g @ y[..., None])[..., 0]", "-(g @ y[..., None])[..., 0]")
    assert wrong != right
    ops.write_text(wrong, encoding="utf-8")
    os.utime(ops, (time.time() + 9, time.time() + 9))  # so that no cached bytecode stands for it
    try:
        done = followed["run"]("mhc conformance mine --op combine --kind gradient")
    finally:
        ops.write_text(right, encoding="utf-8")
    assert done.returncode == 1
    assert "combine gradient float32 on mine: d h_post of " in done.stdout
