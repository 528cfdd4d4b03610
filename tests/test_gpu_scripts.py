"""The parts of the scripts for a GPU that run without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"
pytest.importorskip("mlx.core", reason="MLX is not installed")


def _families(jobs: int) -> tuple[int, str]:
    """Return the exit status of families.py, and its report without the seconds."""
    asked = ["--backends", "mlx-compiled", "--jobs", str(jobs), "--seconds", "600"]
    command = [sys.executable, str(GPU / "families.py"), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, re.sub(r"\d+ s$", "", done.stdout + done.stderr)


def test_families_reports_the_same_with_one_process_and_with_two() -> None:
    one = _families(1)
    assert one == _families(2)
    assert one[0] == 0
    assert re.search(r"^mlx-compiled: (\d+) of \1 agree, 0 left,", one[1], re.M)


def test_every_process_has_small_and_large_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import families

    sizes = [families.size(case) for case in families.ordered()]
    half = sorted(sizes)[len(sizes) // 2]
    shares = families.shares(4)
    assert sorted(number for share in shares for number in share) == list(range(len(sizes)))
    for share in shares:
        above = sum(sizes[number] > half for number in share)
        assert abs(above - len(share) / 2) <= 1


def test_a_process_that_dies_is_what_differs_in_its_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(GPU))
    import families

    monkeypatch.setenv(
        "MHC_GOLDEN_FAMILIES", "/nonexistent"
    )  # read by new processes, as they start
    found = families.side_by_side("mlx-compiled", 600, 2)
    assert len(found) == len(families.ordered())
    assert all(one and "BrokenProcessPool" in one[0] for one in found)
