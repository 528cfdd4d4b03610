"""mhc-mlx-info and mhc-mlx-bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mhc_mlx import benchmark
from mhc_mlx.diagnostics import main as info

CASE = ["--B=1", "--n=2", "--C=8", "--dtypes=bf16"]
TURNS = ["--iters=2", "--warmup=1", "--repeats=2", "--queue-guard=1"]
ROWS = ("sinkhorn", "fused", "layer", "layer_backward")
# every option of mhc-mlx 0.6.3's command, each with a value of its own
OPTIONS = [
    *("--threads-per-group=64", "--mix-kernel=1d", "--metal-dispatch=force"),
    *("--dispatch-policy=latency", "--hybrid-latency", "--hybrid-min-C=7"),
    *("--latency-avoid-fused-n32-max-C=6", "--latency-avoid-fused-B1-min-n=5"),
    *("--throughput-allow-fused-n32-min-B=4", "--throughput-allow-fused-n32-min-C=3"),
    *("--throughput-allow-fused-n32-small-C=2", "--fused-backward", "--no-compiled"),
    *("--sinkhorn-iters=3", "--eps=0.5", "--output-dtype=fp16", "--with-backward", "--seed=9"),
]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_info_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    info()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) < 20
    assert any(line.startswith("mlx-compiled:") and "available" in line for line in printed)
    assert printed[-1] == "More: mhc info"


def test_info_ends_with_its_reader() -> None:
    program = "from mhc_mlx.diagnostics import main; main()"
    command = f"{sys.executable} -c '{program}' | head -c 0"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert not done.stderr


def test_bench_takes_every_option_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "results.jsonl"
    benchmark.main([*CASE, *TURNS, *OPTIONS, "--mode=latency", "--out", str(file)])
    first, *rows = lines(file)
    assert [row["benchmark"] for row in rows] == [
        f"{name}_{side}" for name in ROWS for side in ("ref", "metal")
    ]
    assert first["benchmark"] == "correctness"
    assert first["rel_error"] < 1e-2
    for row in rows:
        assert 0 < row["time_s_p10"] <= row["time_s_median"] <= row["time_s_p90"]
    said = {
        "B": 1,
        "n": 2,
        "C": 8,
        "dtype": "bfloat16",
        "mode": "latency",
        "seed": 10,
        "iters": 2,
        "warmup": 1,
        "repeats": 2,
        "queue_guard": 1,
        "sinkhorn_iters": 3,
        "threads_per_group": 64,
        "mix_kernel": "1d",
        "metal_dispatch": "force",
        "dispatch_policy": "latency",
        "hybrid_latency": True,
        "hybrid_min_C": 7,
        "latency_avoid_fused_n32_max_C": 6,
        "latency_avoid_fused_B1_min_n": 5,
        "throughput_allow_fused_n32_min_B": 4,
        "throughput_allow_fused_n32_min_C": 3,
        "throughput_allow_fused_n32_small_C": 2,
        "fused_backward": True,
        "compiled": False,
        "with_backward": True,
        "output_dtype": "float16",
    }
    for row in (first, *rows):
        assert said.items() <= row.items()
    assert capsys.readouterr().out.splitlines()[-1] == f"Done. Results written to {file}"


def test_what_changes_results_is_used() -> None:
    """Check that the norm's eps, Sinkhorn's iterations and the output dtype reach the function."""

    def layer(*options: str) -> Any:
        asked = benchmark._parser().parse_args([*CASE, *options])
        case = {"B": 1, "n": 2, "C": 8, "dtype": "float32", "seed": 0}
        row = next(row for row in benchmark._rows(asked, case) if row.name == "layer_ref")
        return row.function(*row.arrays)

    plain = layer()
    for option in ("--eps=3", "--sinkhorn-iters=1"):
        assert abs(layer(option) - plain).max().item() > 1e-3
    assert str(layer("--output-dtype=half").dtype).endswith("float16")


def test_bench_measures_both_modes_unasked_and_adds_lines(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    turns = ["--iters=1", "--warmup=0", "--repeats=1", "--no-correctness", "--no-compiled"]
    benchmark.main([*CASE, *turns, "--out", str(file)])
    both = lines(file)
    assert list(dict.fromkeys(row["mode"] for row in both)) == ["throughput", "latency"]
    assert "correctness" not in {row["benchmark"] for row in both}
    benchmark.main([*CASE, *turns, "--modes=latency", "--out", str(file)])
    after = lines(file)
    assert after[: len(both)] == both
    assert {row["mode"] for row in after[len(both) :]} == {"latency"}


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, turns = tmp_path / "results.jsonl", iter([[1.0], [2.0]])

    def interrupted(*_: Any) -> list[float]:
        try:
            return next(turns)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(benchmark, "_turns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*CASE, "--no-correctness", "--out", str(file)])
    assert [row["time_s_median"] for row in lines(file)] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtypes", "fp8"], "argument --dtypes: 'fp8' is no dtype; needs some of float16"),
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--modes", "fast"], "argument --modes: 'fast' is no mode"),
        (["--C", "many"], "argument --C: 'many' is not an integer of at least 0"),
        (["--B", "0"], "argument --B: '0' is not an integer of at least 1"),
        (["--B", ","], "argument --B: ',' is empty"),
        (["--output-dtype", "fp16,fp32"], "is several dtypes"),
        (["--repeats", "0"], "argument --repeats: '0' is not an integer of at least 1"),
    ],
)
def test_bad_options_are_named(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(options)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
