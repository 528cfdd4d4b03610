"""mlx-metal's proof with the simulator in place of a Mac: what passes, and what does not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from mhc_backends.kernels import KERNELS  # noqa: E402
from mhc_backends.proof import KernelProof  # noqa: E402
from mhc_core import selection  # noqa: E402

from mhc_metal_simulator.backend import SPEC  # noqa: E402

NAME = "proven"  # the backend's in these tests: the simulator's, chosen by itself
KIND = ("sinkhorn", ("float32", "float32"), 2)


@pytest.fixture(autouse=True)
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that lists the kernels launched by a process."""
    file = tmp_path / "launches"
    file.touch()
    monkeypatch.setenv("MHC_TEST_LAUNCHES", str(file))
    monkeypatch.setenv("MHC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MHC_BACKEND", raising=False)
    monkeypatch.setattr("mhc_core._proofs._warned", set())
    return file


def proof(launcher: str, limit: float = 100) -> KernelProof:
    return KernelProof(NAME, f"faulty_launchers:{launcher}", compiled=False, limit=limit)


@contextmanager
def backend(launcher: str, limit: float = 100) -> Iterator[KernelProof]:
    """Register the simulator as a backend that is selected by itself, once it is proven."""
    made = proof(launcher, limit)
    with selection.registered(replace(SPEC, name=NAME, automatic=True, priority=99, proof=made)):
        yield made


def _kernels(lines: Any) -> set[str]:
    """Return the kernels' names, found in those that MLX gets."""
    names = [re.sub(r"^mhc_", "", line) for line in lines]
    return {max((k for k in KERNELS if name.startswith(f"{k}_")), key=len) for name in names}


# ---- what holds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtypes", "n"),
    [KIND, ("static_mappings", ("float32",) * 6, 2)],
    ids=["sinkhorn", "static_mappings"],
)
def test_an_op_is_proven_by_its_own_kernels_and_no_others(
    op: str, dtypes: tuple[str, ...], n: int, launched: Path, tmp_path: Path
) -> None:
    assert proof("sound").verdict(op, dtypes, n) is None
    arrays = {"sinkhorn": [(3, n, n)], "static_mappings": [(n,), (n,), (n, n)]}[op]
    primals = [mx.zeros(shape) for shape in arrays]
    with simulator.record() as records:
        outputs = getattr(mhc, op)(*primals, backend=SPEC.name)
        mx.eval(mhc.vjp(op, primals, outputs, backend=SPEC.name))
    needed = _kernels(record.kernel for record in records)
    tried = launched.read_text().splitlines()
    assert _kernels(tried) == needed
    (file,) = (tmp_path / "cache").rglob("*.json")
    kept = json.loads(file.read_text())
    assert set(kept["classes"].values()) == {"held"}
    assert {class_.partition(",")[0] for class_ in kept["classes"]} == needed
    launched.write_text("")
    assert proof("sound").verdict(op, dtypes, n) is None  # from the cache
    assert launched.read_text() == ""


def test_once_proven_it_answers_also_under_a_gradient(launched: Path) -> None:
    logits = mx.random.normal((3, 2, 2))

    def loss(logits: mx.array) -> mx.array:
        return (mhc.sinkhorn(logits) ** 2).sum()

    with backend("sound"):
        gradient = mx.grad(loss)(logits)  # the first call of the op is in here
        tried = launched.read_text()
        assert tried
        with simulator.record() as records:
            mx.eval(mhc.sinkhorn(logits))
        assert _kernels(record.kernel for record in records) == {"sinkhorn"}
        assert launched.read_text() == tried
    with mhc.use_backend("mlx-compiled"):
        assert mx.allclose(gradient, mx.grad(loss)(logits), atol=1e-6)


# ---- what does not -------------------------------------------------------------------------------

FAULTS = {
    "compile_error": r"kernel sinkhorn: .*mhc_sinkhorn_.*error: ",
    "refused": r"kernel sinkhorn: .*threadgroup \(2048, 1, 1\) has 2048 threads; Metal runs at mo",
    "wrong": r"h_res is off by 0\.001, allowed .*e-0\d \(T=1, n=2, .*; kernels sinkhorn, ",
    "nan": r"h_res is off by nan, allowed .*kernels sinkhorn, sinkhorn_vjp",
    "aborted": r"ended with SIGABRT at kernel sinkhorn: \[METAL\] Command buffer execution failed",
    "killed": r"ended with SIGKILL at kernel sinkhorn",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_harmless_and_told(
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    launched: Path,
) -> None:
    monkeypatch.setenv("MHC_TEST_KERNEL", "sinkhorn")
    logits = mx.random.normal((3, 2, 2))
    want = mhc.sinkhorn(logits, backend="mlx-compiled")
    with backend(fault) as made:
        assert mx.array_equal(mhc.sinkhorn(logits), want)
        assert mx.allclose(mx.compile(mhc.sinkhorn)(logits), want)
        (record,) = caplog.records
        said = record.getMessage()
        assert re.search(FAULTS[fault], said), said
        assert "'mlx-compiled' answers in its place" in said
        assert f"`mhc conformance {NAME} --op sinkhorn --report report.html`" in said
        with pytest.raises(mhc.BackendUnavailableError, match=FAULTS[fault]):
            mhc.sinkhorn(logits, backend=NAME)
        (verdict,) = made.verdicts()
        assert verdict[:3] == KIND
        assert re.search(FAULTS[fault], verdict.reason or "")
        tried = launched.read_text()
        (again,) = proof(fault).verdicts()
        assert again == verdict
        assert launched.read_text() == tried
        with selection.without_proofs():  # the simulator itself is sound
            assert mx.allclose(mhc.sinkhorn(logits, backend=NAME), want, atol=1e-6)


def test_a_wrong_gradient_is_a_fault_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MHC_TEST_KERNEL", "sinkhorn_vjp")
    reason = proof("wrong").verdict(*KIND)
    assert reason is not None
    assert reason.startswith("d logits is off by 0.001")
    (file,) = (tmp_path / "cache").rglob("*.json")
    assert set(json.loads(file.read_text())["classes"].values()) == {"failed"}


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_TEST_KERNEL", "sinkhorn")
    logits = mx.random.normal((3, 2, 2))
    with backend("hanging", limit=5) as made:
        want = mhc.sinkhorn(logits, backend="mlx-compiled")
        assert mx.array_equal(mhc.sinkhorn(logits), want)
        reason = made.verdict(*KIND)
        assert reason is not None
        assert reason.startswith("trying it timed out after 5 s")
        assert (
            made.verdict("aggregate", ("float32",) * 3, 2) == f"not tried, as {reason} for sinkhorn"
        )
