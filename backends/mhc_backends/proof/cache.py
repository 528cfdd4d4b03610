"""Verdicts on disk: a small JSON file for each kind of call, in a folder for each identity.

Files are written completely elsewhere and moved into place, so concurrent processes do no harm. A
file that cannot be read, or has another identity, counts as absent; a verdict that cannot be
written is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["Cache", "folder", "identity", "identity_with", "replace"]

A_DAY = 24 * 60 * 60.0


def folder() -> Path | None:
    """Return this project's folder in the user's cache, or None if there is no cache."""
    named = os.environ.get("MHC_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "mhc-core" if os.path.isabs(base) else None  # without a home, ~ stays


def replace(path: Path, content: bytes) -> None:
    """Write a file whole, in place of an earlier one, or raise OSError and leave nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def identity() -> dict[str, str]:
    """Return what a verdict depends on: this project's kernels, MLX, the system and the chip."""
    mx: Any = import_module("mlx.core")
    chip: dict[str, Any] = mx.device_info()
    return identity_with(mlx=str(mx.__version__), chip=str(chip.get("device_name", "unknown")))


def identity_with(**library: str) -> dict[str, str]:
    """Return the same, with a library's own part."""
    import mhc_core

    return {
        "mhc-core": f"{mhc_core.__version__} {_kernels()}",
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        **library,
    }


def _kernels() -> str:
    """Return a digest of all texts and launch shapes: in development the version is constant."""
    from mhc_backends.kernels.table import VARIABLE

    digest = hashlib.sha256()
    folder = Path(__file__).parent.parent / "kernels"
    tuned = os.environ.get(VARIABLE)
    files = [*sorted(folder.rglob("*.py")), *sorted(folder.rglob("*.h"))]
    for file in [*files, Path(tuned)] if tuned else files:
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


class Cache:
    """The verdicts of one backend that are valid on this machine now, and with this library."""

    def __init__(self, backend: str, own: Mapping[str, str] | None = None) -> None:
        self._identity = identity() if own is None else dict(own)
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        base = folder()
        self._folder = base / "proofs" / f"{backend}-{digest[:16]}" if base else None

    def read(self, kind: Any) -> dict[str, Any] | None:
        """Return the stored verdict on a kind of call, or None."""
        if self._folder is None:
            return None
        found = self._read(self._folder / _file(kind))
        return found if found and found["kind"] == _plain(kind) else None

    def write(self, kind: Any, reason: str | None, classes: Mapping[str, str], final: bool) -> None:
        """Store a verdict, if possible; one that is not final, for a day."""
        if self._folder is None:
            return
        content = {
            "identity": self._identity,
            "kind": _plain(kind),
            "reason": reason,
            "classes": dict(classes),
            "final": final,
            "when": time.time(),
        }
        with contextlib.suppress(OSError):
            replace(self._folder / _file(kind), json.dumps(content, indent=1).encode())

    def __iter__(self) -> Iterator[tuple[tuple[str, tuple[str, ...], int | None], dict[str, Any]]]:
        """Yield all stored verdicts, each with its kind of call."""
        try:
            files = sorted(self._folder.glob("*.json")) if self._folder else []
        except OSError:
            files = []
        for found in filter(None, map(self._read, files)):
            op, dtypes, n = found["kind"]
            yield (op, tuple(dtypes), n), found

    def _read(self, file: Path) -> dict[str, Any] | None:
        try:
            found: Any = json.loads(file.read_text(encoding="utf-8"))
            op, dtypes, n = found["kind"]
            good = (
                found["identity"] == self._identity
                and isinstance(op, str)
                and all(isinstance(dtype, str) for dtype in dtypes)
                and (n is None or type(n) is int)
                and (found["reason"] is None or isinstance(found["reason"], str))
                and (found["final"] is True or 0 <= time.time() - found["when"] < A_DAY)
            )
        except (OSError, ValueError, LookupError, TypeError):  # broken, or none of ours
            return None
        return found if good else None


def _plain(kind: Any) -> list[Any]:
    op, dtypes, n = kind
    return [op, list(dtypes), n]


def _file(kind: Any) -> str:
    """Return a kind's file name, readable and unique."""
    op, dtypes, n = kind
    digest = hashlib.sha256(json.dumps(_plain(kind)).encode()).hexdigest()
    return f"{op}-{'' if n is None else f'n{n}-'}{dtypes[0]}-{digest[:12]}.json"
