"""Every offset computed from a token's number has 64 bits, in every kernel's text.

The compiler checks it: an offset comes from the number of tokens, which is an int64_t, and from the
position of a threadgroup, which is one in the texts checked here. By C++'s own rules a value
computed from these has 64 bits until it is converted to an int, and the compiler reports that.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends import kernels
from mhc_backends.kernels import launch as launches
from mhc_backends.kernels.functions import Ops
from mhc_backends.kernels.mlx import Kernels
from mhc_backends.kernels.ops import OPS
from mhc_backends.mlx_common import as_tuple, from_host
from mhc_conformance.cases import Case, Sizes, cases, data

import mhc_metal_simulator as simulator
from mhc_metal_simulator import compiler
from mhc_metal_simulator import kernel as simulated
from mhc_metal_simulator.source import prepare

POSITION = "uint group_x, group_y, groups_x, groups_y, id, threads;"
# Whole numbers of tokens and threadgroups that are small, and say so by a cast.
SMALL = (
    r"int\(T - first\)|int\(item % (P|GROUPS|count)\)|int\(item / GROUPS % count\)"
    r"|int\(tile - stage\)|int\(here\.group_x % n_tiles\)"
    r"|int\(here\.group_x % out\.splits\)|int\(here\.group_y \* here\.threads \+ here\.id\)"
    r"|int\(here\.groups_y \* here\.threads\)|int\(item / tiles\)"
    r"|int\(here\.group_x % \(N \* each\)\)"
)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Return a text of each kernel, as MLX would pass it to the compiler; nothing runs."""
    found: dict[str, str] = {}

    def note(name: str, text: str, named: Any, outputs: Any, *how: Any) -> list[Any]:
        kernel = max((k for k in kernels.KERNELS if name.startswith(f"mhc_{k}_")), key=len)
        found.setdefault(kernel, text)
        return [np.ones(out.shape, out.dtype) for out in outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "simulate", note)
        for busy, fewest, n in ((launches.BUSY, 4, 4), (launches.BUSY, 4, 9), (0, 0, 4)):
            patch.setattr(launches, "BUSY", busy)
            patch.setattr(launches, "FEWEST_TOKENS", {"metal": fewest})
            own = Ops(Kernels(simulator.metal_kernel, "metal"))
            for op in OPS:
                for case in _mixed_and_not(op, Sizes((3,), n, 8, "")):
                    drawn = data(case, "float32", seed=0)
                    primals = case.placed([from_host(array) for array in drawn.primals])
                    outputs = as_tuple(getattr(own, op)(*primals, **case.options))
                    own.vjp(op, primals, outputs, **case.options)
    assert set(found) == set(kernels.KERNELS)
    return found


def _mixed_and_not(op: str, sizes: Sizes) -> Iterator[Case]:
    """Yield an op's first case, and the first in which streams are not mixed, at other sizes."""
    every = list(cases(op, "float32"))
    unmixed = (case for case in every if "identity" in case.mixers)
    for case in (every[0], *itertools.islice(unmixed, 1)):
        yield Case(op, "texts", sizes, case.static, unmixed=case.unmixed)


def narrowed(name: str, text: str, folder: Path) -> list[str]:
    """Return the places where a text converts a number of 64 bits to one of 32."""
    assert POSITION in text
    wide = POSITION.replace("uint", "int64_t").replace(", id", "; uint id")
    text = text.replace(POSITION, wide)
    path = folder / "kernel.cpp"
    path.write_text(prepare(text, name).text)
    language = compiler._LANGUAGE.split()  # pyright: ignore[reportPrivateUsage]
    shim = f"-I{Path(compiler.__file__).parent / 'metal'}"
    only = ["-Wno-everything", "-Wshorten-64-to-32", "-fno-caret-diagnostics", "-fsyntax-only"]
    command = [*compiler.find_compiler().clang, *language, *only, shim, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = text.splitlines()
    told = re.findall(rf"^{name}\.metal:(\d+).*-Wshorten-64-to-32", done.stderr, re.MULTILINE)
    cast = [
        line
        for line in lines
        if re.search(r"\bint\([^()]*\b(token|T|first|group_x|item|tile|iteration)\b", line)
    ]
    cast += re.findall(r"const int (?!M\b|\w+_shape_0\b)\w+ = \w+_shape(?:\[0\]|_0\b)", text)
    return [lines[int(line) - 1] for line in told] + [
        line for line in cast if not re.search(SMALL, line)
    ]


def test_every_offset_has_64_bits(texts: dict[str, str], tmp_path: Path) -> None:
    for name in kernels.KERNELS:
        assert narrowed(name, texts[name], tmp_path) == [], name


@pytest.mark.parametrize(
    ("kernel", "right", "wrong"),
    [
        ("combine", "for (int64_t token =", "for (int token ="),
        ("combine", "const int64_t T = x_shape_0;", "const int T = x_shape_0;"),
        ("combine_vjp", "const int64_t streams = token", "const int streams = token"),
        ("pre_scale", "const int64_t at = token * N * C;", "const int at = int(token) * N * C;"),
        ("mappings", "for (int64_t first =", "for (int first ="),
        ("sinkhorn", "const int64_t token = tokens +", "const int token = tokens +"),
        ("project", "const int64_t first = iteration +", "const int first = iteration +"),
    ],
)
def test_an_int_where_a_token_needs_more_is_seen(
    texts: dict[str, str], tmp_path: Path, kernel: str, right: str, wrong: str
) -> None:
    assert right in texts[kernel]
    assert narrowed(kernel, texts[kernel].replace(right, wrong), tmp_path)
