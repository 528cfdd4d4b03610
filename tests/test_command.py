"""mhc conformance: its records, its exit code, its errors, and the text chain behind it."""

from __future__ import annotations

import dataclasses
import html
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import mhc_core
from mhc_conformance import chain as chains
from mhc_conformance import pool, tolerances
from mhc_conformance import run as run_module
from mhc_conformance.report import Report
from mhc_conformance.run import Plan
from mhc_core import math
from mhc_core.cli import _files, app

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
    assert "Reproduce: mhc conformance numpy --op combine --dtype float32 --kind forward" in (
        result.output.replace("\n", " ")
    )
    assert not all(record["passed"] for record in json.loads(file.read_text())["records"])


def test_nothing_run_is_no_success() -> None:
    assert run("numpy", "--op", "combine", "--kind", "vmap").exit_code != 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", "-1"), "--seed"),
        (("--seed", "²"), "--seed"),
        (("--report", "/no/such/folder/out.html"), "--report /no/such/folder/out.html cannot be"),
        (("--report", "/"), "needs one of"),
        (("--json", "/"), "--json / cannot be written"),
        (("--json", "out.json", "--report", "out.json"), "needs two files"),
        (("a[/b]\x1b[31m",), "no backend is named 'a[/b]"),
        (("--jbos", "3"), "see mhc conformance --help"),
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
    assert len(result.output.splitlines()) == 1
    assert "\x1b" not in result.output


@pytest.mark.parametrize("jobs", ["0", "-3", "1000000", "two", "9" * 5000])
def test_jobs_are_a_number_of_processes(jobs: str) -> None:
    result = CliRunner().invoke(app, ["conformance", "numpy", "--jobs", jobs])
    assert result.exit_code == 2
    assert "--jobs" in result.output
    assert len(result.output.splitlines()) == 1


def test_the_version_and_the_help() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"mhc {mhc_core.__version__}\n"
    alone = CliRunner().invoke(app, [])
    assert alone.exit_code == 2
    assert "conformance" in alone.output


def test_json_means_the_same_everywhere() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for option in command.params:
            if "--json" in option.opts:
                assert option.metavar == "[FILE]", name
                assert option.help.startswith("Write the numbers as JSON to this file"), name
    words = ("numpy", "--op", "combine", "--dtype", "float64", "--kind", "forward")
    for more in (("--json",), ("--json", "-")):
        done = CliRunner().invoke(app, ["conformance", *words, "--jobs", "1", *more])
        assert json.loads(done.stdout)["summary"] == {"passed": 1, "failed": 0, "skipped": 0}
        assert "1 passed" in done.stderr


# --- what comes from outside ------------------------------------------------------------------


def test_names_and_reasons_are_shown_as_they_are(plugins: Plugins) -> None:
    name, reason = "a[/b] :key: $x$", "[bold]no\x1b[31m\ndriver[/]"
    plugins.plugin("odd", [plugins.spec(name, missing=lambda: reason)])
    plugins.point("broken[/c]", "no_such[/d]")
    for command in ("backends", "info"):
        result = CliRunner().invoke(app, [command], env={"COLUMNS": "250"})
        assert result.exit_code == 0, result.output
        assert name in result.output
        assert "broken[/c]" in result.output
        assert "[bold]no\ufffd[31m" in result.output
        assert "\x1b" not in result.output


def test_a_backend_of_any_name_is_run(plugins: Plugins, tmp_path: Path) -> None:
    from mhc_backends.numpy import ops as right

    functions = {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}
    name = "a[/b] & <c>\x00"
    taken: Any = {"array_types": ("numpy.ndarray",), "ops": ("expand", "contract")}
    plugins.plugin("odd", [plugins.spec(name, functions, **taken)])
    files = [tmp_path / f"out.{suffix}" for suffix in ("html", "json", "xml")]
    options = [word for file in files for word in ("--report", str(file))]
    result = run(name, "--kind", "forward", *options)
    assert result.exit_code == 0, result.output
    assert "a[/b] & <c>\ufffd: worst error" in result.output
    assert "\x00" not in files[0].read_text()
    ElementTree.fromstring(files[2].read_text())


