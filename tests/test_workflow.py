"""The workflow is valid for GitHub, and every command in it exists with its options."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import mhc_core
from mhc_core.cli import app

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").iterdir())
ACTION = re.compile(r"[\w-]+/[\w-]+@v\d+\.\d+\.\d+")
USAGE_ERROR = typer.BadParameter.__mro__[1]  # the base of what command lines get wrong


class Strict(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which the last would otherwise win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(map(str, keys))), f"twice: {keys}"
        return super().construct_mapping(node, deep)


def load(file: Path) -> dict[str, Any]:
    found = yaml.load(file.read_text(encoding="utf-8"), Strict)
    found["on"] = found.pop(True)  # what YAML 1.1 makes of the word
    return found


WORKFLOWS = {file.name: load(file) for file in FILES}
ALL = {f"{f}: {name}": job for f, flow in WORKFLOWS.items() for name, job in flow["jobs"].items()}
CALLS = {name: job for name, job in ALL.items() if "uses" in job}  # of another workflow
JOBS = {name: job for name, job in ALL.items() if name not in CALLS}
CHECKS = {name: job for name, job in JOBS.items() if not name.startswith("release.yml")}
STEPS = [step for job in JOBS.values() for step in job["steps"]]
METAL = WORKFLOWS["checks.yml"]["jobs"]["metal"]


# ---- what GitHub needs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(WORKFLOWS.keys() - {"release.yml"}))
def test_it_runs_on_pushes_and_pull_requests_and_may_only_read(name: str) -> None:
    flow = WORKFLOWS[name]
    assert set(flow) == {"name", "on", "permissions", "jobs"}
    called = {"linux.yml": {"workflow_call"}}
    assert set(flow["on"]) == called.get(name, {"push", "pull_request"})
    assert flow["permissions"] == {"contents": "read"}
    assert "secrets" not in (ROOT / ".github" / "workflows" / name).read_text()


@pytest.mark.parametrize("name", CALLS)
def test_a_workflow_that_is_called_is_there_and_can_be_called(name: str) -> None:
    assert set(CALLS[name]) == {"name", "uses"}
    file = ROOT / CALLS[name]["uses"]
    assert "workflow_call" in WORKFLOWS[file.name]["on"]


def test_every_check_on_linux_is_one_script_that_a_release_runs_too() -> None:
    assert {name.partition(":")[0] for name in CALLS} == {"checks.yml", "release.yml"}
    (job,) = WORKFLOWS["linux.yml"]["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


@pytest.mark.parametrize("name", JOBS)
def test_jobs_name_their_machine_and_end(name: str) -> None:
    job = JOBS[name]
    assert re.fullmatch(r"(ubuntu|macos)-\d+(\.\d+)?", job["runs-on"])
    assert 0 < job["timeout-minutes"] <= 60


@pytest.mark.parametrize("name", CHECKS)
def test_checks(name: str) -> None:
    job = CHECKS[name]
    assert set(job) == {"name", "runs-on", "timeout-minutes", "strategy", "steps"}
    assert job["strategy"]["matrix"] == {"python": ["3.10", "3.12"]}  # as text: 3.10 is 3.1
    used = set(re.findall(r"\$\{\{ (.*?) \}\}", str(job)))
    assert used <= {"matrix.python", "!cancelled()"}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.get("name") or step["uses"])
def test_steps(step: dict[str, Any]) -> None:
    assert len({"uses", "run"} & set(step)) == 1
    assert set(step) <= {"name", "uses", "run", "with", "if"}  # none may fail unnoticed
    assert ("with" in step) <= ("uses" in step)
    assert "uses" not in step or ACTION.fullmatch(step["uses"])


def test_metal_is_tried_before_anything_is_measured_and_reports_are_kept() -> None:
    assert int(METAL["runs-on"].removeprefix("macos-")) >= 14  # the first on Apple silicon
    runs = [step["run"] for step in METAL["steps"] if "run" in step]
    words = [" ".join(shlex.split(run)[:2]) for run in runs]
    assert words[1:] == [
        "python -m",
        "python .ci/compile_metal.py",
        "mhc info",
        "python .ci/require_metal.py",
        "mhc conformance",
        "mhc bench",
    ]
    (*_, folder), (*_, compiled, log) = map(shlex.split, runs[1:3])
    assert compiled == folder
    assert {"mlx-metal", "mlx-compiled"} <= set(shlex.split(runs[5]))
    written = [
        file for run in runs[5:] for option, file in pairs(shlex.split(run)) if option == "--report"
    ]
    *_, upload = METAL["steps"]
    assert upload["with"]["path"].split() == [log, *written]
    assert upload["with"]["if-no-files-found"] == "error"


def pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(itertools.pairwise(words))


def test_no_step_is_left_out_but_none_is_skipped() -> None:
    conditions = [step["if"] for step in STEPS if "if" in step]
    assert conditions == ["${{ !cancelled() }}"]  # reports are kept of what failed, too


# ---- every command exists ------------------------------------------------------------------------


def require(command: str) -> None:
    """Raise unless a command line can run exactly as it is written."""
    program, *words = shlex.split(command)
    checks = {"mhc": mhc, "pip": pip, "pytest": files, "bash": files, "python": python}
    assert program in checks, f"{program} is unknown; teach this test how to check it"
    checks[program](words)


def mhc(words: list[str]) -> None:
    """Parse arguments as the command would, and look up the backends that they name."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    parsed = command.make_context(words[0], words[1:]).params
    named = [*(parsed.get("backends") or ()), *(parsed.get("backend") or ())]
    assert set(named) <= set(mhc_core.backends()), named


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    if words[1:] == ["build"]:  # what packages a release needs nothing of the project
        return
    assert words[1::2] == ["-e"] * (len(words) // 2), "only this project is installed by hand"
    found = re.fullmatch(r"\.\[([\w,-]+)\]", words[2])
    assert found, words[2]
    assert set(found[1].split(",")) <= set(metadata("mhc-core").get_all("Provides-Extra") or ())
    for plugin in words[4::2]:
        assert (ROOT / plugin / "pyproject.toml").exists(), f"there is no plugin {plugin}"


def python(words: list[str]) -> None:
    """Find the module or the script, and each file or folder that no earlier step writes."""
    if words[0] == "-m":
        package, _, module = words[1].partition(".")
        assert (ROOT / "plugins" / package.replace("_", "-") / package / f"{module}.py").exists(), (
            words
        )
        return
    files(words[:1])
    if words[0] == ".ci/build_release.py":  # its folder is written, not read
        assert len(words) == 2
        return
    steps = [shlex.split(step["run"]) for step in METAL["steps"] if "run" in step]
    if words[1:]:  # what it reads must be written before
        assert ["python", *words] in steps, f"the workflow has no {words}"
        before = steps[: steps.index(["python", *words])]
        assert words[1] in {word for step in before for word in step}, words


def files(words: list[str]) -> None:
    assert words, "needs a file"
    for word in words:
        assert (ROOT / word).exists(), f"there is no {word}"


@pytest.mark.parametrize("command", [step["run"] for step in STEPS if "run" in step])
def test_every_command_can_run(command: str) -> None:
    assert len(command.splitlines()) == 1
    assert not set("|&;<>$`") & set(command), "a step is one command, so that none fails unseen"
    require(command)


DOCS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", "".join(re.findall(r"```bash\n(.*?)```", DOCS, re.S)).splitlines()
)
def test_every_command_about_kernels_can_run(command: str) -> None:
    if "mlx-metal-simulator" in command and "mlx-metal-simulator" not in mhc_core.backends():
        command = command.replace("mlx-metal-simulator", "mlx-metal", 1)
    require(command)


