"""mhc-mlx-info and mhc-mlx-bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mhc_core
from mhc_mlx import benchmark
from mhc_mlx.diagnostics import main as info

SIZES = ["--B=1,2", "--n=2", "--C=8", "--dtypes=bf16"]
TURNS = ["--iters=2", "--warmup=1", "--repeats=2"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_info_is_mhc_info(capsys: pytest.CaptureFixture[str]) -> None:
    info()
    printed = capsys.readouterr().out
    command = "from mhc_core.cli import app; app()"
    done = subprocess.run(
        (sys.executable, "-c", command, "info"), check=True, capture_output=True, text=True
    )
    assert printed == done.stdout
    assert "mlx-compiled" in printed


def test_bench_measures_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "results.jsonl"
    benchmark.main([*SIZES, *TURNS, "--mode", "latency", "--out", str(file)])
    rows = lines(file)
    sizes = {(row["B"], row["n"], row["C"], row["dtype"], row["T"]) for row in rows}
    assert sizes == {(B, 2, 8, "bfloat16", 1) for B in (1, 2)}
    assert {row["row"] for row in rows} == set(benchmark.ROWS)
    assert {(row["mode"], row["repeats"]) for row in rows} == {("latency", 2)}
    assert all(row["ms"] > 0 and row["ours"] and not row["failed"] for row in rows)
    assert capsys.readouterr().out.splitlines()[-1] == f"Done. Results written to {file}"


def test_bench_measures_both_modes_unasked_and_adds_lines(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    sizes = ["--B=1", "--n=2", "--C=8", "--dtypes=bfloat16"]
    turns = ["--iters=1", "--warmup=0", "--repeats=1"]
    benchmark.main([*sizes, *turns, "--out", str(file)])
    both = lines(file)
    assert [row["mode"] for row in both] == sorted((row["mode"] for row in both), reverse=True)
    assert {row["mode"] for row in both} == {"throughput", "latency"}
    benchmark.main([*sizes, *turns, "--mode=latency", "--out", str(file)])
    after = lines(file)
    assert after[: len(both)] == both
    assert {row["mode"] for row in after[len(both) :]} == {"latency"}


def test_its_options_are_those_of_mhc_bench(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    record = {"mode": "", "date": "", "machine": {}, "versions": {}, "repeats": 1, "rows": []}
    monkeypatch.setattr(benchmark, "_bench", lambda words: asked.append(list(words)) or record)
    options = ["--mode", "latency", "--iters", "7", "--warmup", "5", "--repeats", "4"]
    benchmark.main([*options, "--out", str(tmp_path / "o")])
    (words,) = asked
    assert {"--repeats=4", "--iters=7", "--warmup=5", "--mode=latency"} < set(words)
    theirs = {"--B=1,8,32", "--n=4,8,16,32", "--C=256,512,1024,2048,4096"}
    assert {*theirs, "--dtypes=bfloat16,float16,float32"} < set(words)


def test_backends_that_are_taken_by_name_alone_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def backend(name: str, takes: str, automatic: bool, available: bool) -> SimpleNamespace:
        spec = SimpleNamespace(name=name, array_types=(takes,), automatic=automatic)
        return SimpleNamespace(available=available, spec=spec)

    theirs = "mlx.core.array"
    known = [
        backend("good", theirs, automatic=True, available=True),
        backend("by name", theirs, automatic=False, available=True),
        backend("absent", theirs, automatic=True, available=False),
        backend("other", "jax.Array", automatic=True, available=True),
        SimpleNamespace(available=True, spec=None),
    ]
    monkeypatch.setattr(mhc_core, "backends", lambda: dict(enumerate(known)))
    assert benchmark._backends() == ["good"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtypes", "fp8"], "--dtype is 'fp8'; needs some of float32, fp32"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--C", "many"], "--C is 'many'; needs numbers"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "mhc_mlx.benchmark", *options)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