def test_what_two_ops_leave_out_is_grouped(plugins: Plugins) -> None:
    from mhc_backends.numpy import ops as right

    functions = {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}
    plugins.backend("two", functions, array_types=("numpy.ndarray",), ops=("expand", "contract"))
    result = run("two", "--kind", "forward")
    lines = [line for line in result.output.splitlines() if line.startswith("skipped")]
    assert len(lines) == 2
    count = 4 * (len(math.OPS) - 2)  # in four dtypes
    assert lines[0].startswith(f"skipped {count} x all checks on two: two has no aggregate, ")
    assert lines[1] == "skipped 6 x all checks on two: two has no float16, bfloat16, float64"


# --- runs that end badly ----------------------------------------------------------------------


def test_a_report_that_cannot_be_written_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    """Check a full disk: /dev/full can be opened, but not written."""
    monkeypatch.chdir(tmp_path)
    result = run("numpy", "--op", "expand", "--kind", "forward", "--json", "/dev/full")
    assert result.exit_code == 1
    assert "4 passed" in result.output
    said = result.output.splitlines()[-1]
    start = "/dev/full cannot be written: No space left on device; it is kept in "
    assert said.startswith(start)
    assert json.loads(Path(said.removeprefix(start)).read_text())["summary"]["passed"] == 4


