"""mhc bench beside mlx-lm's own hyper-connection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mhc_core.cli import app

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")


def test_mlx_lm_is_measured_beside_ours_and_computes_the_same(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    rows = ("pre", "combine", "combine_pre", "aggregate", "sublayer fwd+bwd")
    asked = [word for row in rows for word in ("--row", row)]
    sizes = ["--B", "2", "--T", "3", "--n", "4", "--C", "16", "--repeats", "1", "--calls", "1"]
    sides = ["--backend", "mlx-compiled", "--vs", "mlx-lm"]
    done = CliRunner().invoke(app, ["bench", *asked, *sizes, *sides, "--json", str(file)])
    assert done.exit_code == 0, done.output
    theirs = [row for row in json.loads(file.read_text())["rows"] if row["side"] == "mlx-lm"]
    assert {row["row"] for row in theirs} == set(rows)
    for row in theirs:
        assert row["apart"] < 1e-5, row