def test_the_docs_ask_of_a_mac_what_the_workflow_runs() -> None:
    runs = [step["run"] for step in METAL["steps"] if "run" in step]
    commands = [run for run in runs[1:] if "require" not in run and run != "mhc info"]
    assert set(commands) <= set(DOCS.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        "mhc conform",
        "mhc conformance mlx-metl",
        "mhc conformance --repot out.html",
        "mhc bench --backend mlx-mettal",
        "mhc bench --dtype float8",
        "mhc info --T none",
        'pip install -e ".[mxl]"',
        'pip install -e ".[mlx]" -e plugins/mhc-mettle',
        'pip install -e ".[mlx]" numpy',
        "python -m mhc_metal_simulator.text texts",
        "python .ci/compile_metal.py text metal.log",
        "pip install mlx",
        "pip install build mlx",
        "bash .ci/runn",
        "pytest tests/test_nothing.py",
        "python .ci/require_mettle.py",
        "python .ci/build_releases.py dist",
        "make check",
    ],
)
def test_a_command_that_does_not_exist_is_seen(command: str) -> None:
    with pytest.raises((AssertionError, KeyError, USAGE_ERROR)):
        require(command)


# ---- no Metal, no success ------------------------------------------------------------------------

REQUIRE = ROOT / ".ci" / "require_metal.py"


