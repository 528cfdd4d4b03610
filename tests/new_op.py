"""The edits that CONTRIBUTING.md promises a new op, made in a copy of the tree.

The op is ``stream_scale``: every stream times a number of its own, plus one that all share. Without
kernels it takes four edits, two new files fewer than with them. Nothing else is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["NAME", "ROOT", "add", "copy", "edits", "run"]

ROOT = Path(__file__).parent.parent
NAME = "stream_scale"

MATH = '''
"""stream_scale: every stream times a number of its own."""

from __future__ import annotations

from typing import Any

from mhc_core import _checks
from mhc_core._signature import Op, Out
from mhc_core.math import _xp

OP = Op(
    name="stream_scale",
    arrays={"x": "... n C", "s": "... n | n"},
    outputs={"x": Out("... n C", "stream")},
    static={"shift": _checks.non_negative},
)


def forward(x: Any, s: Any, *, shift: float) -> Any:
    """x'_i = (s_i + shift) x_i."""
    xp = _xp.namespace(x)
    factors = _xp.upcast(xp, s) + shift
    return _xp.as_dtype_of(xp, factors[..., None] * _xp.upcast(xp, x), x)


def vjp(primals: Any, cotangents: Any, saved: Any = None, *, shift: float) -> tuple[Any, Any]:
    """dx_i = (s_i + shift) g_i; ds_i = x_i . g_i."""
    (x, s), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    g = _xp.upcast(xp, g)
    dx = (_xp.upcast(xp, s) + shift)[..., None] * g
    return _xp.as_dtype_of(xp, dx, x), _xp.sum_to(xp, _xp.dot(xp, _xp.upcast(xp, x), g, like=s), s)
'''

API = '''
def stream_scale(x: Array, s: Array, shift: float = 0.0, *, backend: str | None = None) -> Array:
    """Scale every stream, ``x'_i = (s_i + shift) x_i``.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    s
        ``[..., n]``, or ``[n]`` shared by all tokens.
    shift
        Added to every s, at least 0.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, C]`` in x's dtype.

    Notes
    -----
    Errors: see :mod:`mhc_core._api`.
    """
    return call("stream_scale", (x, s), {"shift": shift}, backend)


'''

ORACLE = '''
@op
def stream_scale(x: Value, s: Value, shift: float) -> Value:
    """Return ``(s_i + shift) x_i``."""
    return (s + shift)[..., None] * x


'''

TOLERANCE = '    "stream_scale": (4, 16, 4),\n'


def copy(to: Path) -> Path:
    """Copy the tree, without what git does not keep."""
    for name in ("mhc_core", "backends", "conformance", "docs", "plugins", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".*", "*.so", "build", "*.egg-info")
        shutil.copytree(ROOT / name, to / name, ignore=ignored)
    for file in (*ROOT.glob("*.md"), ROOT / "pyproject.toml"):
        shutil.copy(file, to)
    return to


def add(root: Path) -> None:
    """Add the op without kernels."""
    _write(root / "mhc_core" / "math" / f"{NAME}.py", MATH)
    _insert(root / "mhc_core" / "_api.py", "def vjp(\n", API)
    _insert(root / "conformance/mhc_conformance/oracle.py", "def forward(op: str", ORACLE)
    _insert(root / "conformance/mhc_conformance/tolerances.py", '    "static_layer":', TOLERANCE)


def edits(root: Path) -> set[str]:
    """Return the files of a copy that differ from the tree's, or are new."""
    changed: set[str] = set()
    for path in root.rglob("*"):
        name = path.relative_to(root)
        if path.is_file() and "__pycache__" not in name.parts:
            before = ROOT / name
            if not before.exists() or before.read_bytes() != path.read_bytes():
                changed.add(name.as_posix())
    return changed


def run(root: Path, *command: str) -> str:
    """Run Python in a copy, on its packages, and return what it prints; raise if it fails."""
    packages = (".", "backends", "conformance", "plugins/mhc-torch", "plugins/mhc-metal-simulator")
    found = os.pathsep.join(str(root / package) for package in packages)
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": found, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def _write(path: Path, text: str) -> None:
    assert not path.exists()
    path.write_text(text.lstrip("\n"), encoding="utf-8")


def _insert(path: Path, before: str, text: str) -> None:
    whole = path.read_text(encoding="utf-8")
    assert whole.count(before) == 1, (path, before)
    path.write_text(whole.replace(before, text.lstrip("\n") + before), encoding="utf-8")
