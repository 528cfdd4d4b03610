"""mhc bench: its JSON, its check that both sides agree, its inputs, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from mhc_core.cli import bench as module
from mhc_core.cli._baselines import BASELINES, Baseline

SMALL = ("--T", "6", "--n", "2", "--C", "8", "--repeats", "2")
ROW = {"row", "backend", "vs", "way", "ratio", "ours_ms", "baseline_ms", "apart"}


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(module.bench)
    return CliRunner().invoke(app, arguments)


def measured(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "out.json"
    result = run(*arguments, "--json", str(file))
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("backend", "vs", "ways"),
    [
        ("mlx-compiled", "mlx-vlm", ["call", "call", "mx.grad", "mx.compile"]),
        ("jax", "jax", ["jax.jit", "jax.jit", "jax.jit"]),
    ],
)
def test_latency(tmp_path: Path, backend: str, vs: str, ways: list[str]) -> None:
    report = measured(tmp_path, *SMALL, "--backend", backend, "--vs", vs)
    assert report["mode"] == "latency"
    assert report["sizes"] == {"T": 6, "n": 2, "C": 8, "dtype": "float32"}
    assert [row["way"] for row in report["rows"]] == ways
    assert list(dict.fromkeys(r["row"] for r in report["rows"])) == ["pre", "combine", "sublayer"]
    for row in report["rows"]:
        assert set(row) == ROW
        assert min(row["ratio"], row["ours_ms"], row["baseline_ms"]) > 0
        assert row["apart"] < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    report = measured(tmp_path, *SMALL, "--dtype", dtype, "--backend", "mlx-compiled")
    assert {row["row"] for row in report["rows"]} == {"pre", "combine", "sublayer"}
    sizes = module.Sizes(2, 2, 4, dtype)
    made = [spec.make(sizes, np.random.default_rng()).dtype for spec in (module.X, module.PHI)]
    assert made == [dtype, "float32"]


def test_a_wrong_baseline_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BASELINES["mlx-vlm"]

    def load() -> Mapping[str, Any]:
        combine = right.load()["combine"]
        return {"combine": lambda x, y, p, h: combine(x, y, p, h.swapaxes(-1, -2))}

    monkeypatch.setitem(BASELINES, "mlx-vlm", replace(right, load=load))
    result = run(*SMALL, "--backend", "mlx-compiled", "--vs", "mlx-vlm")
    assert result.exit_code == 1
    assert "combine (call): mlx-compiled and mlx-vlm are" in result.output


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    right = BASELINES["jax"]

    def load() -> Mapping[str, Any]:
        sublayer = right.load()["sublayer"]
        return {"sublayer": lambda x, *others: sublayer(x, *map(jax.lax.stop_gradient, others))}

    monkeypatch.setitem(BASELINES, "jax", replace(right, load=load))
    result = run(*SMALL, "--backend", "jax", "--vs", "jax")
    assert result.exit_code == 1
    assert "sublayer (jax.jit)" in result.output


def test_inputs_are_random_fresh_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    inputs = module._inputs

    def spy(row: Any, sizes: Any, backend: Any, rng: Any) -> list[Any]:
        made = inputs(row, sizes, backend, rng)
        seen.append([np.asarray(array) for array in made])
        return made

    monkeypatch.setattr(module, "_inputs", spy)
    assert run(*SMALL, "--backend", "mlx-compiled", "--vs", "mlx-vlm").exit_code == 0
    assert len(seen) == 12  # four measurements: one check and two repeats each
    for arrays in seen:
        assert all((array != 0).all() and array.std() > 0 for array in arrays)
    for one, other in pairwise(seen):
        assert not np.array_equal(one[0], other[0])


def test_zeros_of_the_generator_are_replaced() -> None:
    class Zeros:
        def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> Any:
            return np.zeros(shape, dtype)

    made = module.X.make(module.Sizes(2, 2, 4, "float32"), Zeros())  # pyright: ignore
    assert (made != 0).all()


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(BASELINES["mhc-mlx"], package="nobody_has_this")
    monkeypatch.setitem(BASELINES, "mhc-mlx", absent)
    report = measured(tmp_path, *SMALL, "--backend", "mlx-compiled", "--vs", "mhc-mlx")
    assert report["rows"] == []
    assert report["notes"] == ["mhc-mlx: not compared, nobody_has_this is not installed"]


def test_a_baseline_that_cannot_be_compiled_is_measured_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = BASELINES["mlx-vlm"]

    def load() -> Mapping[str, Any]:
        sublayer = right.load()["sublayer"]

        def looking(x: Any, *others: Any) -> Any:
            float(others[-1].sum())  # raises under mx.compile
            return sublayer(x, *others)

        return {"sublayer": looking}

    changed = replace(right, load=load, uncompilable="it looks at values")
    monkeypatch.setitem(BASELINES, "mlx-vlm", changed)
    report = measured(tmp_path, *SMALL, "--backend", "mlx-compiled", "--vs", "mlx-vlm")
    assert [row["way"] for row in report["rows"]] == ["mx.grad", "mx.compile, theirs mx.grad"]


@pytest.mark.parametrize("name", ["mhc-mlx", "mlx-mhc"])
def test_the_packages_agree_where_they_are_installed(tmp_path: Path, name: str) -> None:
    baseline: Baseline = BASELINES[name]
    report = measured(tmp_path, *SMALL, "--backend", "mlx-compiled", "--vs", name)
    rows = {row["row"] for row in report["rows"]}
    assert rows == (set() if baseline.missing() else set(baseline.load()))


@pytest.mark.parametrize("backend", ["numpy", "jax", "mlx-compiled"])
def test_dispatch(tmp_path: Path, backend: str) -> None:
    report = measured(tmp_path, "--mode", "dispatch", "--repeats", "3", "--backend", backend)
    assert {row["arrays"] for row in report["rows"]} == {2, 3, 4, 5, 7, 8}
    for row in report["rows"]:
        assert 0 < row["selection_ns"] < 5000  # under 1000 on a machine that is not busy
        assert min(row["validation_ns"], row["call_ns"]) > 0


def test_dispatch_puts_the_selected_functions_back() -> None:
    import mhc_core as mhc

    assert run("--mode", "dispatch", "--repeats", "1", "--backend", "numpy").exit_code == 0
    x, h_pre = np.ones((1, 2, 4, 8), np.float32), np.ones((1, 2, 4), np.float32)
    assert mhc.aggregate(x, h_pre).shape == (1, 2, 8)


def test_errors() -> None:
    unknown = run("--backend", "numpi")
    assert unknown.exit_code == 1
    assert "numpy" in unknown.output
    baseline = run("--vs", "nothing")
    assert baseline.exit_code == 2
    assert "mlx-vlm" in baseline.output
