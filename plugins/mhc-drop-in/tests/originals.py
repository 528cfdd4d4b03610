"""The source distributions of the two originals: fetched from PyPI, run, and not stored."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

PINNED = {
    "mhc-mlx": ("0.6.3", "af456d4861a682db887ab3ac4f70d36f459b6f156e2f19641921f6c3f7b1afcb"),
    "mlx-mhc": ("0.4.1", "0be5ea566355ec08829f71a8d3aa31513d0eb02596cd8f9a183a878f1326f7fb"),
}


@dataclass(frozen=True)
class Original:
    """An original, unpacked as its author published it."""

    name: str
    root: Path

    def run(self, code: str, *arguments: str | Path, folder: Path) -> str:
        """Run code that imports the original, not its stand-in."""
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        command = (sys.executable, "-c", code, *map(str, arguments))
        return checked(command, folder, environment)


def checked(command: tuple[str, ...], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fetch(name: str, folder: Path) -> Original:
    """Download a source distribution, whose hash pip checks, and unpack it."""
    version, digest = PINNED[name]
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--no-binary", name, "--require-hashes", "-r", str(wanted))
    checked((*pip, *options, "--dest", str(folder)), folder, dict(os.environ))
    (archive,) = folder.glob("*.tar.gz")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
    with tarfile.open(archive) as packed:
        packed.extractall(folder, **safely)  # the hash has vouched for it in any case
    (root,) = (path for path in folder.iterdir() if path.is_dir())
    return Original(name, root)
