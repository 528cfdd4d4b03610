"""mhc conformance: its records, its exit code, its errors, and the text chain behind it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mhc_conformance import chain as chains
from mhc_conformance import tolerances
from mhc_conformance.run import Plan
from mhc_core import math
from mhc_core.cli import app

FIELDS = {
    "backend",
    "op",
    "dtype",
    "kind",
    "error",
    "tolerance",
    "passed",
    "cases",
    "seed",
    "detail",
}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["conformance", *arguments, "--jobs", "1"])


def test_one_record_per_backend_op_dtype_and_kind(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = run("numpy", "--op", "combine", "--op", "head", "--seed", "3", "--json", str(file))
    assert result.exit_code == 0, result.output
    records = json.loads(file.read_text())
    keys = {(r["backend"], r["op"], r["dtype"], r["kind"]) for r in records}
    assert len(keys) == len(records) > 20
    assert {op for _, op, _, _ in keys} == {"combine", "head"}
    assert {dtype for _, _, dtype, _ in keys} == {"float32", "float16", "bfloat16", "float64"}
    for record in records:
        assert set(record) == FIELDS
        assert record["passed"] is True
        assert 0 <= record["error"] <= record["tolerance"]
        assert record["seed"] == 3
    assert f"{len(records)} passed, 0 failed" in result.output


def test_a_failure_sets_the_exit_code_and_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tolerances, "K", {**tolerances.K, "combine": (0, 0)})
    file = tmp_path / "out.json"
    result = run("numpy", "--op", "combine", "--dtype", "float32", "--json", str(file))
    assert result.exit_code == 1
    assert "Again: mhc conformance numpy --op combine --dtype float32 --kind forward" in (
        result.output.replace("\n", " ")
    )
    assert not all(record["passed"] for record in json.loads(file.read_text()))


def test_nothing_run_is_no_success() -> None:
    assert run("numpy", "--op", "combine", "--kind", "vmap").exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "combin"), "combine_pre"),
        (("--dtype", "float8"), "bfloat16"),
        (("--kind", "speed"), "checkpoint"),
        (("nmupy",), "'numpy'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(
    arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_the_whole_grid_has_every_op_dtype_and_the_chain() -> None:
    units = Plan(["numpy", "jax"]).units()
    for name, dtypes in (("numpy", 4), ("jax", 4)):
        mine = {unit.op: unit.checks for unit in units if unit.backend == name}
        assert set(mine) == {*math.OPS, "chain"}
        for op in math.OPS:
            assert sum(kind == "forward" for _, kind in mine[op]) == dtypes
            assert sum(kind == "gradient" for _, kind in mine[op]) == dtypes


def test_the_chain_reads_real_text() -> None:
    data = chains.text()
    assert len(data) == chains.TOKENS + 1
    assert b"def " in data.astype(np.uint8).tobytes()


def test_the_chains_gradients_are_those_of_its_loss() -> None:
    """By central differences in float64, along a random direction of each parameter."""
    chain = chains.Chain.make(1)
    wide = dataclasses.replace(
        chain, parameters={k: v.astype(np.float64) for k, v in chain.parameters.items()}
    )
    outcome = chains.run_chain("numpy", wide, "float64")
    rng = np.random.default_rng(0)
    for name, value in wide.parameters.items():
        direction = rng.normal(size=value.shape)
        losses = [
            chains.run_chain(
                "numpy",
                dataclasses.replace(
                    wide, parameters={**wide.parameters, name: value + step * direction}
                ),
                "float64",
            ).loss
            for step in (1e-5, -1e-5)
        ]
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(
            float((outcome.gradients[name] * direction).sum()), rel=1e-5, abs=1e-8
        )


def test_a_wrong_gradient_is_far_from_the_reference() -> None:
    reference = chains.run_chain("numpy", chains.Chain.make(), "float64")
    wrong = dataclasses.replace(
        reference, gradients={**reference.gradients, "phi2": reference.gradients["phi2"] * 1.001}
    )
    forward, gradient = chains.compare(wrong, reference)
    assert forward == 0
    assert gradient > chains.TOLERANCE
