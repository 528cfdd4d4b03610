"""mhc bench: what it times and how, that all results agree first, and what its records contain."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mhc_core import graphs, selection
from mhc_core import math as ops
from mhc_core.cli import app, bench
from mhc_core.cli._baselines import BASELINES, Baseline
from mhc_core.cli.bench import _arrays, _library, _measure, _plot, _rows, _sides, _timing

SMALL = ("--T", "6", "--n", "2", "--C", "8", "--repeats", "2", "--calls", "1")
MLX = ("--backend", "mlx-compiled")
GB = 1e9


@pytest.fixture(autouse=True)
def _quick_collections() -> Generator[None]:
    """Leave what is there before a test out of the collections before each measurement."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library.Library, "copied_bytes", 2**16)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def measured(tmp_path: Path, *arguments: str, fails: bool = False) -> dict[str, Any]:
    file = tmp_path / "out.json"
    result = run(*arguments, "--json", str(file))
    assert result.exit_code == fails, result.output
    return json.loads(file.read_text())


def check_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    assert rows
    for row in rows:
        assert row["failed"] == "", row
        assert min(row["ms"], row["gb_per_s"], row["percent_of_copy"], row["ratio"]) > 0
        assert 0 <= row["apart"] < 3.5e-4


# ---- modes and libraries ------------------------------------------------------------------------


def test_latency_of_mlx(tmp_path: Path) -> None:
    report = measured(tmp_path, *SMALL, *MLX, "--vs", "mlx-vlm")
    check_rows(report["rows"])
    assert list(dict.fromkeys(row["row"] for row in report["rows"])) == list(_rows.rows())
    by_row = {
        name: [(r["side"], r["way"]) for r in report["rows"] if r["row"] == name]
        for name in ("combine", "sublayer fwd+bwd", "combine vjp", "static_layer")
    }
    assert by_row == {
        "combine": [("mlx-compiled", "call"), ("mlx-vlm", "call")],
        "sublayer fwd+bwd": [
            ("mlx-compiled", "mx.grad"),
            ("mlx-compiled", "mx.compile"),
            ("mlx-vlm", "mx.grad"),
            ("mlx-vlm", "mx.compile"),
        ],
        "combine vjp": [("mlx-compiled", "mhc.vjp"), ("mlx-vlm", "mx.compile")],
        "static_layer": [("mlx-compiled", "call")],
    }
    for row in report["rows"]:
        assert (row["T"], row["n"], row["C"], row["B"]) == (6, 2, 8, 1)
        assert row["ratio_to"].startswith("mlx-compiled")
        same = row["ratio_to"].endswith(row["way"]) or row["row"].endswith("vjp")
        assert same, "compared with another way of running it"


def test_throughput_of_jax(tmp_path: Path) -> None:
    rows = ("--row", "aggregate", "--row", "combine vjp")
    report = measured(tmp_path, *SMALL, "--mode", "throughput", "--backend", "jax", *rows)
    check_rows(report["rows"])
    assert {row["way"] for row in report["rows"]} == {"jax.jit", "mhc.vjp"}
    both = {row["ours"] for row in report["rows"] if row["row"] == "combine vjp"}
    assert both == {True, False}
    assert set(report["copy_gb_per_s"]) == {"jax"}


def test_numpy_has_no_steps_and_says_so(tmp_path: Path) -> None:
    report = measured(tmp_path, *SMALL, "--backend", "numpy", "--vs", "none")
    check_rows(report["rows"])
    names = [row["row"] for row in report["rows"]]
    assert names == [name for name in _rows.rows() if "fwd+bwd" not in name]
    assert any("numpy: without sublayer fwd+bwd" in note for note in report["notes"])


def test_every_op_has_a_row_when_asked_for(tmp_path: Path) -> None:
    made = _rows.rows_of_ops()
    assert {row.ops for row in made.values()} == {(op,) for op in ops.OPS if op != "expand"}
    chosen = [word for name in ("rms_norm", "sinkhorn vjp") for word in ("--row", name)]
    report = measured(tmp_path, *SMALL, "--backend", "numpy", "--vs", "none", *chosen)
    check_rows(report["rows"])
    assert [row["row"] for row in report["rows"]] == ["rms_norm", "sinkhorn vjp"]