def test_an_earlier_report_is_whole_or_replaced(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "out.json"
    file.write_text("earlier")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not _files.write(file, "new" * 9)
    assert file.read_text() == "earlier"
    (kept,) = (path for path in tmp_path.iterdir() if path != file)
    assert kept.read_text() == "new" * 9
    monkeypatch.undo()
    assert _files.write(file, "new")
    assert file.read_text() == "new"


def _mhc(words: str, where: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell, which sends its stdout somewhere, and print its exit code."""
    command = [sys.executable, "-c", "from mhc_core.cli import app; app()", *words.split()]
    line = f"{shlex.join(command)} {where}"
    settings = {**os.environ, "COLUMNS": "100", **environment}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}; echo code $? >&2"],
        capture_output=True,
        text=True,
        env=settings,
        check=False,
    )


FULL = "mhc: the output cannot be written: No space left on device"
QUICK = "conformance numpy --op expand --kind forward --dtype float64 --jobs 1"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("words", ["info", "backends", "--help", "conformance --help", "--version"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_full_screen_is_one_line(words: str, encoding: str) -> None:
    done = _mhc(words, "> /dev/full", PYTHONIOENCODING=encoding)
    assert done.stderr.splitlines() == [FULL, "code 1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_screen_loses_no_file(tmp_path: Path) -> None:
    for where, said in (("> /dev/full", [FULL]), ("2> /dev/full > /dev/full", []), (">&-", [])):
        file = tmp_path / "numbers.json"
        done = _mhc(f"{QUICK} --report {file}", where)
        kept = json.loads(file.read_text())
        assert kept["summary"]["passed"] == 1
        file.unlink()
        assert [line for line in done.stderr.splitlines() if line.startswith("mhc")] == said
        assert "Traceback" not in done.stderr


def test_a_pipe_that_nobody_reads(tmp_path: Path) -> None:
    """End quietly, but write what was asked for."""
    file = tmp_path / "numbers.json"
    for words in ("backends", "info --json", f"{QUICK} --json", f"{QUICK} --json {file}"):
        done = _mhc(words, "| true")
        assert "Traceback" not in done.stderr
        assert "Error" not in done.stderr
        assert done.stderr.splitlines()[-1] == "code 1"
    assert json.loads(file.read_text())["summary"]["passed"] == 1


def test_closed_streams_end_no_command() -> None:
    for where, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)):
        done = _mhc("info", f"{where} < /dev/null")
        assert done.stderr.splitlines()[-1] == f"code {code}"
        assert "Traceback" not in done.stderr
    assert _mhc("nonsense", "2>&-").stderr == "code 2\n"
    assert _mhc("nonsense", "2> /dev/full").stderr == "code 2\n"


def _ends_or_sleeps(task: str) -> Iterator[str]:
    yield f"{task} began"
    if task == "ends":
        os._exit(7)
    if task == "raises":
        raise mhc_core.UnsupportedError("no")
    if task == "sleeps":
        time.sleep(600)


def test_a_process_that_ends_fails_its_task_alone() -> None:
    events = list(pool.work(_ends_or_sleeps, ["ends", "goes on", "ends", "too"], 2))
    died = [event for event in events if isinstance(event, pool.Died)]
    assert [(event.task, event.exit_code) for event in died] == [("ends", 7)] * 2
    told = [event.news for event in events if isinstance(event, pool.Told)]
    assert sorted(told) == ["ends began", "ends began", "goes on began", "too began"]
    with pytest.raises(mhc_core.UnsupportedError):
        list(pool.work(_ends_or_sleeps, ["raises", "sleeps"], 2))
    assert not multiprocessing.active_children()


def test_what_a_dead_process_leaves_is_recorded() -> None:
    unit = run_module.Unit("mine", "pre", "float32", ("forward", "gradient"))
    records = [run_module._lost(unit, kind, 3, "forward", -11) for kind in unit.kinds]
    again = "Reproduce: mhc conformance mine --op pre --dtype float32 --kind {} --seed 3 --jobs 1"
    assert [record.detail for record in records] == [
        f"pre forward float32 on mine ended its process (exit code -11). {again.format('forward')}",
        "pre gradient float32 on mine was not tried: the process ended in forward. "
        + again.format("gradient"),
    ]
    assert not any(record.passed for record in records)


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads processes from /proc")
def test_ctrl_c_and_sigterm_end_the_run_and_its_processes() -> None:
    """Check that all processes end: in seconds on an idle machine; the bound is for a busy one."""
    words = [sys.executable, "-c", "from mhc_core.cli import app; app()", "conformance", "numpy"]
    for number in (signal.SIGINT, signal.SIGTERM):
        pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*words, "--jobs", "2"], **pipes) as process:
            until = time.monotonic() + 120
            while len(workers := _children(process.pid)) < 3 and time.monotonic() < until:
                time.sleep(0.05)  # two, and multiprocessing's own
            assert len(workers) == 3
            process.send_signal(number)
            _, said = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert "mhc conformance: stopped after " in said
        assert "Traceback" not in said
        until = time.monotonic() + 10
        while any(map(_alive, workers)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not [worker for worker in workers if _alive(worker)]


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_what_is_left_out_is_counted_with_its_reasons() -> None:
    result = run("numpy", "--op", "combine")
    assert "14 passed, 0 failed, 6 skipped" in result.output
    assert "skipped 1 x compile on numpy: NumPy has no compiler" in result.output
    heads = re.search("op .*", result.output)
    assert heads
    assert re.findall(r"b?float\d+", heads[0]) == ["float32", "float16", "bfloat16", "float64"]
    counts = re.findall(r"skipped (\d+) x ", result.output)
    assert sum(map(int, counts)) == 6


# --- reports ----------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script> & \x1b[31m\x00"


@pytest.fixture
def reports(plugins: Plugins, tmp_path: Path) -> Any:
    """Make reports on NumPy and a backend that raises, lacks ops, and needs its texts escaped."""
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
    assert " Reproduce: mhc conformance evil --op combine" in (failures[0].text or "")
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
    monkeypatch.setenv("MHC_KERNEL_TUNING", "/home/somebody/tuning.json")
    skips: list[Any] = []
    report = Report("mhc conformance", 0, 1.0, ["numpy"], [], skips)
    assert report.as_dict()["settings"] == {"MHC_KERNEL_TUNING": "~/tuning.json"}


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
    """Compare with central differences in float64, along a random direction of each parameter."""
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
