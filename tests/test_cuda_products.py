"""The products of matrices in the CUDA dialect, on a CPU: nothing else runs them without a GPU."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mhc_backends import kernels

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="needs g++ on x86-64, whose instructions round to float16",
)

SOURCE = Path(__file__).with_name("cuda_products.cpp")
DIALECT = Path(kernels.__file__).with_name("dialect_cuda.h")
TWICE = re.compile(r"^//// twice: .*\n", re.MULTILINE)
ASM = re.compile(r"\basm( volatile)?\(")
INSTRUCTIONS = {"m16n8k8": ("8", "b0, b1"), "m16n8k16": ("16", "b[0], b[1]")}


def _dialect(change: tuple[str, str] = ("", "")) -> str:
    """Give the dialect's words, with the tensor core's instructions as calls and without others."""
    text, _, _ = DIALECT.read_text().partition("//// the first lines of every kernel ////")
    once, twice = TWICE.split(text)
    assert change[0] in twice
    twice = twice.replace(*change) if change[0] else twice
    once, twice = _without_asm(once), _without_asm(twice)
    assert twice.count("tensor_core<") == len(INSTRUCTIONS)
    return f"{once}namespace tested {{\nenum {{ ALIGNED = 1 }};\n{twice}}}\n"


def _without_asm(text: str) -> str:
    """Replace each statement in PTX."""
    while found := ASM.search(text):
        end, open_brackets = found.end(), 1
        while open_brackets:
            open_brackets += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        ptx, new = text[found.start() : end], "(void)0"
        for shape, (depth, right) in INSTRUCTIONS.items():
            if f"mma.sync.aligned.{shape}." in ptx:
                new = f"tensor_core<{depth}>(sum, a, {right})"
        text = text[: found.start()] + new + text[end:]
    return text


def _errors(folder: Path, dialect: str) -> dict[str, float]:
    """Compile and run, and give each product's error."""
    (folder / "dialect.h").write_text(dialect)
    program = folder / "products"
    flags = ["-std=c++17", "-O1", "-mf16c", "-w", "-pthread", f"-I{folder}"]
    made = subprocess.run(
        ["g++", *flags, str(SOURCE), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=300)
    lines = (line.rpartition(" ") for line in ran.stdout.splitlines())
    return {name: float(error) for name, _, error in lines}


def test_products_are_exact_to_float32(tmp_path: Path) -> None:
    """Of floats, a product of two rests is left out: 2^-22 of the numbers' product at most."""
    errors = _errors(tmp_path, _dialect())
    assert len(errors) == 1 + 3 * 8
    assert all(error <= 2**-21 for error in errors.values()), errors


@pytest.mark.parametrize(
    "change",
    [
        ("j = (k + 2) % 4, eight", "j = k % 4, eight"),  # once here: of one tile, a part was lost
        ("eight / TILES == Factor::PARTS - 1 ? sum : own + sum", "sum"),
        ("whole ? b.whole : b.rest", "b.whole"),
    ],
    ids=["the order of the parts", "only the last part", "no rests"],
)
def test_slips_are_seen(change: tuple[str, str], tmp_path: Path) -> None:
    errors = _errors(tmp_path, _dialect(change))
    assert any(not error <= 2**-21 for error in errors.values()), errors