def test_libraries_side_by_side(tmp_path: Path) -> None:
    several = ("--backend", "numpy", "--backend", "mlx-compiled", "--vs", "jax")
    report = measured(tmp_path, *SMALL, *several, "--row", "combine")
    check_rows(report["rows"])
    assert [row["side"] for row in report["rows"]] == ["numpy", "mlx-compiled", "jax"]
    assert set(report["copy_gb_per_s"]) == {"numpy", "mlx", "jax"}
    theirs = report["rows"][2]
    assert set(theirs["ratios"]) == {"numpy call", "mlx-compiled call"}
    assert theirs["ratio_to"] == "numpy call"


@pytest.mark.parametrize("backend", ["mlx-compiled", "jax"])
def test_train(tmp_path: Path, backend: str) -> None:
    sizes = ("--T", "16", "--n", "2", "--C", "2048", "--repeats", "2", "--calls", "1")
    named = ("--backend", backend, "--vs", "none")
    rows = _rows.TRAIN[1:2] if backend == "jax" else _rows.TRAIN  # XLA compiles for long
    chosen = [word for row in rows for word in ("--row", row)]
    report = measured(tmp_path, "--mode", "train", *sizes, *named, *chosen)
    check_rows(report["rows"])
    assert {row["row"] for row in report["rows"]} == set(rows)
    streams = 16 * 2 * 2048 * 4
    for row in report["rows"]:
        if backend == "jax":
            assert row["extra_bytes"] is None
        else:  # at least the output and dx
            assert 2 * streams <= row["extra_bytes"] < 100 * streams


@pytest.mark.parametrize("backend", ["mlx-compiled", "jax", "numpy"])
def test_decode(tmp_path: Path, backend: str) -> None:
    chosen = ("--depth", "2", "--T", "7", "--backend", backend)
    report = measured(tmp_path, *SMALL, "--mode", "decode", *chosen)
    check_rows(report["rows"])
    names = ["combine_pre chain", "static_layer chain"]
    assert list(dict.fromkeys(row["row"] for row in report["rows"])) == names
    sizes = _arrays.Sizes(1, 1, 2, 8, "float32")
    for row in report["rows"]:
        assert row["T"] == 1
        chain = _rows.decode_rows(2)[row["row"]]
        seconds = row["ms"] * chain.layers / 1e3  # ms are per sublayer
        assert row["gb_per_s"] == pytest.approx(chain.traffic(sizes) / seconds / GB)


def test_decode_takes_a_projection_of_its_own_for_each_sublayer() -> None:
    chain, sizes = _rows.decode_rows(4)["combine_pre chain"], _arrays.Sizes(1, 1, 2, 8, "float32")
    phis = [a for a in chain.make(sizes, np.random.default_rng(0)) if a.shape == (8, 16)]
    assert len(phis) == 4
    assert not np.array_equal(phis[0], phis[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path: Path, dtype: str) -> None:
    rows = ("--row", "sublayer fwd+bwd", "--row", "combine_pre")
    report = measured(tmp_path, *SMALL, "--dtype", dtype, *MLX, "--vs", "mlx-vlm", *rows)
    assert len(report["rows"]) == 6
    assert all(row["dtype"] == dtype and not row["failed"] for row in report["rows"])


def test_lists_of_sizes(tmp_path: Path) -> None:
    lists = ("--T", "2..3,3", "--B", "1", "--B", "2", "--C", "8,16", "--n", "2")
    dtypes = ("--dtype", "float32", "--dtype", "bfloat16")
    rest = ("--repeats", "1", "--calls", "1", "--row", "aggregate", "--backend", "numpy")
    report = measured(tmp_path, *lists, *dtypes, *rest)
    got = {(r["B"], r["T"], r["C"], r["dtype"]) for r in report["rows"]}
    assert len(report["rows"]) == len(got) == 16
    assert {size[0] for size in got} == {1, 2}


def test_options_as_mhc_mlx_spells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[_measure.Plan] = []
    measure = _measure.measure
    monkeypatch.setattr(_measure, "measure", lambda *a: plans.append(a[3]) or measure(*a))
    sizes = ("--B", "1,2", "--T", "1", "--n", "2", "--C", "8", "--dtypes", "bf16,float32")
    turns = ("--iters", "3", "--warmup", "2", "--repeats", "1")
    report = measured(tmp_path, *sizes, *turns, "--row", "aggregate", "--backend", "numpy")
    got = {(row["B"], row["dtype"]) for row in report["rows"]}
    assert got == {(B, dtype) for B in (1, 2) for dtype in ("bfloat16", "float32")}
    assert {(plan.calls, plan.warmup, plan.repeats) for plan in plans} == {(3, 2, 1)}


# ---- traffic ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "microseconds"),
    [("pre", 40), ("combine", 71), ("combine_pre", 80), ("sublayer fwd+bwd", 330)],
)
def test_traffic_is_the_floor(row: str, microseconds: float) -> None:
    """Check the floors at 4.2 TB/s, T=4096, n=4, C=4096, bfloat16, calculated by hand."""
    sizes = _arrays.Sizes(1, 4096, 4, 4096, "bfloat16")
    assert _rows.rows()[row].traffic(sizes) / 4.2e6 == pytest.approx(microseconds, rel=0.025)


