"""The header of MLX's CPU kernels, precompiled while many of them are compiled.

MLX has g++ compile each function that it fuses for a CPU, in a process of its own
(``g++ -std=c++17 -O3 -Wall -fPIC -shared``, says libmlx 0.32.4), and each reads one header first:
1.5 s of CPU time, 0.25 with that header precompiled. GCC takes ``name.gch`` from the first folder
in which it looks for ``name`` if the flags are the same, and else reads the header as ever
(https://gcc.gnu.org/onlinedocs/gcc/Precompiled-Headers.html). The code is the same.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import mlx.core as mx

__all__ = ["HEADER", "hurried"]

HEADER = Path("mlx", "backend", "cpu", "compiled_preamble.h")
FLAGS = "-std=c++17 -O3 -Wall -fPIC -shared"


@contextlib.contextmanager
def hurried() -> Generator[None]:
    """Let this process and those that it starts find that header precompiled.

    It is made beside what runs; until it is there, and where it cannot be made, nothing changes.
    """
    compiler, include = shutil.which("g++"), Path(mx.__file__).parent / "include"
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if os.name != "posix" or compiler is None or not on_cpu or not (include / HEADER).is_file():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mhc-precompiled-") as folder:
        making = _make(compiler, include, Path(folder))
        path = os.environ.get("PATH")
        os.environ["PATH"] = os.pathsep.join(filter(None, [folder, path]))
        try:
            yield
        finally:
            if path is None:
                del os.environ["PATH"]
            else:
                os.environ["PATH"] = path
            with contextlib.suppress(ProcessLookupError):
                os.killpg(making.pid, signal.SIGKILL)
            making.wait()


def _make(compiler: str, include: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Write a g++ that looks in a folder first, and begin to fill the folder."""
    wrapper = folder / "g++"
    wrapper.write_text(
        f'#!/bin/sh\nexec {shlex.quote(compiler)} -I {shlex.quote(str(folder))} "$@"\n'
    )
    wrapper.chmod(0o700)
    made = folder / f"{HEADER}.gch"
    made.parent.mkdir(parents=True)
    source, part, whole = (shlex.quote(str(p)) for p in (include / HEADER, folder / "part", made))
    command = f"{shlex.quote(compiler)} {FLAGS} -I {shlex.quote(str(include))} -x c++-header"
    return subprocess.Popen(
        ["/bin/sh", "-c", f"{command} {source} -o {part} && mv {part} {whole}"],  # whole or not
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
