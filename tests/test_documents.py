"""The README says only what is true: its code runs, and its tables match the declarations."""

from __future__ import annotations

import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mhc_core
from mhc_backends.kernels.launch import VARIABLE, launch
from mhc_core.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=["numpy", "jax", "mlx"])
def test_examples_run(code: str) -> None:
    assert len(code.strip().splitlines()) <= 16
    command = [sys.executable, "-W", "error", "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert said, "a reader sees nothing"
    assert " ".join(printed.split()) == " ".join(said)


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert command in script


def test_backend_table() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| `([\w.]+)` \| ([^|]+) \| (yes|no) \|", README, re.MULTILINE
    )
    declared = [
        (
            backend.name,
            *backend.spec.array_types,
            ", ".join(backend.spec.dtypes),
            "no" if "compile" in backend.spec.without else "yes",
        )
        for backend in mhc_core.backends().values()
        if backend.spec is not None and backend.spec.module.startswith("mhc_backends.")
    ]
    assert sorted(rows) == sorted(declared)


@pytest.mark.parametrize("file", ["README.md", "docs/kernels.md"])
def test_no_page_says_more_of_metal_than_was_seen(file: str) -> None:
    text = " ".join((ROOT / file).read_text().split())
    assert "verified by simulation, not yet run on Apple GPUs" in text
    assert "docs/kernels.md" in README


def test_the_tuning_file_of_the_docs_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.DOTALL)
    (tmp_path / "tuning.json").write_text(text)
    sizes = (1, 4, 4096, "bfloat16")
    before = launch("combine", *sizes)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    assert launch("combine", *sizes) != before
    assert launch("combine", *sizes).threadgroup == (128, 1, 1)


def test_every_environment_variable_is_in_the_table() -> None:
    packages = [ROOT / "mhc_core", ROOT / "backends", ROOT / "conformance"]
    code = "".join(path.read_text() for root in packages for path in root.rglob("*.py"))
    used = set(re.findall(r"\"((?:MHC|MLX)_[A-Z0-9_]+)\"", code))
    listed = set(re.findall(r"^\| `((?:MHC|MLX)_[A-Z0-9_]+)` \|", README, re.MULTILINE))
    assert used == listed


def test_help_has_every_op_with_its_formula() -> None:
    assert "`help(mhc)` has every op" in README
    text = " ".join(pydoc.plain(pydoc.render_doc(mhc_core)).replace("|", " ").split())
    for name in mhc_core.math.OPS:
        said = " ".join((getattr(mhc_core, name).__doc__ or "").split("Parameters")[0].split())
        assert f"{name}(" in text
        assert said in text


@pytest.mark.parametrize("command", re.findall(r"`mhc (\w+)", README))
def test_commands_exist(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output


def test_the_backends_command_lists_every_backend() -> None:
    result = CliRunner().invoke(app, ["backends"])
    assert result.exit_code == 0
    for name in mhc_core.backends():
        assert name in result.output