def test_traffic_counts_every_byte() -> None:
    T, n, C = 3, 2, 8
    sizes = _arrays.Sizes(1, T, n, C, "bfloat16")
    streams, layer, post, res = 2 * T * n * C, 2 * T * C, 4 * T * n, 4 * T * n * n
    rows = _rows.rows()
    read = streams + layer + post + res
    assert rows["combine"].traffic(sizes) == read + streams
    assert rows["combine vjp"].traffic(sizes) == 2 * read + streams
    static = 4 * (2 * n + n * n + C)
    assert rows["static_layer"].traffic(sizes) == 2 * streams + static
    # x read, H_pre x written; x and y read, x' written; the mappings are one for all tokens
    assert rows["gated_layer"].traffic(sizes) == 5 * streams + 4 * (3 * n + n * n)
    assert rows["sublayer"].traffic(sizes) == (
        rows["pre"].traffic(sizes) + rows["combine"].traffic(sizes)
    )


# ---- inputs -------------------------------------------------------------------------------------


def test_inputs_are_random_never_zero_and_change(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    make = _rows.Row.make

    def spy(row: Any, sizes: Any, rng: Any) -> list[Any]:
        drawn = make(row, sizes, rng)
        seen.append(drawn)
        return drawn

    monkeypatch.setattr(_rows.Row, "make", spy)
    assert run(*SMALL, *MLX, "--vs", "mlx-vlm", "--row", "pre vjp").exit_code == 0
    assert len(seen) == _measure.DRAWS == 2
    for arrays in seen:
        assert len(arrays) == 4 + 3  # with the cotangents of all outputs
        assert all((array != 0).all() and array.std() > 0 for array in arrays)
    assert all(not np.array_equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_zeros_of_the_generator_are_replaced(dtype: str) -> None:
    def draws(value: float) -> Any:
        return SimpleNamespace(standard_normal=lambda size, dtype: np.full(size, value, dtype))

    for tiny in (0.0, 1e-30):
        made = _arrays.draw("x", (2, 3), dtype, draws(tiny))
        assert (made != 0).all()
        assert made.dtype == dtype


def test_large_inputs_do_not_repeat_from_token_to_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arrays, "POOL", 101)
    made = _arrays.draw("x", (50, 16), "float32", np.random.default_rng(0))
    assert len({row.tobytes() for row in made}) == 50


# ---- agreement ----------------------------------------------------------------------------------


def wrong(name: str, monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Replace functions of a baseline by others made from them."""
    right = BASELINES[name]

    def load() -> Mapping[str, Any]:
        own = right.load()
        return {**own, **{op: make(own[op]) for op, make in functions.items()}}

    monkeypatch.setitem(BASELINES, name, replace(right, load=load))


def test_a_wrong_baseline_is_found_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transposing(combine: Any) -> Any:
        return lambda x, y, p, h: combine(x, y, p, h.swapaxes(-1, -2))

    wrong("mlx-vlm", monkeypatch, combine=transposing)
    rows = ("--row", "combine", "--row", "pre")
    report = measured(tmp_path, *SMALL, *MLX, "--vs", "mlx-vlm", *rows, fails=True)
    found = {(row["row"], row["side"]): row for row in report["rows"]}
    theirs = found["combine", "mlx-vlm"]
    assert theirs["wrong"]
    assert theirs["ms"] is None
    assert "apart from mlx-compiled call;" in theirs["failed"]
    assert found["combine", "mlx-compiled"]["ms"] > 0
    assert found["pre", "mlx-vlm"]["ms"] > 0


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    def stopping(combine: Any) -> Any:
        return lambda x, *others: combine(x, *map(jax.lax.stop_gradient, others))

    wrong("jax", monkeypatch, combine=stopping)
    only = ("--backend", "jax", "--vs", "jax", "--row", "combine vjp")
    result = run(*SMALL, *only)
    assert result.exit_code == 1
    assert "one of the two is wrong" in result.output


@pytest.mark.parametrize("token", [0, -1])
def test_of_many_tokens_the_first_and_the_last_are_compared(
    monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    def spoiling(combine: Any) -> Any:
        def spoiled(*arrays: Any) -> Any:
            out = combine(*arrays)
            out[-1, token] = out[-1, token] + 1
            return out

        return spoiled

    wrong("mlx-vlm", monkeypatch, combine=spoiling)
    arguments = (*MLX, "--vs", "mlx-vlm", "--row", "combine", "--calls", "1", "--repeats", "1")
    result = run("--T", "100", "--n", "2", "--C", "8", *arguments)
    assert result.exit_code == 1
    assert "one of the two is wrong" in result.output


def test_a_sum_that_cancels_on_some_inputs_is_no_mistake() -> None:
    """Check results far apart on one draw and equal on the next: rounding, not a wrong formula."""
    sizes, row = _arrays.Sizes(1, 4, 2, 8, "float32"), _rows.rows()["aggregate"]
    side = _sides.our_side("numpy")
    right, *_ = _sides.entries(row, side)
    calls: list[int] = []

    def once(*arrays: Any) -> Any:
        calls.append(1)
        return right.function(*arrays) * (2 if len(calls) == 1 else 1)

    def always(*arrays: Any) -> Any:
        return right.function(*arrays) * 2

    every = [right, replace(right, function=once), replace(right, function=always)]
    inputs = _measure._Inputs(row, sizes, every, np.random.default_rng(0))
    lines = [_measure.Measured("", "", True, "", sizes) for _ in every]
    _measure._compare(every, lines, inputs, sizes)
    assert [line.wrong for line in lines] == [False, False, True]


def test_a_baseline_that_fails_is_reported_and_the_rest_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise MemoryError("no room in /home/jane")

        return fail

    wrong("mlx-vlm", monkeypatch, combine=failing)
    report = measured(tmp_path, *SMALL, *MLX, "--vs", "mlx-vlm", "--row", "combine")
    ours, theirs = report["rows"]
    assert ours["ms"] > 0
    assert theirs["failed"] == "MemoryError: no room in ~"
    assert not theirs["wrong"]


def test_a_backend_that_fails_sets_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(ops.load("aggregate"), "forward", fail)
    monkeypatch.setattr(selection, "_SELECTED", {})
    only = ("--backend", "numpy", "--row", "aggregate")
    report = measured(tmp_path, *SMALL, *only, fails=True)
    assert report["rows"][0]["failed"] == "MemoryError: no room"


# ---- the oracle ---------------------------------------------------------------------------------


def test_check(tmp_path: Path) -> None:
    rows = ("--row", "sublayer fwd+bwd", "--row", "static_layer")
    report = measured(tmp_path, *SMALL, *MLX, "--vs", "none", "--check", *rows)
    checks = report["check"]
    assert {one["op"] for one in checks} == {"pre", "combine", "static_layer"}
    assert {one["kind"] for one in checks} == {"forward", "gradient"}
    assert len(checks) == (3 + 4) + (1 + 4) + (1 + 5)  # outputs and gradients of the three ops
    assert all(one["passed"] and 0 <= one["error"] <= one["tolerance"] for one in checks)
    assert measured(tmp_path, *SMALL, *MLX, "--vs", "none", *rows)["check"] == []


def test_check_finds_a_wrong_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ops.load("combine")
    right = module.vjp

    def vjp(*arguments: Any, **static: Any) -> Any:
        dx, *others = right(*arguments, **static)
        return (dx * np.float32(1.001), *others)

    monkeypatch.setattr(module, "vjp", vjp)
    only = ("--backend", "numpy", "--vs", "none", "--check", "--row", "combine")
    report = measured(tmp_path, *SMALL, *only, fails=True)
    failed = [one for one in report["check"] if not one["passed"]]
    assert [one["what"].partition(" of ")[0] for one in failed] == ["d x"]
    assert report["rows"][0]["ms"] > 0


# ---- timing -------------------------------------------------------------------------------------


class Clock:
    """A library that counts its calls, and a function that takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 1.0) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.seconds = seconds
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(_timing, "time", clock)
        self.library: Any = SimpleNamespace(
            wait=self.wait, issue=self.issue, holds=False, at_once=2**32
        )

    def function(self, *_: Any) -> Any:
        self.log.append("call")
        return np.zeros(4, np.float32)

    def wait(self, _: Any) -> None:
        self.log.append("wait")
        self.now += self.seconds

    def issue(self, _: Any) -> None:
        self.log.append("issue")


def test_latency_waits_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert _timing.one_call(clock.function, (), clock.library, 3) == 1.0
    assert clock.log == ["call", "wait"] * (1 + 3)  # the first untimed


def test_calls_before_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    _timing.one_call(clock.function, (), clock.library, 3, warmup=4)
    assert clock.log == ["call", "wait"] * (4 + 3)
    clock = Clock(monkeypatch)
    _timing.stream_of_calls(clock.function, (), clock.library, 3, warmup=4)
    assert clock.log == ["call", "wait"] * 4 + ["call", "issue"] * 3 + ["wait"]


def test_throughput_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert _timing.stream_of_calls(clock.function, (), clock.library, 5) == 0.2
    assert clock.log[2:] == ["call", "issue"] * 5 + ["wait"]


def test_throughput_holds_what_would_otherwise_not_be_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    waited: list[Any] = []
    clock.library.holds, clock.library.wait = True, waited.append
    _timing.stream_of_calls(clock.function, (), clock.library, 5)
    assert len(waited[-1]) == 5


def test_a_turn_has_as_many_calls_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, calls in ((_timing.TURN / 10, 10), (1.0, 3), (1e-9, _timing.MOST)):
        clock = Clock(monkeypatch, seconds)
        _timing.stream_of_calls(clock.function, (), clock.library, None)
        assert clock.log.count("issue") == calls
    clock = Clock(monkeypatch)
    clock.library.at_once = 2 * 16
    _timing.stream_of_calls(clock.function, (), clock.library, 50)
    assert clock.log.count("issue") == 2  # results of 16 bytes


def test_what_may_be_under_way_follows_the_gpu() -> None:
    gib = 2**30
    assert _library._quarter({"total_memory": 64 * gib}) == 16 * gib  # as MLX calls it in CUDA
    assert _library._quarter({"memory_size": 32 * gib}) == 8 * gib  # and in Metal
    assert _library._quarter({"memory_size": 8 * gib}) == _library._quarter({}) == 4 * gib
    assert _library._quarter({"bytes_in_use": 9, "bytes_limit": 96 * gib}) == 24 * gib  # in JAX


def test_jax_takes_memory_as_it_needs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10**11})
    fake = SimpleNamespace(
        numpy=np, jit=lambda one: one, block_until_ready=abs,
        default_backend=lambda: "gpu", local_devices=lambda: [device],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "jax", fake)
    library = _library._jax()
    assert (library.accelerator, library.at_once) == (True, 10**11 // 4)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    nowhere = str(tmp_path / "nowhere" / "file.json")
    assert CliRunner().invoke(app, ["bench", "--json", nowhere]).exit_code == 2
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"  # before JAX is there


def test_torch_waits_for_a_gpu_that_is_not_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[str] = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: waited.append("yes"),
        get_device_properties=lambda: SimpleNamespace(total_memory=80 * 10**9),
        memory_allocated=lambda: 10,
        max_memory_allocated=lambda: 17,
        reset_peak_memory_stats=lambda: None,
    )
    cpu = SimpleNamespace(type="cpu")
    fake = SimpleNamespace(cuda=cuda, neg=abs, get_default_device=lambda: cpu)
    monkeypatch.setitem(sys.modules, "torch", fake)
    library = _library._torch()
    library.wait(None)
    assert (waited, library.accelerator, library.at_once) == (["yes"], True, 20 * 10**9)
    assert library.peak is not None
    assert library.peak(lambda: SimpleNamespace(is_cuda=True)) == 7
    assert library.peak(lambda: SimpleNamespace(is_cuda=False)) is None


