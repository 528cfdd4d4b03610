"""The default kit runs every kernel, class of launches and side of a choice, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import kept_coverage
from mhc_backends.kernels import KERNELS

from mhc_metal_simulator import coverage
from mhc_metal_simulator.coverage import UNREACHED, Coverage, possible, reasons


@pytest.fixture(scope="module")
def found(run_folder: Path) -> Coverage:
    """Return the checks' coverage, from the backend's suite if it ran, else run here."""
    return coverage.together(
        kept_coverage(run_folder, unit) or coverage.checked(*unit) for unit in coverage.units()
    )


def test_every_kernel_runs(found: Coverage) -> None:
    assert set(found.kernels) == set(KERNELS)


# channels in pairs, of up to 4 streams: test_projection_kernels runs them, and no case of the kit
ELSEWHERE = {("pre_k_blocks", "W=2")}


def test_every_class_of_launches_runs(found: Coverage) -> None:
    assert not ELSEWHERE & set(found.classes)
    for kernel in KERNELS:
        reached = {word for name, word in (*found.classes, *ELSEWHERE) if name == kernel}
        assert possible(kernel, reached) - reached == set(), kernel


def test_every_side_of_a_choice_runs_or_has_its_reason(found: Coverage) -> None:
    sorted_out = reasons(found.missing)
    assert [str(one) for one in sorted_out.pop(None, [])] == []
    assert set(sorted_out) == set(UNREACHED)  # no reason is left for what now runs


def test_the_command_lists_them(found: Coverage) -> None:
    text = "\n".join(coverage.listing(found))
    assert all(f"\n{kernel}: " in f"\n{text}" for kernel in KERNELS)
    assert f"{len(KERNELS)} of {len(KERNELS)} kernels run" in text
