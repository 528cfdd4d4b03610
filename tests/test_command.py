"""mhc conformance: its records, its exit code, its errors, and the text chain behind it."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mhc_conformance import chain as chains
from mhc_conformance import tolerances
from mhc_conformance.report import Report
from mhc_conformance.run import Plan
from mhc_core import math
from mhc_core.cli import app

if TYPE_CHECKING:
    from conftest import Plugins

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
    records = json.loads(file.read_text())["records"]
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
    assert not all(record["passed"] for record in json.loads(file.read_text())["records"])


def test_nothing_run_is_no_success() -> None:
    assert run("numpy", "--op", "combine", "--kind", "vmap").exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "combin"), "combine_pre"),
        (("--dtype", "float8"), "bfloat16"),
        (("--kind", "speed"), "checkpoint"),
        (("nmupy",), "'numpy'"),
        (("bug:deadtail",), "bug:dead-tail"),
        (("--report", "out.pdf"), ".html"),
        (("--mutations", "numpy"), "bug:NAME"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(
    arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_what_is_left_out_is_counted_with_its_reasons() -> None:
    result = run("numpy", "--op", "combine")
    assert "13 passed, 0 failed, 5 skipped" in result.output
    assert "skipped 1 x compile on numpy: NumPy has no compiler" in result.output
    counts = re.findall(r"skipped (\d+) x ", result.output)
    assert sum(map(int, counts)) == 5


# --- reports ----------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script> & \x1b[31m\x00"


@pytest.fixture
def reports(plugins: Plugins, tmp_path: Path) -> Any:
    """Report on NumPy beside a backend that raises, lacks and says what no page may take as is."""
    from mhc_backends.numpy import SPEC
    from mhc_backends.numpy import ops as right

    def raising(*_: Any) -> Any:
        raise ValueError(EVIL)

    functions = {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}
    without = dict.fromkeys(SPEC.without, f"no such thing, {EVIL}")
    functions["combine"] = raising
    plugins.backend("evil", functions, array_types=SPEC.array_types, without=without)
    files = {suffix: tmp_path / f"out.{suffix}" for suffix in ("json", "html", "xml", "junit")}
    options = [word for file in files.values() for word in ("--report", str(file))]
    result = run("numpy", "evil", "--op", "combine", "--seed", "4", *options)
    assert result.exit_code == 1
    return {suffix: file.read_text(encoding="utf-8") for suffix, file in files.items()}


def test_the_json_report_is_a_whole_record(reports: Any) -> None:
    whole = json.loads(reports["json"], parse_constant=lambda word: pytest.fail(word))
    assert whole["command"] == "mhc conformance numpy evil --op combine --seed 4"
    assert whole["seed"] == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", whole["date"])
    assert {"system", "processor", "cores", "python"} <= set(whole["machine"])
    assert whole["devices"] == {"numpy": "cpu", "evil": "cpu"}
    assert {"python", "mhc-core", "numpy"} <= set(whole["versions"])
    assert "mlx-metal" in whole["not_here"] or os.uname().sysname == "Darwin"
    counts = {
        "passed": sum(record["passed"] for record in whole["records"]),
        "failed": sum(not record["passed"] for record in whole["records"]),
        "skipped": len(whole["skipped"]),
    }
    assert whole["summary"] == counts
    assert min(counts.values()) > 0
    assert {skip["reason"] for skip in whole["skipped"] if skip["kind"] == "compile"} == {
        "NumPy has no compiler",
        f"no such thing, {EVIL}",
    }
    raised = [record for record in whole["records"] if not record["passed"]]
    assert {record["backend"] for record in raised} == {"evil"}
    assert all(EVIL in record["detail"] for record in raised if record["kind"] == "forward")
    assert all(record["error"] is None for record in raised if record["kind"] == "forward")


def test_the_junit_report_is_the_same(reports: Any) -> None:
    assert reports["xml"] == reports["junit"]
    whole = json.loads(reports["json"])
    suites = ElementTree.fromstring(reports["xml"])
    assert [suite.get("name") for suite in suites] == ["numpy", "evil"]
    cases = suites.findall(".//testcase")
    assert len(cases) == len(whole["records"]) + len(whole["skipped"])
    failures = suites.findall(".//failure")
    assert len(failures) == whole["summary"]["failed"]
    assert "<script>alert(1)</script> & " in (failures[0].text or "")
    assert " Again: mhc conformance evil --op combine" in (failures[0].text or "")
    skipped = [one.get("message") for one in suites.findall(".//skipped")]
    assert len(skipped) == whole["summary"]["skipped"]
    assert "NumPy has no compiler" in skipped
    told = {one.get("name"): one.get("value") for one in suites[0].findall(".//property")}
    assert told["command"] == whole["command"]
    assert told["seed"] == "4"
    for suite in suites:
        counted = (int(suite.get(name, "")) for name in ("tests", "failures", "skipped"))
        inside = (suite.findall(f".//{tag}") for tag in ("testcase", "failure", "skipped"))
        assert [*counted] == [len(found) for found in inside]


class _Page(HTMLParser):
    """The tags and the text of a page, and whether all that was opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_the_html_report_stands_by_itself_and_escapes(reports: Any) -> None:
    page = _Page(reports["html"])
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|url\(|@import", reports["html"])
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        page.tags
    )
    assert "prefers-color-scheme: dark" in reports["html"]
    assert "<script>alert(1)</script> & " in page.text
    assert "\x1b" not in reports["html"]
    whole = json.loads(reports["json"])
    for value in (whole["command"], whole["date"], whole["machine"]["processor"]):
        assert html.escape(str(value)) in reports["html"]
    assert "mhc conformance evil --op combine --dtype float32 --kind forward --seed 4" in page.text
    failed = f"{whole['summary']['failed']} failed"
    for word in ("NumPy has no compiler", "float64 oracle", failed, "repeated", "combine"):
        assert word in page.text


def test_reports_name_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("MHC_METAL_TUNING", "/home/somebody/tuning.json")
    skips: list[Any] = []
    report = Report("mhc conformance", 0, 1.0, ["numpy"], [], skips)
    assert report.as_dict()["settings"] == {"MHC_METAL_TUNING": "~/tuning.json"}


def test_the_whole_grid_has_every_op_dtype_and_the_chain() -> None:
    units = Plan(["numpy", "jax"]).units()
    for name, dtypes in (("numpy", 4), ("jax", 4)):
        mine = [unit for unit in units if unit.backend == name]
        assert {unit.op for unit in mine} == {*math.OPS, "chain"}
        for op in math.OPS:
            own = [unit for unit in mine if unit.op == op]
            assert len({unit.dtype for unit in own}) == len(own) == dtypes
            assert all({"forward", "gradient"} <= set(unit.kinds) for unit in own)


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
