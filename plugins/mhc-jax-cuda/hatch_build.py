"""Build the library from mhc-core's sources, with jaxlib's headers and without any of CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
STATIC = (  # else the wheel needs the builder's libstdc++; and no more of it than is used
    *("-static-libstdc++", "-static-libgcc"),
    *("-Wl,--gc-sections", "-Wl,--exclude-libs,ALL", "-s"),
)


class Library(BuildHookInterface):
    """The hook that hatchling runs before it packs a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build cuda.so in the package, and name the oldest Linux that can load it."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        folders = (root / "native", root.parents[1] / "backends" / "mhc_backends" / "jax_cuda")
        sources = next(folder for folder in folders if (folder / "cuda.cpp").is_file())
        jaxlib = find_spec("jaxlib")
        if jaxlib is None or not jaxlib.submodule_search_locations:
            raise RuntimeError("jaxlib, whose headers are needed, is not installed")
        headers = Path(next(iter(jaxlib.submodule_search_locations))) / "include"
        library = root / "mhc_jax_cuda" / "cuda.so"
        compiler = os.environ.get("CXX", "g++")
        options = (*FLAGS, *STATIC, f"-I{headers}", f"-I{sources}")
        command = [compiler, *options, str(sources / "cuda.cpp"), "-o", str(library), "-ldl"]
        subprocess.run(command, check=True)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(library)}"


def _platform(library: Path) -> str:
    """Return the tag of the oldest glibc with all that a library asks of it (PEP 600)."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    asked = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    major, minor = max((int(a), int(b)) for a, b in asked)
    return f"manylinux_{major}_{max(minor, 17)}_{machine}"