class FakeCuda:
    """The part of torch.cuda that records graphs: a graph keeps what is called while it records."""

    def __init__(self) -> None:
        self.recording: list[Any] | None = None
        self.streams: list[str] = []

    def Stream(self) -> Any:  # as it is there
        return SimpleNamespace(wait_stream=lambda other: self.streams.append(f"new, {other.name}"))

    def current_stream(self) -> Any:
        return SimpleNamespace(name="present", wait_stream=lambda _: self.streams.append("present"))

    @contextlib.contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        self.streams.append("in")
        yield
        self.streams.append("out")

    def CUDAGraph(self) -> Any:
        kept: list[Any] = []
        return SimpleNamespace(kept=kept, replay=lambda: [launch() for launch in kept])

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.recording = graph.kept
        yield
        self.recording = None

    def launch(self, work: Any) -> None:
        """Do what a kernel does: run, or be recorded."""
        if self.recording is None:
            work()
        else:
            self.recording.append(work)


def test_a_graph_replays_its_launches_on_the_arrays_that_it_recorded() -> None:
    cuda = FakeCuda()
    calls: list[int] = []

    def doubled(array: Any) -> Any:
        calls.append(1)
        out = np.zeros_like(array)
        cuda.launch(lambda: np.multiply(array, 2, out=out))
        return out

    replayed = graphs.replayed(SimpleNamespace(cuda=cuda), doubled)
    one, two = np.array([1.0]), np.array([5.0])
    assert replayed(one).tolist() == [2.0]
    assert cuda.streams == ["new, present", "in", "out", "present"]
    assert len(calls) == 4  # three on the other stream, and the one that is recorded
    one[:] = 3.0
    assert replayed(one).tolist() == [6.0]
    assert len(calls) == 4
    assert replayed(two).tolist() == [10.0]
    assert replayed(one).tolist() == [6.0]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_way_of_torch_is_also_a_graph_where_its_arrays_are_on_a_gpu(on_gpu: bool) -> None:
    graph = lambda function: lambda *arrays: ("replayed", function(*arrays))  # noqa: E731
    side = replace(
        _sides.our_side("numpy"),
        library=replace(_library.library("numpy"), graph=graph),
        from_host=lambda _: SimpleNamespace(is_cuda=on_gpu),
    )
    found = list(_sides.entries(_rows.rows()["combine"], side))
    assert [(one.way, one.replayed) for one in found] == [
        ("call", False),
        *[("call, CUDA graph", True)] * on_gpu,
    ]


