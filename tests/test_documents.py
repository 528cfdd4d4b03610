"""The README and the pages of docs/ say only what is true.

Their code runs, their tables match the declarations, the README's figures are the recorded ones.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner

import mhc_core
from mhc_backends.kernels.launch import launch
from mhc_backends.kernels.table import VARIABLE
from mhc_core.cli import app
from mhc_core.cli.bench import Mode

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPS = (ROOT / "docs" / "ops.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
BENCH = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/*.md"))
]
RECORDS = ROOT / "docs" / "records"


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "code",
    [blocks("python")[0], *blocks("python", OPS)],
    ids=["README", "numpy", "jax", "mlx"],
)
def test_examples_run(code: str) -> None:
    assert len(code.strip().splitlines()) <= 16
    said = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert said, "a reader sees nothing"
    assert " ".join(run(code).split()) == " ".join(said)


@pytest.mark.parametrize("library", ["mlx.core", "jax.numpy"])
def test_the_example_of_the_readme_runs_on_the_libraries_that_it_names(library: str) -> None:
    code = blocks("python")[0]
    first = "import numpy as np  # or mlx.core, jax.numpy\n"
    assert code.startswith(first)
    assert library in first
    lines = [line for line in code.splitlines() if line]
    assert len(lines) == 8
    assert "(2, 8) (2, 4, 8)" in run(code.replace("import numpy", f"import {library}", 1))


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert len(commands) == 2
    for command in commands:
        assert command in script


# ---- the figures of the README -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mlx-cuda", "jax-cuda", "jax"])
def test_the_checks_are_those_of_the_record(backend: str) -> None:
    (link,) = re.findall(rf"\[{backend}\]\((docs/records/\S+\.json)\)", README)
    record = json.loads((ROOT / link).read_text())
    counts = record["summary"]
    assert counts["failed"] == 0
    shown = f"{counts['passed']} of {counts['passed']}( checks pass)? on `{backend}`"
    assert re.search(shown, README)
    library = {"mlx-cuda": "mlx", "jax-cuda": "jax", "jax": "jax"}[backend]
    assert f"{library.upper()} {record['versions'][library]}" in README
    assert record["devices"][backend] == "gpu, NVIDIA H200"


def test_the_times_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line[0] == "work")
    row = next(line for line in lines if line[0].startswith("sublayer forward and backward"))
    times = dict(zip(head, row, strict=True))
    assert f"takes {times['measured']} us" in README
    ours = sum(map(float, times["measured"].split(" to "))) / 2
    ratios = {name: float(times[name]) / ours for name in ("JAX", "TileKernels", "mlx-vlm")}
    said = re.search(
        r"and (\S+) times as long in jitted JAX, (\S+) in TileKernels, (\S+) in mlx-vlm", README
    )
    assert said
    assert [float(one) for one in said.groups()] == [
        float(f"{ratio:.2g}") for ratio in ratios.values()
    ]


# ---- pages ---------------------------------------------------------------------------------------


def test_backend_table() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| `([\w.]+)` \| ([^|]+) \| (yes|no) \|", SETTINGS, re.MULTILINE
    )
    declared = [
        (
            backend.name,
            *backend.spec.array_types,
            ", ".join(backend.spec.dtypes),
            "no" if "compile" in backend.spec.without else "yes",
        )
        for backend in mhc_core.backends().values()
        if backend.spec is not None and backend.spec.module.startswith("mhc_backends.")
    ]
    assert sorted(rows) == sorted(declared)


def test_every_mode_and_option_of_bench_is_in_its_table() -> None:
    command: Any = typer.main.get_command(app)
    parameters = {one.name: one for one in command.commands["bench"].params}
    modes = re.findall(r"^\| `(\w+)` \|", BENCH, re.MULTILINE)
    assert modes == [mode.value for mode in Mode]
    listed = set(re.findall(r"`(--[\w-]+)`", BENCH))
    assert listed <= {option for one in parameters.values() for option in one.opts}


CODE = [
    path.relative_to(ROOT).as_posix()
    for folder in ("mhc_core", "backends", "conformance", "examples", "plugins")
    for path in (ROOT / folder).rglob("*.py")
    if "tests" not in path.parts
]


def test_nothing_says_that_an_index_has_what_it_has_not() -> None:
    wrong = [
        f"{file}: pip install {command}"
        for file in [*PAGES, *CODE]
        for command in re.findall(r"pip install ([^`\n]+)", (ROOT / file).read_text("utf-8"))
        if re.search(r"(?<![/\w])mhc[-_]\w+", command)
    ]
    assert not wrong, "\n".join(wrong)


MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = MAP.split("| step | file | names |\n|---|---|---|\n")[1].split("\n\n")[0]
LIFE = re.findall(r"^\| [^|]+ \| `([\w/.]+\.py)` \| ([^|]+) \|$", TABLE, re.MULTILINE)


@pytest.mark.parametrize(("file", "names"), LIFE)
def test_the_life_of_a_call_goes_through_what_is_there(file: str, names: str) -> None:
    found: set[str] = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case _:
                pass
    named = re.findall(r"`(\w+)`", names)
    assert named
    assert set(named) <= found


def test_the_life_of_a_call_is_a_table_that_these_tests_read() -> None:
    assert len(LIFE) == len(TABLE.splitlines())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w-]+/[\w/.-]*)`", MAP))))
def test_every_file_of_the_architecture_is_there(path: str) -> None:
    folders = ROOT, ROOT / "backends" / "mhc_backends"  # a bare `kernels/` is a backend's
    assert any((folder / path).exists() for folder in folders)


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda file: file.name
)
def test_a_picture_has_words_for_those_who_do_not_see_it_and_both_schemes(file: Path) -> None:
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(file).getroot()
    assert root.tag == f"{svg}svg"
    assert root.get("viewBox")
    for name in ("title", "desc"):
        assert (root.findtext(f"{svg}{name}") or "").strip()
    assert "prefers-color-scheme: dark" in (root.findtext(f"{svg}style") or "")


def test_every_public_module_is_on_the_site() -> None:
    pages = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^\.\. automodule:: (\S+)$", pages, re.MULTILINE))
    modules = {f"mhc_core.{module.name}" for module in pkgutil.iter_modules(mhc_core.__path__)}
    public = {name for name in modules if "._" not in name} - {"mhc_core.cli"}
    assert shown >= public | {"mhc_core", "mhc_conformance", "mhc_torch"}


@pytest.mark.parametrize("file", ["README.md", "docs/kernels.md"])
def test_no_page_says_more_of_metal_than_was_seen(file: str) -> None:
    text = " ".join((ROOT / file).read_text().split())
    assert "verified by simulation, not yet run on Apple GPUs" in text
    assert "docs/kernels.md" in README


def test_the_tuning_file_of_the_docs_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/kernels.md").read_text(), re.DOTALL)
    (tmp_path / "tuning.json").write_text(text)
    sizes = (1, 4, 4096, "bfloat16")
    before = launch("combine", *sizes)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tuning.json"))
    assert launch("combine", *sizes) != before
    assert launch("combine", *sizes).threadgroup == (128, 1, 1)


def test_every_environment_variable_is_in_the_table() -> None:
    packages = [ROOT / "mhc_core", ROOT / "backends", ROOT / "conformance"]
    code = "".join(path.read_text() for root in packages for path in root.rglob("*.py"))
    used = set(re.findall(r"\"((?:MHC|MLX)_[A-Z0-9_]+)\"", code))
    listed = set(re.findall(r"^\| `((?:MHC|MLX)_[A-Z0-9_]+)` \|", SETTINGS, re.MULTILINE))
    assert used == listed


def test_help_has_every_op_with_its_formula() -> None:
    assert "`help(mhc)` has every op" in README
    text = " ".join(pydoc.plain(pydoc.render_doc(mhc_core)).replace("|", " ").split())
    for name in mhc_core.math.OPS:
        said = " ".join((getattr(mhc_core, name).__doc__ or "").split("Parameters")[0].split())
        assert f"{name}(" in text
        assert said in text


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"`mhc (\w+)", README + SETTINGS + BENCH)))
)
def test_commands_exist(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, result.output


def test_the_backends_command_lists_every_backend() -> None:
    result = CliRunner().invoke(app, ["backends"])
    assert result.exit_code == 0
    for name in mhc_core.backends():
        assert name in result.output
