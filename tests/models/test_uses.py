"""One cell of each row of the table of uses; python tests/models/matrix.py runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import matrix
import small

RECORD = Path(__file__).parents[2] / "docs/records/uses-2026-11-30.txt"
CELLS = {
    "mlx-lm V4.1": "convert",
    "mlx-vlm V4": "LoRA, grad_checkpoint",
    "mlx-vlm V4.1": "load in the plain library",
    "GLM-5.3-Flash": "prompt cache",
    "HY-V4": "LoRA, grad_checkpoint",
    "Qwen4-Exp": "speculative decoding",
    "Xing4.0": "batch",
}


def recorded() -> dict[tuple[str, str], str | None]:
    """Return the cells of the record: None, or the reason."""
    table, _, notes = RECORD.read_text().strip().partition("\n\n")
    reasons = dict(line.split(". ", 1) for line in notes.splitlines())
    head, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
    return {
        (row[0], use): None if text == "yes" else reasons[text.removeprefix("no (")[:-1]]
        for row in rows
        for use, text in zip(head[1:], row[1:], strict=True)
    }


def test_the_record_has_every_cell() -> None:
    assert recorded().keys() == {(family, use) for family in small.MAKE for use in matrix.USES}
    assert CELLS.keys() == small.MAKE.keys() == matrix.CONFIGS.keys()


@pytest.mark.parametrize("family", list(CELLS))
def test_a_use_of_each_family(family: str) -> None:
    assert matrix.cell(family, CELLS[family]) == recorded()[family, CELLS[family]]