def test_a_copy_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, seconds=2.0)
    clock.library.copy = clock.function
    numbers = np.ones(250, np.float32)
    speed = _timing.copy_speed(clock.library, np.asarray, numbers, 1)
    assert speed == pytest.approx(2 * 1000 / (2.0 / 3))


@pytest.mark.parametrize("name", ["numpy", "mlx", "jax"])
def test_copies_write_new_numbers(name: str) -> None:
    import jax.numpy as jnp
    import mlx.core as mx

    library = _library.library(name)
    own = {"numpy": np.asarray, "mlx": mx.array, "jax": jnp.asarray}[name]
    array = own(np.arange(1, 9, dtype=np.float32))
    copied = library.copy(array)
    library.wait(copied)
    np.testing.assert_array_equal(np.abs(np.asarray(copied)), np.asarray(array))
    assert not np.shares_memory(np.asarray(copied), np.asarray(array))


def test_sides_take_turns_and_ratios_are_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    pace = {"numpy": iter([1.0, 8.0, 3.0]), "jax": iter([2.0, 2.0, 9.0])}

    def timer(function: Any, arrays: Any, library: Any, *_: Any) -> float:
        order.append(library.name)
        return next(pace[library.name])

    monkeypatch.setitem(_measure.TIMERS, "latency", timer)
    sides = [_sides.our_side("numpy"), _sides.our_side("jax")]
    plan = _measure.Plan(
        timer="latency", repeats=3, calls=None, memory=False, copy={"numpy": 1e9, "jax": 1e9}
    )
    sizes = _arrays.Sizes(1, 4, 2, 8, "float32")
    ours, other = _measure.measure(_rows.rows()["aggregate"], sides, sizes, plan)
    assert order == ["numpy", "jax", "jax", "numpy", "numpy", "jax"]
    assert (ours.ms, other.ms) == (3000.0, 2000.0)
    assert other.ratios["numpy call"] == statistics.median([2 / 1, 2 / 8, 9 / 3])
    traffic = _rows.rows()["aggregate"].traffic(sizes)
    assert ours.gb_per_s == pytest.approx(traffic / 3 / GB)
    assert ours.percent_of_copy == pytest.approx(100 * traffic / 3 / GB)