@pytest.mark.skipif(sys.platform == "darwin", reason="it may have a Metal GPU")
def test_without_metal_it_stops_and_says_why() -> None:
    done = subprocess.run([sys.executable, REQUIRE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "mlx-metal cannot run here: Metal kernels need macOS" in done.stderr


def test_a_device_that_leaves_zeros_is_found_out() -> None:
    import mlx.core as mx

    wrong = runpy.run_path(str(REQUIRE))["wrong"]

    def launcher(factor: float) -> Any:
        def kernel(*, inputs: Any, **_: Any) -> Any:
            return [factor * inputs[0]]

        return lambda **_: kernel

    assert wrong(mx, launcher(2.0)) is None
    assert "doubles 1, 2, 3 gives [0.0, 0.0, 0.0]" in wrong(mx, launcher(0.0))


# ---- Apple's compiler ----------------------------------------------------------------------------

COMPILE = ROOT / ".ci" / "compile_metal.py"


@pytest.fixture
def toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put commands with Apple's names on the path, which record how they are called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    # refuses texts with the word BAD in them, and is not there before it was downloaded
    (commands / "xcrun").write_text(
        f"""#!/bin/sh
echo "xcrun $*" >> {tmp_path}/calls
if [ ! -e {tmp_path}/here ]; then echo "cannot execute tool 'metal'" >&2; exit 1; fi
if [ "$4" = --version ]; then echo "Apple metal version 1"; exit 0; fi
if grep -q BAD "$7"; then echo "$7:1:1: error: BAD" >&2; exit 1; fi
"""
    )
    (commands / "xcodebuild").write_text(
        f'#!/bin/sh\necho "xcodebuild $*" >> {tmp_path}/calls\ntouch {tmp_path}/here\n'
    )
    for command in commands.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    (tmp_path / "texts").mkdir()
    return tmp_path


def compile_texts(folder: Path, **texts: str) -> subprocess.CompletedProcess[str]:
    for name, text in texts.items():
        (folder / "texts" / f"{name}.metal").write_text(text)
    command = [sys.executable, COMPILE, folder / "texts", folder / "metal.log"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_texts_are_compiled_in_both_versions_without_fast_math(toolchain: Path) -> None:
    (toolchain / "here").touch()
    done = compile_texts(toolchain, one="a", two="b")
    assert (done.returncode, done.stdout) == (0, "4 of 4 taken, 0 refused\n")
    log = (toolchain / "metal.log").read_text()
    assert "Apple metal version 1" in log
    assert log.count("taken: metal3.1 ") == log.count("taken: metal3.2 ") == 2
    calls = (toolchain / "calls").read_text()
    assert "xcodebuild" not in calls
    for standard in ("metal3.1", "metal3.2"):
        assert f"xcrun -sdk macosx metal -std={standard} -fno-fast-math -c " in calls


def test_a_refused_text_fails_and_is_in_the_log(toolchain: Path) -> None:
    (toolchain / "here").touch()
    done = compile_texts(toolchain, one="a", two="BAD")
    assert done.returncode == 1
    assert "2 of 4 taken, 2 refused" in done.stdout
    assert "two.metal:1:1: error: BAD" in done.stdout
    log = (toolchain / "metal.log").read_text()
    assert "refused: metal3.1 two.metal" in log
    assert "error: BAD" in log


def test_the_compiler_is_downloaded_where_xcode_comes_without(toolchain: Path) -> None:
    done = compile_texts(toolchain, one="a")
    assert done.returncode == 0, done.stderr
    assert "xcodebuild -downloadComponent MetalToolchain" in (toolchain / "calls").read_text()


def test_without_a_compiler_or_a_text_it_stops_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    done = compile_texts(tmp_path)
    assert done.returncode == 1
    assert "there is no text in" in done.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    done = compile_texts(tmp_path, one="a")
    assert done.returncode == 1
    assert "Apple's compiler for Metal is not here" in done.stderr


# ---- the oldest versions ------------------------------------------------------------------------


def test_every_requirement_has_a_lower_bound_that_pip_takes() -> None:
    bounds = runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))
    found = list(bounds["constraints"]())
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+(; .*)?", line) for line in found), found
    assert {"typer", "safetensors", "hatchling", "hypothesis"} <= {
        one.split("==")[0] for one in found
    }
    with pytest.raises(SystemExit, match="'rich' has no lower bound"):
        bounds["lowest"]("rich")
