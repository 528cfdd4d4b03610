"""A project's process may print, raise, end or hang: one question is lost, and it is told why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mhc_core.cli import app
from mhc_peers import command, process, run
from mhc_peers.declaration import Op, Peer
from mhc_peers.run import Plan, Verdict
from mhc_peers.timing import starter

# What Python imports as it starts, in the process of the peer.
PROJECT = """
import contextlib, os, signal, sys, time
from types import SimpleNamespace
import numpy as np
from mhc_peers import child, libraries, registry
from mhc_peers.declaration import Peer

class Host(libraries.Compiled):
    torch = SimpleNamespace(set_num_threads=lambda count: None)
    def __init__(self, device): super().__init__()
    def wait(self, arrays): pass
    def take(self, array): return array
    give = take
    def forward(self, function, primals): return [np.float32(function(*primals))]

libraries.LIBRARIES["torch"] = Host
peer = Peer(name="rude", project="Rude", where="here", library="torch")

@peer.op("expand")
def expand(h, n):
    print("a line on stdout", flush=True)
    return np.repeat(h[..., None, :], n, -2)

@peer.op("aggregate")
def aggregate(x, h_pre):
    if x.shape[-2] == 4:
        raise ValueError("one line\\nand another")
    return np.einsum("...n,...nc->...c", h_pre, x)

@peer.op("rms_norm")
def rms_norm(x, weight, eps):
    if x.shape[-1] == 8:
        os.kill(os.getpid(), signal.SIGSEGV)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

@peer.op("contract")
def contract(x, how):
    if x.shape[-2] == 7:
        time.sleep(100)
    return x.sum(-2)

if "RUDE_GRAPHS" in os.environ:  # a GPU, whose graph does nothing but keep what it will do

    class Cuda:
        recorded = None
        CUDAGraph = type("Graph", (), {"replay": lambda self: [run() for run in self.recorded]})
        Stream = current_stream = lambda self: SimpleNamespace(wait_stream=lambda other: None)
        stream = lambda self, stream: contextlib.nullcontext()

        @contextlib.contextmanager
        def graph(self, graph):
            self.recorded = graph.recorded = []
            yield
            self.recorded = None

    def forward(self, function, primals):
        out, recorded = np.float32(function(*primals)), self.torch.cuda.recorded
        if recorded is not None:
            recorded.append(lambda: np.copyto(out, function(*primals)))
            out[...] = 0
        return [out]

    child.device = lambda peer: "cuda"
    Host.torch.cuda, Host.forward = Cuda(), forward

registry.peers = lambda: {"rude": peer}
registry.named.__globals__["peers"] = registry.peers
"""

BROKEN = """
import os, sys
print("RuntimeError: there is no such\x1b[31m device", file=sys.stderr, flush=True)
os._exit(3)
"""


@pytest.fixture
def rude(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Peer:
    """Return a peer that the process of its own knows too."""
    (tmp_path / "sitecustomize.py").write_text(PROJECT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "PATIENCE", 2.0)
    peer = Peer(name="rude", project="Rude", where="here", library="torch", dtypes=("float32",))
    for op in ("expand", "aggregate", "rms_norm", "contract"):
        fixed = {"contract": {"how": "sum"}, "rms_norm": {"eps": 1e-6}}.get(op, {})
        peer.ops[op] = Op(function=lambda: None, gradient=False, note="none", fixed=fixed)
    monkeypatch.setattr(Plan, "peers", lambda self: [peer])
    return peer


def test_one_question_is_lost(rude: Peer) -> None:
    (ran,) = run.run(Plan())
    told: dict[str, Verdict] = {
        v.op: v for v in ran.verdicts if (v.dtype, v.quantity) == ("float32", "forward")
    }
    assert told["expand"].outcome == "holds"
    assert "ValueError: one line and another" in told["aggregate"].why
    assert told["aggregate"].outcome == "off"
    assert "its process ended by SIGSEGV, on " in told["rms_norm"].why
    assert "there was no answer in 2 s, on " in told["contract"].why
    for op in ("rms_norm", "contract"):
        assert told[op].error is not None  # of the other cases
        assert told[op].error < 1e-6


def test_a_process_that_does_not_begin(rude: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Path(process.os.environ["PYTHONPATH"], "sitecustomize.py")
    broken.write_text(BROKEN)
    (ran,) = run.run(Plan())
    assert "there is no such" in ran.reason
    assert "\x1b" not in ran.reason


def test_all_of_a_process_ends_with_it(rude: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the one that waits, such as Ctrl-C, stops the one that runs."""
    started: list[process.subprocess.Popen[bytes]] = []

    def stopped(child: process.subprocess.Popen[bytes], results: Path) -> int:
        started.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_waited", stopped)
    with pytest.raises(KeyboardInterrupt):
        list(run.run(Plan()))
    assert started[0].returncode is not None


def test_the_bench_times_it_in_its_process(
    rude: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An op that prints is timed, and one that raises or ends the process is told."""
    start = starter(rude, lambda op: rude.ops[op].fixed)
    monkeypatch.setattr(command, "remotes", lambda: {"rude": ("torch", "what it is", start)})
    file, words = (
        tmp_path / "bench.json",
        ["--backend", "numpy", "--T", "4", "--C", "8", "--repeats", "2", "--json"],
    )
    rows = ["--row", "aggregate", "--row", "contract", "--row", "rms_norm"]
    done = CliRunner().invoke(app, ["bench", "--vs", "rude", *rows, *words, str(file)])
    assert done.exit_code == 0, done.output
    whole = json.loads(file.read_text())
    theirs = {row["row"]: row for row in whole["rows"] if not row["ours"]}
    assert theirs["contract"]["ms"] > 0
    assert theirs["contract"]["apart"] < 1e-6
    assert theirs["aggregate"]["failed"] == "RuntimeError: ValueError: one line and another"
    assert "its process ended with code -11" in theirs["rms_norm"]["failed"]
    assert "rude: what it is" in whole["notes"]
    wrong = CliRunner().invoke(app, ["bench", "--vs", "rude", "--checkout", "theirs=."])
    assert wrong.exit_code == 2
    assert "--checkout is 'theirs=.'; needs NAME=FOLDER" in " ".join(wrong.output.split())


def test_the_bench_replays_its_graphs_in_its_process(
    rude: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = starter(rude, lambda op: rude.ops[op].fixed)
    monkeypatch.setattr(command, "remotes", lambda: {"rude": ("torch", "what it is", start)})
    monkeypatch.setenv("RUDE_GRAPHS", "1")
    file, words = tmp_path / "bench.json", ["--backend", "numpy", "--C", "8", "--repeats", "2"]
    words += ["--T", "4,5", "--row", "contract", "--row", "aggregate", "--n", "3", "--json"]
    done = CliRunner().invoke(app, ["bench", "--vs", "rude", *words, str(file)])
    assert done.exit_code == 0, done.output
    theirs = [row for row in json.loads(file.read_text())["rows"] if not row["ours"]]
    assert [row["way"] for row in theirs] == ["call", "call, CUDA graph"] * 4
    assert all(row["ms"] > 0 and row["apart"] < 1e-6 for row in theirs)