def test_every_side_gets_the_same_numbers() -> None:
    sides = [_sides.our_side("numpy"), _sides.our_side("jax"), _sides.our_side("mlx-compiled")]
    row, sizes = _rows.rows()["combine"], _arrays.Sizes(1, 4, 2, 8, "bfloat16")
    every = [entry for side in sides for entry in _sides.entries(row, side)]
    inputs = _measure._Inputs(row, sizes, every, np.random.default_rng(0))
    for turn in range(2):
        first, *others = ([e.side.to_host(a) for a in inputs.of(e, turn)] for e in every)
        for other in others:
            assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert not np.array_equal(inputs.of(every[0], 0)[0], inputs.of(every[0], 1)[0])


# ---- baselines ----------------------------------------------------------------------------------


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(BASELINES["mhc-mlx"], package="nobody_has_this")
    monkeypatch.setitem(BASELINES, "mhc-mlx", absent)
    only = ("--row", "static_layer", "--vs", "mhc-mlx")
    report = measured(tmp_path, *SMALL, *MLX, *only)
    assert [row["side"] for row in report["rows"]] == ["mlx-compiled"]
    assert report["notes"] == ["mhc-mlx: not compared, nobody_has_this is not installed"]


def test_a_baseline_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Any:
        raise AttributeError("module 'mlx_mhc' has no attribute 'ManifoldHyperConnection'")

    monkeypatch.setitem(BASELINES, "mlx-vlm", replace(BASELINES["mlx-vlm"], load=load))
    report = measured(tmp_path, *SMALL, *MLX, "--row", "combine", "--vs", "mlx-vlm")
    assert len(report["rows"]) == 1
    assert "mlx-vlm: not compared, AttributeError" in report["notes"][0]


