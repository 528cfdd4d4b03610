"""Versions, tools and releases: all of the repository's files name the same ones."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from test_workflow import Strict, load, require

import mhc_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it where Python does not

ROOT = Path(__file__).parent.parent
BUILD = ROOT / ".ci" / "build_release.py"
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(file.stem for file in TEMPLATES.glob("*.yml") if file.stem != "config")
PROJECTS = sorted(
    file.parent for file in [ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")]
)
RELEASE = load(ROOT / ".github" / "workflows" / "release.yml")
PAPER = "https://arxiv.org/abs/2512.24880"


def toml(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def yml(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Strict)


needs_plugins = pytest.mark.skipif(
    not (ROOT / "plugins").exists(), reason="a source archive has no plugins"
)

# ---- one version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_every_project_is_built_with_the_version_of_the_core(folder: Path, tmp_path: Path) -> None:
    assert "version" not in toml(folder)["project"], "it is in mhc_core/__init__.py alone"
    code = "import sys, hatchling.build as b; b.prepare_metadata_for_build_wheel(sys.argv[1])"
    # hatchling leaves the hook out for pip, which would be here if pip had begun these tests
    clean = {key: value for key, value in os.environ.items() if key != "PIP_BUILD_TRACKER"}
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=folder, env=clean, check=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text(encoding="utf-8")
    assert f"\nVersion: {mhc_core.__version__}\n" in text
    assert "\nLicense-File: LICENSE\n" in text


@pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)
def test_every_project_has_the_same_license_text(folder: Path) -> None:
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    found = yml("CITATION.cff")
    project = toml(ROOT)["project"]
    assert str(found["version"]) == mhc_core.__version__
    assert found["license"] == project["license"]
    assert {one["name"] for one in found["authors"]} == {one["name"] for one in project["authors"]}
    (paper,) = found["references"]
    assert paper["url"] == project["urls"]["Paper"] == PAPER


def test_the_changelog_begins_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert first
    assert first[1] == mhc_core.__version__


# ---- a release -----------------------------------------------------------------------------------


@needs_plugins
def test_a_release_builds_and_publishes_every_project_the_core_first() -> None:
    built = runpy.run_path(str(BUILD))["projects"]()
    assert {name: toml(folder)["project"]["name"] for name, folder in built.items()} == {
        name: name for name in built
    }
    assert sorted(built.values()) == PROJECTS
    strategy = RELEASE["jobs"]["publish"]["strategy"]
    assert strategy["matrix"] == {"project": list(built)}
    assert (next(iter(built)), strategy["max-parallel"]) == ("mhc-core", 1)


def test_a_release_is_a_tag_and_only_its_last_job_may_publish() -> None:
    assert RELEASE["on"] == {"push": {"tags": ["v*"]}}
    assert RELEASE["permissions"] == {"contents": "read"}
    checks, build, publish = RELEASE["jobs"].values()
    assert "permissions" not in checks | build
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == ["checks", "build"]
    assert checks["uses"] == "./.github/workflows/linux.yml"
    # of projects that PyPI does not have yet, no two may wait for the same publisher
    assert publish["environment"] == "pypi-${{ matrix.project }}"
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert not re.search(r"secrets|password|token:", text.replace("id-token:", ""))


def test_what_is_built_is_what_is_published() -> None:
    _, build, publish = RELEASE["jobs"].values()
    (run,) = [step["run"] for step in build["steps"] if step.get("run", "").startswith("python")]
    *_, upload = build["steps"]
    download, upload_to_pypi = publish["steps"]
    folder = run.split()[-1]
    assert upload["with"]["path"] == download["with"]["path"] == folder
    assert upload["with"]["name"] == download["with"]["name"]
    action, version = upload_to_pypi["uses"].split("@v")
    assert action == "pypa/gh-action-pypi-publish"
    # hatchling writes metadata 2.5 since 1.32, which twine takes since 7.0 (pypa/twine/issues/1327)
    assert Version(version) >= Version("1.14.2")
    assert upload_to_pypi["with"] == {"packages-dir": f"{folder}/${{{{ matrix.project }}}}"}
    assert BUILD.name in (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "no check builds it"


def test_a_tag_of_another_version_builds_nothing(tmp_path: Path) -> None:
    tag = {"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v99.0"}
    command = [sys.executable, BUILD, tmp_path / "dist"]
    done = subprocess.run(command, env={**os.environ, **tag}, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"the tag is v99.0, but mhc_core.__version__ is {mhc_core.__version__}" in done.stderr
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tag", f"v{mhc_core.__version__}"), ("tag", "nightly"), ("branch", "v99.0")],
)
def test_no_other_ref_is_refused(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_REF_TYPE", kind)
    monkeypatch.setenv("GITHUB_REF_NAME", name)
    release = runpy.run_path(str(BUILD))
    release["refuse_another_tag"](release["version"]())


# ---- tools ---------------------------------------------------------------------------------------


def test_pre_commit_runs_a_ruff_that_every_project_takes() -> None:
    repos = {
        repo["repo"].rsplit("/", 1)[1]: repo for repo in yml(".pre-commit-config.yaml")["repos"]
    }
    ruff = repos["ruff-pre-commit"]
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]
    for folder in PROJECTS:
        extra = map(Requirement, toml(folder)["project"]["optional-dependencies"]["dev"])
        (bound,) = [one.specifier for one in extra if one.name == "ruff"]
        assert bound != SpecifierSet()
        assert Version(ruff["rev"]) in bound, folder


def test_editors_and_ruff_break_lines_at_the_same_place() -> None:
    text = (ROOT / ".editorconfig").read_text(encoding="utf-8")
    width = re.search(r"^\[\*\.py\]\nmax_line_length = (\d+)$", text, re.MULTILINE)
    assert width
    assert {toml(folder)["tool"]["ruff"]["line-length"] for folder in PROJECTS} == {int(width[1])}


@needs_plugins
def test_dependabot_looks_into_every_project_and_the_workflows() -> None:
    updates = {one["package-ecosystem"]: one for one in yml(".github/dependabot.yml")["updates"]}
    assert set(updates) == {"github-actions", "pip"}
    globs = [one.strip("/") for one in updates["pip"]["directories"]]
    seen = {path for glob in globs for path in (ROOT.glob(glob) if glob else [ROOT])}
    assert set(PROJECTS) <= seen


# ---- issues --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_every_issue_asks_for_the_machine_and_the_suite(name: str) -> None:
    form = yml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert set(form) == {"name", "description", "labels", "body"}
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert len(fields) == sum(field["type"] != "markdown" for field in form["body"])
    assert "`mhc info --json`" in fields["info"]["attributes"]["label"]
    assert fields["info"]["validations"] == {"required": True}
    assert "conformance" in fields
    text = yaml.dump(form, width=1000)
    for command in {
        *re.findall(r"`(mhc [^`]+)`", text),
        *re.findall(r"placeholder: (mhc .+)", text),
    }:
        require(command)


def test_there_is_a_form_for_each_kind() -> None:
    assert FORMS == ["backend", "bug", "wrong_numbers"]
    kind = yml(".github/ISSUE_TEMPLATE/wrong_numbers.yml")["name"]
    assert f'"{kind}"' in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_the_commands_of_these_pages_can_run(file: str) -> None:
    for command in re.findall(r"`(mhc [^`]+)`", (ROOT / file).read_text(encoding="utf-8")):
        require(command)
