"""Check what a wheel would put into someone's site-packages, and what a source archive has."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "mhc_core": ROOT / "mhc_core",
    "mhc_backends": ROOT / "backends" / "mhc_backends",
    "mhc_conformance": ROOT / "conformance" / "mhc_conformance",
}


def main(wheel: str) -> None:
    """Fail unless the wheel holds exactly the three packages, whole, and their entry points."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.split("/")[0] for name in names if name.endswith("METADATA"))
        points = archive.read(f"{info}/entry_points.txt").decode()
    top = {name.split("/")[0] for name in names}
    assert top == {*PACKAGES, info}, f"top-level names are {sorted(top)}"
    wanted = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if not name.startswith(info)}
    assert found == wanted, f"differs from the source in {sorted(found ^ wanted)}"
    assert "mhc_core/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert "mhc = mhc_core.cli:app" in points, "the command is not among the entry points"
    assert "mhc_core.backends" not in points, "built-ins need no entry points"
    print(f"{wheel}: {len(found)} files in {', '.join(sorted(PACKAGES))}")


def source(archive: str) -> None:
    """Fail if a source archive has any part of a plugin, or lacks a file that its tests read."""
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert not {name for name in names if name.startswith("plugins/")}
    for name in (
        "tests/conftest.py",
        ".ci/run",
        ".github/workflows/checks.yml",
        ".editorconfig",
        ".pre-commit-config.yaml",
        "CITATION.cff",
        "SECURITY.md",
        "pyproject.toml",
    ):
        assert name in names, f"{name} is not there"
    print(f"{archive}: {len(names)} files")


if __name__ == "__main__":
    for file in sys.argv[1:]:
        main(file) if file.endswith(".whl") else source(file)