def test_a_baseline_that_cannot_be_compiled_is_measured_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looking(combine: Any) -> Any:
        def looked(x: Any, y: Any, *others: Any) -> Any:
            float(others[-1].sum())  # raises under mx.compile
            return combine(x, y, *others)

        return looked

    wrong("mlx-vlm", monkeypatch, combine=looking, combine_pre=looking)
    changed = replace(BASELINES["mlx-vlm"], uncompilable="it looks at values")
    monkeypatch.setitem(BASELINES, "mlx-vlm", changed)
    only = (*MLX, "--vs", "mlx-vlm")
    report = measured(tmp_path, *SMALL, *only, "--row", "combine vjp", fails=False)
    assert [row["way"] for row in report["rows"]] == ["mhc.vjp", "call"]
    decode = ("--mode", "decode", "--depth", "2", "--row", "combine_pre chain")
    report = measured(tmp_path, *SMALL, *only, *decode)
    assert [(row["way"], row["failed"]) for row in report["rows"]] == [("call", "")] * 2
    assert "mlx-vlm: never compiled, it looks at values" in report["notes"]


@pytest.mark.parametrize("name", ["mhc-mlx", "mlx-mhc"])
def test_the_packages_agree_where_they_are_installed(tmp_path: Path, name: str) -> None:
    baseline: Baseline = BASELINES[name]
    rows = ("--row", "static_layer fwd+bwd", "--row", "gated_layer fwd+bwd")
    report = measured(tmp_path, *SMALL, *MLX, "--vs", name, *rows)
    theirs = {row["row"].partition(" ")[0] for row in report["rows"] if not row["ours"]}
    assert theirs == (set() if baseline.missing() else set(baseline.load()))
    check_rows(report["rows"])


# ---- files and words ----------------------------------------------------------------------------


