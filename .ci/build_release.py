"""Build a wheel and a source archive of the core and of every plugin, each in a folder of its own.

    python .ci/build_release.py FOLDER [options of python -m build]

For a tag, which CI names in the environment, the version must be the tag's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILED = ("mhc-jax-cuda",)  # whose wheel is for one platform
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def projects() -> dict[str, Path]:
    """Return the folder of each project by the project's name, the core first."""
    plugins = sorted(file.parent for file in ROOT.glob("plugins/*/pyproject.toml"))
    return {"mhc-core": ROOT, **{folder.name: folder for folder in plugins}}


def version() -> str:
    """Return the version that all projects have."""
    (found,) = VERSION.findall((ROOT / "mhc_core" / "__init__.py").read_text(encoding="utf-8"))
    return found


def refuse_another_tag(release: str) -> None:
    """Stop where CI builds a tag that is not this release's."""
    tag = os.environ.get("GITHUB_REF_NAME", "")
    tagged = os.environ.get("GITHUB_REF_TYPE") == "tag" and tag.startswith("v")
    if tagged and tag != f"v{release}":
        raise SystemExit(f"the tag is {tag}, but mhc_core.__version__ is {release}: tag v{release}")


def refuse_without_license(folder: Path, stem: str) -> None:
    """Stop unless a wheel and a source archive carry the license text."""
    text = (ROOT / "LICENSE").read_bytes()
    (path,) = folder.glob(f"{stem}-py3-none-*.whl")
    with zipfile.ZipFile(path) as wheel:
        name = f"{stem}.dist-info/licenses/LICENSE"
        in_wheel = wheel.read(name) if name in wheel.namelist() else b""
    with tarfile.open(folder / f"{stem}.tar.gz") as archive:
        name = f"{stem}/LICENSE"
        member = archive.extractfile(name) if name in archive.getnames() else None
        in_archive = member.read() if member else b""
    if (in_wheel, in_archive) != (text, text):
        raise SystemExit(f"{stem}: the wheel or the source archive has no LICENSE of this project")


def main(folder: Path, options: list[str]) -> None:
    """Build all projects into a folder and fail unless each left its two files there."""
    release = version()
    refuse_another_tag(release)
    for name, source in projects().items():
        out = folder / name
        subprocess.run(
            [sys.executable, "-m", "build", "--outdir", out, *options, source], check=True
        )
        stem = f"{name.replace('-', '_')}-{release}"
        tag = r"manylinux_\w+" if name in COMPILED else "any"
        wanted = [re.escape(f"{stem}.tar.gz"), rf"{re.escape(stem)}-py3-none-{tag}\.whl"]
        found = sorted((file.name for file in out.iterdir()), key=lambda name: name[-1] == "l")
        if len(found) != 2 or not all(map(re.fullmatch, wanted, found)):
            raise SystemExit(f"{out} has {sorted(found)}, not {sorted(wanted)}")
        refuse_without_license(out, stem)
    core = sorted((folder / "mhc-core").iterdir())
    subprocess.run([sys.executable, ROOT / ".ci" / "check_wheel.py", *core], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
