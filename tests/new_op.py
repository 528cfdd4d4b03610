"""The edits that CONTRIBUTING.md promises a new op, made in a copy of the tree.

The op is ``stream_scale``: every stream times the sum of a number of its own and one for all, over
a number above 0. ``add`` makes it without kernels, ``add_kernels`` gives it some. Its kernels are
those of pre_scale, with other names for themselves and their inputs: both scale streams, and so the
bodies are in whatever form bodies have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["NAME", "ROOT", "add", "add_kernels", "copy", "edits", "promised", "run"]

ROOT = Path(__file__).parent.parent
NAME = "stream_scale"

MATH = '''
"""stream_scale: every stream times a number of its own."""

from __future__ import annotations

from typing import Any

IMPORTS
OP = Op(
    name="stream_scale",
    arrays={"x": "... n C", "s": "... n | n"},
    outputs={"x": Out("... n C", "stream")},
    static={"shift": NON_NEGATIVE, "temperature": POSITIVE},
)


def forward(x: Any, s: Any, *, shift: float, temperature: float) -> Any:
    """x'_i = (s_i + shift) / temperature x_i."""
    xp = _xp.namespace(x)
    factors = (_xp.upcast(xp, s) + shift) / temperature
    return _xp.as_dtype_of(xp, factors[..., None] * _xp.upcast(xp, x), x)


def vjp(
    primals: Any, cotangents: Any, saved: Any = None, *, shift: float, temperature: float
) -> tuple[Any, Any]:
    """dx_i = (s_i + shift) / temperature g_i; ds_i = x_i . g_i / temperature."""
    (x, s), (g,) = primals, cotangents
    xp = _xp.namespace(x)
    g = _xp.upcast(xp, g) / temperature
    dx = (_xp.upcast(xp, s) + shift)[..., None] * g
    return _xp.as_dtype_of(xp, dx, x), _xp.sum_to(xp, _xp.dot(xp, _xp.upcast(xp, x), g, like=s), s)
'''

API = '''
def stream_scale(
    x: Array, s: Array, shift: float = 0.0, temperature: float = 1.0, *, backend: str | None = None
) -> Array:
    """Scale every stream, ``x'_i = (s_i + shift) / temperature x_i``.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    s
        ``[..., n]``, or ``[n]`` shared by all tokens.
    shift
        Added to every s, at least 0.
    temperature
        What that is divided by, above 0.
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
    return call("stream_scale", (x, s), {"shift": shift, "temperature": temperature}, backend)


'''

ORACLE = '''
@op
def stream_scale(x: Value, s: Value, shift: float, temperature: float) -> Value:
    """Return ``(s_i + shift) / temperature x_i``."""
    return ((s + shift) / temperature)[..., None] * x


'''

TOLERANCE = '    "stream_scale": (4, 16, 4),\n'

GLUE = '''
"""stream_scale: kernels ``stream_scale`` and ``stream_scale_vjp``."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens


def forward(kernels: Kernels, x: Array, s: Array, *, shift: float, temperature: float) -> Array:
    """x'_i = (s_i + shift) / temperature x_i."""
    inputs = _inputs(kernels, x, s, shift, temperature)
    return kernels("stream_scale", inputs, {"out": Out.like(x)}, Sizes.of(x))[0]


def vjp(
    kernels: Kernels,
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    shift: float,
    temperature: float,
) -> tuple[Array, Array]:
    """dx_i = (s_i + shift) / temperature g_i; ds_i = x_i . g_i / temperature."""
    (x, s), (g,) = primals, cotangents
    sizes = Sizes.of(x)
    inputs = {**_inputs(kernels, x, s, shift, temperature), "g": tokens(g, 2)}
    outputs = {"dx": Out.like(x), "dfactor": Out((sizes.T, sizes.n), FLOAT32)}
    dx, dfactor = kernels("stream_scale_vjp", inputs, outputs, sizes)
    return dx, kernels.sum_to(dfactor / temperature, s, 1)


def _inputs(
    kernels: Kernels, x: Array, s: Array, shift: float, temperature: float
) -> dict[str, Array]:
    factor = (kernels.host.cast(s, FLOAT32) + shift) / temperature
    return {"x": tokens(x, 2), "factor": tokens(factor, 1)}
'''


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
    like = (root / "mhc_core" / "math" / "rms_norm.py").read_text(encoding="utf-8")
    imports = "".join(re.findall(r"^from mhc_core.*\n", like, re.MULTILINE))
    (check,) = re.findall(r'"eps": (\w+\.non_negative)', like)
    positive = check.replace("non_negative", "positive")
    text = MATH.replace("IMPORTS", imports).replace("NON_NEGATIVE", check)
    text = text.replace("POSITIVE", positive)
    _write(root / "mhc_core" / "math" / f"{NAME}.py", text)
    _insert(root / "mhc_core" / "_api.py", "def vjp(\n", API)
    _insert(root / "mhc_core" / "_api.py", '        "vjp",\n', f'        "{NAME}",\n')
    _insert(root / "conformance/mhc_conformance/oracle.py", "def forward(op: str", ORACLE)
    _insert(root / "conformance/mhc_conformance/tolerances.py", '    "static_layer":', TOLERANCE)


def add_kernels(root: Path) -> None:
    """Add kernels for its forward and vjp, their launch shapes, and what launches them."""
    kernels = root / "backends" / "mhc_backends" / "kernels"
    for like in tuple(kernels.rglob("pre_scale*.h")):
        text = (
            like.read_text(encoding="utf-8").replace("pre_scale", NAME).replace("h_pre", "factor")
        )
        _write(like.with_name(like.name.replace("pre_scale", NAME)), text)
    _write(kernels / "ops" / f"{NAME}.py", GLUE)
    table = (kernels / "table.py").read_text(encoding="utf-8")
    lines = re.findall(r'^    "pre_scale(?:_vjp)?": .*\n', table, re.MULTILINE)
    assert len(lines) == 2
    added = "".join(lines).replace("pre_scale", NAME)
    _insert(kernels / "table.py", '    "sum_rows":', added)


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


def promised(*, kernels: bool) -> set[str]:
    """Return the files that CONTRIBUTING.md says a new op needs, or one with kernels."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"\*\*A new op\*\*.*?(?=^- )", text, re.DOTALL | re.MULTILINE)
    without, _, beside = found.partition("With kernels")
    files = re.findall(r"`([\w/<>]+/[\w<>]+\.(?:py|h))`", without + beside * kernels)
    assert files
    return {
        file.replace("<op>", NAME).replace("<kernel>", kernel)
        for file in files
        for kernel in (NAME, f"{NAME}_vjp")
        if "tests/" not in file
    }


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
