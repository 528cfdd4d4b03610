"""The folders that peers are installed into, and the process that each runs in.

A peer's pins are installed without what they require, each set into a folder of its own in the
cache: two projects that take the same import names are never in one process, and nobody's
environment changes. What the environment already has in that very version is taken from there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from mhc_core import graphs
from mhc_peers.declaration import Peer
from mhc_peers.libraries import has_gpu

__all__ = ["NotRunError", "cache", "environment", "installed", "interpreter", "lacking"]


class NotRunError(Exception):
    """A peer cannot run here; the text says why."""


def cache() -> Path:
    """Return the folder of the installed peers: MHC_PEERS_CACHE, or one in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhc-peers"
    return Path(os.environ.get("MHC_PEERS_CACHE") or default)


def interpreter(peer: Peer) -> str:
    """Return the Python that a peer runs with; raise NotRunError where there is none."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not peer.python or _at_least(here, peer.python):
        return sys.executable
    for candidate in _pythons(peer.python):
        if _runs(candidate, peer.python):
            return candidate
    variable = _variable(peer.python)
    raise NotRunError(
        f"needs Python {peer.python}, and this is {here}: name one by {variable}=/path/to/python"
    )


def _at_least(have: str, need: str) -> bool:
    return tuple(map(int, have.split("."))) >= tuple(map(int, need.split(".")))


def _variable(number: str) -> str:
    return f"MHC_PEERS_PYTHON_{number.replace('.', '_')}"


def _pythons(number: str) -> Iterator[str]:
    given = os.environ.get(_variable(number))
    if given:
        yield given
        return
    found = shutil.which(f"python{number}")
    if found:
        yield found
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(path) for path in sorted(root.glob(f"versions/{number}*/bin/python")))


def _runs(python: str, number: str) -> bool:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == number


def environment(peer: Peer, python: str, checkouts: Mapping[str, Path]) -> dict[str, str]:
    """Return the environment of a peer's process; install what it pins, and raise NotRunError."""
    reason = lacking(peer)
    if reason:
        raise NotRunError(reason)
    path = [str(_links())]
    given = dict(os.environ)
    if peer.checkout:
        folder = checkouts.get(peer.checkout)
        if folder is None:
            raise NotRunError(f"is read from a checkout: give --checkout {peer.checkout}=FOLDER")
        path.append(str(folder.absolute()))
        given["MHC_PEERS_CHECKOUT"] = str(folder.absolute())
    path += map(str, installed(peer, python))
    if peer.triton and not has_gpu():
        given["TRITON_INTERPRET"] = "1"
    path += filter(None, [os.environ.get("PYTHONPATH")] if python == sys.executable else [])
    given["PYTHONPATH"] = os.pathsep.join(path)
    given.setdefault("MLX_ENABLE_TF32", "0")
    if peer.library == "mlx" and sys.platform != "darwin":
        given.setdefault("MLX_DISABLE_COMPILE", "1")  # else a C++ compiler runs for every shape
    return {**given, **peer.environment}


def lacking(peer: Peer) -> str:
    """Return what the environment lacks for a peer, or ""."""
    needs = {**peer.needs, **({"triton": "triton"} if peer.triton and has_gpu() else {})}
    for module, distribution in needs.items():
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"needs {module}: pip install '{distribution}'"
    return ""


def _links() -> Path:
    """Return a folder from which another Python imports this package, and one file of mhc-core.

    A Python that has mhc-core itself imports that: without an ``__init__.py``, the folder of the
    one file yields to a package further down the path.
    """
    target, file = Path(__file__).parent.resolve(), Path(graphs.__file__).resolve()
    digest = hashlib.sha256(f"{target} {file}".encode()).hexdigest()[:16]
    folder = cache() / "links" / digest
    (folder / "mhc_core").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / "mhc_peers").symlink_to(target, target_is_directory=True)
    with contextlib.suppress(FileExistsError):
        (folder / "mhc_core" / file.name).symlink_to(file)
    return folder


def installed(peer: Peer, python: str) -> list[Path]:
    """Return the folders of what a peer pins, for a Python; install what is not there."""
    own = python == sys.executable
    interpreted = (peer.triton,) if peer.triton and not has_gpu() else ()
    pins = [pin for pin in (*peer.pins, *interpreted) if not (own and _has(pin))]
    if not pins:
        return []
    return [_target(tuple(pins), python, whole=not own)]


def _has(pin: str) -> bool:
    """Return whether the environment itself, without our folders, has that very version."""
    name, _, number = pin.partition("==")
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    there = Path(str(found.locate_file(""))).resolve()
    return found.version == number and cache().resolve() not in there.parents


@functools.cache
def _target(pins: tuple[str, ...], python: str, whole: bool) -> Path:
    """Return the folder with some pins; another Python gets all that they require too."""
    words = "\n".join((*pins, python))
    folder = cache() / hashlib.sha256(words.encode()).hexdigest()[:16]
    if (folder / "installed").exists():
        return folder
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="part-") as part:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--target", part, *pins]
        command += [] if whole else ["--no-deps", "--ignore-requires-python"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            said = next((line for line in reversed(lines) if "ERROR" in line), lines[-1])
            raise NotRunError(f"could not be installed: {said}")
        Path(part, "installed").write_text("\n".join(pins) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first
            Path(part).rename(folder)
            Path(part).mkdir()  # which the end of the block removes
    return folder
