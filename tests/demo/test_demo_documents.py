"""docs/demo.md says only what is true: its commands and code run, its numbers are the record's."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mhc_core import diagnostics
from mhc_core.cli import app

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)).splitlines()

# What makes each command small enough for a test; the last of two options counts.
SMALLER = {
    "demo": "--depth 2 --steps 2 --width 8 --heads 2 --context 8 --batch 1 --backend mlx-compiled",
    "bench": "--T 4 --C 16 --repeats 1 --calls 1",
    "conformance": "--dtype float32 --kind forward --jobs 1",
    "info": "",
}


def told() -> dict[str, Any]:
    record = (ROOT / "docs" / "records" / "demo-64.json").read_text(encoding="utf-8")
    return json.loads(record)["variants"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("mhc ")])
def test_the_commands_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, name, *words = shlex.split(command)
    result = CliRunner().invoke(app, [name, *words, *SMALLER[name].split()])
    assert result.exit_code == 0, result.output
    for file in ("demo-64.png", "conformance.html"):
        assert (tmp_path / file).exists() == (file in command)


def test_all_commands_are_there() -> None:
    assert {line.split()[1] for line in COMMANDS if line.startswith("mhc ")} == set(SMALLER)
    assert [line for line in COMMANDS if not line.startswith("mhc ")] == [
        'pip install -e ".[jax,demo]"'
    ]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.S))
def test_the_code_runs(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    )
    names = set(re.findall(r"'(\w+)':", done.stdout))
    listed = PAGE.split("| name in the summary")[1].split("\n\n")[0]
    assert names == set(re.findall(r"`(\w+)`", listed))


def test_the_table_and_the_words_are_the_records() -> None:
    variants = told()
    for name, one in variants.items():
        gains = (one["gain_forward"][-1], one["gain_backward"][0])
        numbers = (one["final_loss"], *gains, 1e3 * one["seconds"])
        row = " ".join(re.findall(rf"^│ {name} .*$", PAGE, re.M)[0].replace("│", " ").split())
        memory = f"{one['memory'] / 1e6:.0f}"
        assert row == " ".join([name, *(f"{number:.4g}" for number in numbers), memory])
    words = " ".join(PAGE.split())
    free = variants["HC"]
    least, most = min(free["layer_forward"]), max(free["layer_forward"])
    gain = f"{free['gain_forward'][-1]:,.0f}"
    assert f"by {least:.2f} to {most:.2f}, and 64 of them make it {gain}." in words
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    held = f"{variants['mHC']['gain_forward'][-1]:.2f}"
    assert f"64 layers amplify a signal {gain} times; with mHC, {held} times" in readme


def test_at_depth_64_the_gain_of_hc_grows_and_that_of_mhc_does_not() -> None:
    variants = told()
    free = variants["HC"]
    assert len(free["gain_forward"]) == 64
    assert free["gain_forward"][-1] > 100 * free["gain_forward"][15] > 1000
    assert free["gain_backward"][0] > 1000 * free["gain_backward"][-1]
    assert free["looked_forward"][0] < 1.01 < 1000 < free["looked_forward"][-1]
    for name in ("residual", "mHC", "single-pass"):
        gains = variants[name]["gain_forward"] + variants[name]["gain_backward"]
        assert all(0.99 < gain < 1.2 for gain in gains)


def test_every_option_and_function_is_named() -> None:
    command: Any = typer.main.get_command(app)
    options = {o for p in command.commands["demo"].params for o in p.opts} - {"--help"}
    listed = PAGE.split("| option |")[1].split("\n\n")[0]
    assert options == set(re.findall(r"(--[a-z][a-z-]*)", listed))
    for name in diagnostics.__all__:
        assert f"`{name}`" in PAGE or f"diagnostics.{name}" in PAGE