def test_header_and_table() -> None:
    result = run(*SMALL, *MLX, "--vs", "mlx-vlm", "--row", "combine")
    for words in ("cores", "mlx: ", "Python 3", "mhc-core 0", "GB/s", "% of copy", "vs mlx-vlm"):
        assert words in result.output
    assert "copy (mlx): " in result.output
    assert "latency: T=6 n=2 C=8 float32" in result.output


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "mine.json", tmp_path / "out.json"
    words = [*SMALL, *MLX, "--vs", "none", "--row", "aggregate"]
    words += ["--report", str(file), f"--out={other}"]
    monkeypatch.setattr(sys, "argv", ["/home/jane/bin/mhc", "bench", *words])
    assert run(*words).exit_code == 0
    report = json.loads(file.read_text())
    assert report == json.loads(other.read_text())
    assert report["schema"] == 1
    assert report["command"] == " ".join(["mhc bench", *words[:-3]])
    assert report["date"].endswith("+00:00")
    assert report["versions"]["mlx"]
    assert report["devices"]["mlx"]
    assert report["machine"]["processor"]
    assert report["check"], "a record that is sent in says that the numbers are of right results"
    assert report["rows"][0]["ms"] > 0
    assert str(tmp_path) not in file.read_text()
    assert "jane" not in file.read_text()


def test_plot(tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    rows = ("--row", "combine", "--row", "combine_pre")
    result = run(*SMALL, *MLX, "--vs", "mlx-vlm", *rows, "--plot", str(picture))
    assert result.exit_code == 0, result.output
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_plot, "find_spec", lambda name: None)
    result = run(*SMALL, *MLX, "--plot", str(tmp_path / "out.png"))
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output
    assert "cores" not in result.output


def test_numbers_that_are_none_are_null_in_json() -> None:
    line = _measure.Measured("a", "b", True, "c", _arrays.Sizes(1, 2, 3, 4, "float32"))
    line.apart = math.inf
    told = line.as_dict()
    assert told["ms"] is None
    assert told["apart"] is None
    assert told["T"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--backend", "numpi"), 1, "numpy"),
        (("--vs", "nothing"), 2, "mlx-vlm"),
        (("--row", "combin"), 2, "combine_pre"),
        (("--mode", "train", "--row", "combine"), 2, "sublayer fwd+bwd"),
        (("--T", "1,0"), 2, "from 1 on"),
        (("--T", "4..2"), 2, "from 1 on"),
        (("--C", "many"), 2, "from 1 on"),
        (("--T", "²"), 2, "from 1 on"),
        (("--T", "٣"), 2, "from 1 on"),
        (("--B", "9" * 5000), 2, "from 1 on"),
        (("--C", "2147483647"), 2, "GiB for its inputs"),
        (("--mode", "decode", "--depth", "10000", "--C", "100000"), 2, "GiB for its inputs"),
        (("--plot", "out.xyz"), 2, ".png"),
        (("--json", "/no/such/folder/out.json"), 2, "--json /no/such/folder/out.json cannot be"),
        (("--report", "/dev/null/x"), 2, "--report /dev/null/x cannot be written"),
    ],
)
def test_errors(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert len(result.output.splitlines()) == 1


def test_the_help_lists_every_row() -> None:
    assert tuple(_rows.rows()) == bench.ROWS
    assert tuple(_rows.decode_rows(2)) == bench.CHAINS
    told = " ".join(run("--help").output.replace("│", " ").split())
    assert all(name in told for name in (*bench.ROWS, *bench.CHAINS))


def test_numbers_that_cannot_be_written_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    """Check a full disk after the run: /dev/full can be opened, but not written."""
    monkeypatch.chdir(tmp_path)
    result = run(*SMALL, *MLX, "--vs", "none", "--row", "aggregate", "--json", "/dev/full")
    assert result.exit_code == 1
    assert "GB/s" in result.output
    said = result.output.splitlines()[-1]
    start = "/dev/full cannot be written: No space left on device; it is kept in "
    assert said.startswith(start)
    assert json.loads(Path(said.removeprefix(start)).read_text())["rows"]


def test_json_alone_on_the_screen() -> None:
    done = run(*SMALL, *MLX, "--vs", "none", "--row", "aggregate", "--json")
    assert json.loads(done.stdout)["rows"]
    assert "GB/s" in done.stderr


def test_the_command_imports_no_array_library() -> None:
    code = "import sys, mhc_core.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"numpy", "jax", "mlx", "torch", "matplotlib", "ml_dtypes", "mhc_backends"}
    assert not heavy & set(done.stdout.split())


# ---- dispatch -----------------------------------------------------------------------------------


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
