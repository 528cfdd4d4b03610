"""A run as people make it: each project in a process of its own, and the table of all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mhc_core
from mhc_conformance.flashinfer import definitions
from mhc_conformance.golden import Golden, golden_cases
from mhc_conformance.naming import UNEXPLAINED
from mhc_core.cli import app
from mhc_core.cli._command import Stopped
from mhc_peers import command
from mhc_peers.command import names, timed
from mhc_peers.registry import named, peers
from mhc_peers.run import Plan, Ran, Verdict, field_of, run
from mhc_peers.targets import NotRunError, interpreter

DONE = ("forward", "holds", 0.0, 0.0, 1)
SMALL = ("tile-kernels", "hyper-connections")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the JSON, the page and the screen of one run of the command."""
    folder = tmp_path_factory.mktemp("run")
    files = ["--json", str(folder / "field.json"), "--report", str(folder / "field.html")]
    ops = ["--op", "sinkhorn", "--op", "expand", "--op", "static_layer"]
    asked = ["conformance", "--peers", *SMALL, *ops, "--dtype", "float32", *files]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    whole = json.loads((folder / "field.json").read_text())
    return {"json": whole, "html": (folder / "field.html").read_text(), "screen": done.output}


def test_right_ops_hold_and_wrong_ones_are_named(made: dict[str, Any]) -> None:
    told = {(v["peer"], v["op"], v["quantity"]): v for v in made["json"]["verdicts"]}
    for quantity in ("forward", "gradient"):
        assert told["tile-kernels", "sinkhorn", quantity]["outcome"] == "holds"
        assert told["hyper-connections", "sinkhorn", quantity]["outcome"] == "holds"
        wrong = told["hyper-connections", "static_layer", quantity]
        assert wrong["outcome"] == "off"
        assert wrong["why"].startswith("sums-floored")
        assert "beyond exp's range" in wrong["where"]


def test_the_table_says_what_ran(made: dict[str, Any]) -> None:
    whole = made["json"]
    assert whole["projects"] == ["TileKernels", "hyper-connections"]
    assert whole["with_gradients"] == whole["projects"]
    versions = {peer["name"]: peer["versions"] for peer in whole["peers"]}
    assert versions["tile-kernels"]["tile-kernels"] == "2.1.0"
    assert versions["hyper-connections"]["hyper-connections"] == "0.4.11"
    assert whole["lacking"]["tile-kernels"] == ["static_layer"]
    for text in ("sums-floored", "hyper-connections", "tile_kernels/torch/mhc.py"):
        assert text in made["html"]
    assert "2 projects, 2 with gradients" in made["screen"]


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (ran,) = run(Plan(("megatron-lm",), ("combine",)))
    assert "--checkout megatron-lm=FOLDER" in ran.reason
    assert {one.outcome for one in ran.verdicts} == {"not run"}
    monkeypatch.setenv("MHC_PEERS_PYTHON_3_12", str(tmp_path / "python"))
    monkeypatch.setattr("sys.version_info", (3, 11, 7))
    with pytest.raises(NotRunError, match=r"needs Python 3\.12"):
        interpreter(named("tokamax"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["transformer"], "did you mean 'transformers"),
        (["--checkout", "somewhere"], "--checkout is 'somewhere'; needs NAME=FOLDER"),
        (["liger", "--checkout", "maxtext=."], "--checkout maxtext came without --peers maxtext"),
        (["maxtext", "--checkout", "maxtext=."], "needs a folder with src/maxtext/layers/mhc.py"),
        (["liger", "--op", "combined"], "--op is 'combined'; needs one of"),
        (["liger", "--dtype", "float64"], "--dtype is 'float64'; needs one of float32, bfloat16"),
        (["liger", "--kind", "second"], "--kind is 'second'; needs one of forward, gradient"),
    ],
)
def test_wrong_words_name_the_right_ones(words: list[str], says: str) -> None:
    told = CliRunner().invoke(app, ["conformance", "--peers", *words])
    assert told.exit_code == 2
    assert says in " ".join(told.output.split())


def test_what_is_done_is_kept_when_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*given: Any) -> Iterator[Ran]:
        peer = named("tile-kernels")
        yield Ran(peer, [Verdict(peer.name, peer.project, "expand", "float32", *DONE)], {}, "cpu")
        raise Stopped(130)

    monkeypatch.setattr(command, "running", stopped)
    file = tmp_path / "field.json"
    with pytest.raises(Stopped):
        app(["conformance", "--peers", "--json", str(file)], standalone_mode=False)
    (kept,) = json.loads(file.read_text())["verdicts"]
    assert (kept["op"], kept["outcome"]) == ("expand", "holds")


@pytest.mark.parametrize("name", list(peers()))
def test_every_adapter_declares_what_the_ops_have(name: str) -> None:
    peer = named(name)
    for op, declared in peer.ops.items():
        cases = golden_cases(field_of(op, declared, peer))
        assert len(cases) >= 3
        taken = declared.function.__code__.co_varnames[: declared.function.__code__.co_argcount]
        for case in cases:
            assert set(taken) == {*case.names, *case.options}, (op, case.name)
    assert peer.ops
    assert peer.pins or peer.checkout
    assert all("==" in pin for pin in peer.pins)


def test_bench_takes_the_adapters() -> None:
    assert set(SMALL) < set(timed()) < set(names())


def test_the_references_of_flashinfer_compute_the_ops() -> None:
    n, C = 4, 12
    post, pre = definitions(mhc_core.DEEPSEEK_V4, n, C).values()
    for one, op in ((post, "combine"), (pre, "pre")):
        code: dict[str, Any] = {}
        exec(compile(one["reference"], one["name"], "exec"), code)
        case = next(
            c
            for c in golden_cases(
                field_of(op, named("tile-kernels").ops[op], named("tile-kernels"))
            )
            if c.sizes.n == n
        )
        drawn = Golden(case, "float32", 0)
        arrays = {
            name: torch.from_numpy(np.array(array))
            for name, array in zip(case.names, drawn.primals, strict=True)
        }
        if op == "combine":
            x, y, h_post, h_res = arrays.values()
            found = (code["run"](y, x, h_post, h_res.mT),)
        else:
            x, phi, scale, bias = arrays.values()
            made = code["run"](x.flatten(-2) @ phi.T, x, scale, bias)
            found = (made[2], made[0].squeeze(-1), made[1].mT)
        for want, got in zip(drawn.want("forward"), found, strict=True):
            assert want.error(got.numpy()) <= want.limit


def test_the_page_shows_the_record() -> None:
    """Each project is compared, with gradients, and whatever is off has a name."""
    docs = Path(__file__).parents[3] / "docs"
    record = json.loads((docs / "records/field-2026-11-30.json").read_text())
    page = (docs / "findings/index.md").read_text()
    assert len(record["projects"]) >= 10
    assert record["with_gradients"] == record["projects"]
    assert [peer["name"] for peer in record["peers"]] == list(peers())
    for project in record["projects"]:
        mine = [one for one in record["verdicts"] if one["project"] == project]
        off = [one["why"].partition(":")[0] for one in mine if one["outcome"] == "off"]
        holds = sum(one["outcome"] == "holds" for one in mine)
        names = ", ".join(dict.fromkeys(off)) or "-"
        assert f"| {project} | {holds} | {len(off)} | {names} |" in page
        assert not any(UNEXPLAINED in name for name in off)
