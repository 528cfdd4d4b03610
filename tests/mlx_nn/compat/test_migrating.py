"""The code and the commands of docs/migrating.md run, so it says only what is true."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mhc_core.mlx
from mhc_core.cli import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
SMALL = [
    "--B",
    "1",
    "--T",
    "1",
    "--n",
    "2",
    "--repeats",
    "1",
    "--calls",
    "1",
    "--backend",
    "mlx-compiled",
    "--vs",
    "none",
]


@pytest.mark.parametrize(
    "code",
    re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL),
    ids=["wrapped", "patched", "layer", "connection"],
)
def test_examples_run(code: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`mhc (\w[^`]*)`", PAGE))))
def test_commands_run(command: str) -> None:
    words = shlex.split(command)
    result = CliRunner().invoke(app, [*words, *(SMALL if words[0] == "bench" else [])])
    assert result.exit_code == 0, result.output


def test_their_options_are_options_of_ours(tmp_path: Path) -> None:
    (options,) = re.findall(r"`(--B 1,8 [^`]*)` \| the same", PAGE)
    (out,) = re.findall(r"`--out (results\.json)`", PAGE)
    file = tmp_path / out
    rest = ["--T=1", "--C=8", "--row=aggregate", "--backend=numpy", "--vs=none", "--out", str(file)]
    result = CliRunner().invoke(app, ["bench", *options.split(), *rest])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    assert {(row["B"], row["n"]) for row in rows} == {(1, 4), (1, 8), (8, 4), (8, 8)}


def test_everything_that_they_export_is_named_and_there() -> None:
    names = (
        "MHCLayer MHCRewire AutoPatcher residual_add_agg diagnostics sinkhorn_knopp "
        "ManifoldHyperConnection compare_models GradientTracker OUTPUT_HEADS"
    )
    for name in names.split():
        assert name in PAGE
        assert hasattr(mhc_core.mlx, name)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(((?!https:)[^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
