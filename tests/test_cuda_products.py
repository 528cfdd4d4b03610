"""The matrix products of the CUDA dialect, run on a CPU: without a GPU nothing else runs them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import FLAGS, needs_gcc, without_ptx

from mhc_backends.kernels.text import flat

pytestmark = needs_gcc

OPERANDS = "common/project/phi_registers.h"
SOURCE = Path(__file__).with_name("cuda_products.cpp")


def _errors(folder: Path, header: str) -> dict[str, float]:
    """Compile and run, and return each product's error."""
    (folder / "header.h").write_text(without_ptx(header))
    program = folder / "products"
    made = subprocess.run(
        ["g++", *FLAGS, f"-I{folder}", str(SOURCE), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=300)
    lines = (line.rpartition(" ") for line in ran.stdout.splitlines())
    return {name: float(error) for name, _, error in lines}


def test_products_are_exact_to_float32(tmp_path: Path) -> None:
    """Check floats: only a product of two rests is left out, at most 2^-22 of the product."""
    errors = _errors(tmp_path, flat("cuda", OPERANDS, "common/store_raw.h"))
    assert len(errors) == 1 + 3 * 8
    assert all(error <= 2**-21 for error in errors.values()), errors


@pytest.mark.parametrize(
    "change",
    [
        ("j = (k + 2) % 4, eight", "j = k % 4, eight"),  # once here: of one tile, a piece was lost
        ("eight / COLUMN_TILES == Operand::PIECES - 1 ? sum : own + sum", "sum"),
        ("whole ? b.whole : b.rest", "b.whole"),
    ],
    ids=["the order of the pieces", "only the last piece", "no rests"],
)
def test_slips_are_seen(change: tuple[str, str], tmp_path: Path) -> None:
    right, wrong = change
    header = flat("cuda", OPERANDS, "common/store_raw.h")
    assert right in header
    errors = _errors(tmp_path, header.replace(right, wrong))
    assert any(not error <= 2**-21 for error in errors.values()), errors
