"""The proof that a backend needs before it is selected: who asks, when, and the verdict's fate.

plugins/mhc-metal-simulator/tests/test_proof.py runs the proof on the kernels themselves.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

import mhc_core as mhc
from mhc_backends.kernels import KERNELS
from mhc_backends.kernels.ops import OPS
from mhc_backends.mlx_metal import SPEC as METAL
from mhc_backends.proof import KernelProof, cache, child, process
from mhc_backends.proof.launches import Call, calls, launches
from mhc_backends.proof.process import Found
from mhc_core import _proofs, dispatch, machine, selection
from mhc_core.backend import BackendSpec, Proof, Verdict
from mhc_core.cli import app

if TYPE_CHECKING:
    from conftest import FakeArray, Plugins

Fake = type["FakeArray"]
WHY = "kernel pre: program_source:3: error: expected expression"


class Fixed:
    """A proof with a fixed answer that counts its calls."""

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.asked: list[tuple[Any, ...]] = []

    def verdict(self, op: str, dtypes: tuple[str, ...], n: int | None) -> str | None:
        self.asked.append((op, dtypes, n))
        return self.reason

    def verdicts(self) -> Sequence[Verdict]:
        return [Verdict(*kind, self.reason) for kind in self.asked]


@pytest.fixture(autouse=True)
def _nobody_was_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_proofs, "_warned", set())
    monkeypatch.delenv("MHC_TRUST", raising=False)
    monkeypatch.setattr(machine, "devices", lambda *_: {})  # which would import every library


@pytest.fixture
def proof(plugins: Plugins) -> Fixed:
    """Return the proof of the better of two backends."""
    made = Fixed()
    dtypes = ("float32", "bfloat16")
    best = plugins.spec("best", proof=made, priority=1, dtypes=dtypes)
    plugins.plugin("two", [best, plugins.spec("next", dtypes=dtypes)])
    return made


# --- selection ------------------------------------------------------------------------------------


def test_it_is_asked_once_per_kind_of_call(proof: Fixed, fake: Fake) -> None:
    for _ in range(2):
        assert mhc.aggregate(fake(5, 2, 3, dtype="bfloat16"), fake(5, 2)) == "best"
        assert mhc.aggregate(fake(7, 2, 9, dtype="bfloat16"), fake(2)) == "best"
    wanted = ("bfloat16", "float32", "bfloat16")  # the last is of h's cotangent
    assert proof.asked == [("aggregate", wanted, 2)]
    primals = (fake(5, 2, 3, dtype="bfloat16"), fake(5, 2))
    mhc.vjp("aggregate", primals, fake(5, 3, dtype="bfloat16"))
    assert proof.asked[1:] == [("aggregate", wanted, 2)]  # the same question, of the vjp
    mhc.rms_norm(fake(2, 3), fake(3), 1e-5)
    assert proof.asked[-1] == ("rms_norm", ("float32",) * 3, None)


def test_a_lookup_is_all_that_a_call_costs_later(proof: Fixed, fake: Fake) -> None:
    mhc.sinkhorn(fake(2, 2))
    proof.verdict = None  # type: ignore[assignment]  # nobody may call it
    assert mhc.sinkhorn(fake(2, 2)) == "best"


def test_where_it_fails_the_next_answers_with_one_warning(
    proof: Fixed, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    proof.reason = WHY
    for _ in range(2):
        assert mhc.combine(fake(5, 4, 8), fake(5, 8), fake(5, 4), fake(5, 4, 4)) == "next"
        cotangent, shared = fake(5, 4, 8), (fake(4), fake(4, 4))
        assert mhc.vjp("combine", (fake(5, 4, 8), fake(5, 8), *shared), cotangent) == "next"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("mhc_core", logging.WARNING)
    said = record.getMessage()
    assert said.startswith("combine: backend 'best' has not proven itself on this machine for n=4")
    assert WHY in said
    assert "'next' answers in its place" in said
    assert "`mhc conformance best --op combine --report report.html`" in said
    assert "MHC_TRUST=best" in said


def test_each_op_is_warned_of(proof: Fixed, fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    proof.reason = WHY
    mhc.sinkhorn(fake(4, 4))
    mhc.rms_norm(fake(2, 3), fake(3), 1e-5)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "sinkhorn",
        "rms_norm",
    ]


def test_an_explicit_choice_raises_with_the_reason(
    proof: Fixed, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof.reason = WHY
    with pytest.raises(mhc.BackendUnavailableError, match=f"'best' has not proven.*{WHY}"):
        mhc.sinkhorn(fake(4, 4), backend="best")
    with (
        mhc.use_backend("best"),
        pytest.raises(mhc.BackendUnavailableError, match=r"from use_backend.*MHC_TRUST=best"),
    ):
        mhc.sinkhorn(fake(4, 4))
    monkeypatch.setenv("MHC_BACKEND", "best")
    with pytest.raises(mhc.BackendUnavailableError, match=r"from MHC_BACKEND.*--op sinkhorn"):
        mhc.vjp("sinkhorn", (fake(4, 4),), fake(4, 4))


def test_trusted_it_answers_without_being_asked(
    proof: Fixed, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof.reason = WHY
    with selection.without_proofs():
        assert mhc.sinkhorn(fake(4, 4)) == "best"
        assert mhc.sinkhorn(fake(4, 4), backend="best") == "best"
    assert not proof.asked
    assert mhc.sinkhorn(fake(4, 4)) == "next"  # nothing of it stays
    with selection.without_proofs():
        assert mhc.sinkhorn(fake(4, 4)) == "best"
    proof.asked.clear()
    monkeypatch.setattr(selection, "_SELECTED", {})
    monkeypatch.setenv("MHC_TRUST", "another, best")
    assert mhc.sinkhorn(fake(4, 4)) == "best"
    assert not proof.asked


def test_who_does_not_answer_is_not_asked(plugins: Plugins, fake: Fake) -> None:
    lower, higher = Fixed(), Fixed()
    plugins.plugin(
        "two",
        [
            plugins.spec("lower", proof=lower),
            plugins.spec("higher", proof=higher, priority=1),
            plugins.spec("by name", proof=lower, priority=2, automatic=False),
        ],
    )
    assert mhc.sinkhorn(fake(2, 2)) == "higher"
    assert (len(higher.asked), len(lower.asked)) == (1, 0)


def test_mhc_select_chooses_among_those_that_are_left(plugins: Plugins, fake: Fake) -> None:
    seen: list[list[str]] = []

    def select(_: str, candidates: Sequence[BackendSpec]) -> str | None:
        seen.append([spec.name for spec in candidates])
        return "wanted" if "wanted" in seen[-1] else None

    specs = [plugins.spec("wanted", proof=Fixed(WHY)), plugins.spec("best", priority=1)]
    plugins.plugin("two", specs, select)
    assert mhc.sinkhorn(fake(2, 2)) == "best"
    assert seen == [["best", "wanted"], ["best"]]


def test_where_nobody_is_left_every_reason_is_given(plugins: Plugins, fake: Fake) -> None:
    plugins.backend("mine", proof=Fixed(WHY))
    with pytest.raises(mhc.UnsupportedError, match=f"mine: {WHY}"):
        mhc.sinkhorn(fake(2, 2))


def test_a_proof_that_raises_is_no_proof(plugins: Plugins, fake: Fake) -> None:
    class Broken(Fixed):
        def verdict(self, *_: Any) -> str | None:
            raise OSError("no disk")

        def verdicts(self) -> Sequence[Verdict]:
            raise OSError("no disk at /home/somebody")

    plugins.plugin("two", [plugins.spec("mine", proof=Broken(), priority=1), plugins.spec("next")])
    assert mhc.sinkhorn(fake(2, 2)) == "next"
    with pytest.raises(mhc.BackendUnavailableError, match="its proof raised OSError: no disk"):
        mhc.sinkhorn(fake(2, 2), backend="mine")
    text = CliRunner().invoke(app, ["info"]).stdout
    assert "its proof raised OSError: no disk at ~" in text


@pytest.mark.parametrize("wrong", [3, lambda *_: None, "mine"])
def test_what_is_no_proof_is_refused(plugins: Plugins, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"proof is .*; needs None, or methods verdict"):
        plugins.spec("mine", proof=wrong)


def test_looking_starts_nothing(proof: Fixed, plugins: Plugins, fake: Fake) -> None:
    mhc.backends()
    assert CliRunner().invoke(app, ["backends"]).exit_code == 0
    text = CliRunner().invoke(app, ["info"]).stdout
    assert not proof.asked
    assert "no proof has run here yet: an op is proven at its first call" in text
    mhc.sinkhorn(fake(4, 4))
    mhc.rms_norm(fake(2, 3), fake(3), 1e-5)
    asked = len(proof.asked)
    assert (
        "  proven here, float32: sinkhorn n=4, rms_norm\n"
        in CliRunner().invoke(app, ["info"]).stdout
    )
    proof.reason = WHY
    told = json.loads(CliRunner().invoke(app, ["info", "--json"]).stdout)["backends"]
    by_name = {one["name"]: one["proofs"] for one in told}
    assert by_name["best"][0] == {
        "op": "sinkhorn",
        "dtypes": ["float32", "float32"],
        "n": 4,
        "reason": WHY,
    }
    assert by_name["next"] is None
    said = CliRunner().invoke(app, ["info"]).stdout
    assert f"  not proven here, float32: sinkhorn n=4: {WHY}\n" in said
    assert len(proof.asked) == asked


def test_the_kit_and_the_bench_run_what_is_not_proven(plugins: Plugins, tmp_path: Path) -> None:
    asked = Fixed(WHY)
    spec = METAL.__class__(
        name="unproven",
        module="mhc_backends.numpy.ops",
        array_types=("numpy.ndarray",),
        ops=("aggregate",),
        dtypes=("float32",),
        without=dict.fromkeys(("grad", "compile", "vmap", "checkpoint"), "NumPy has none"),
        automatic=False,
        proof=asked,
    )
    plugins.plugin("unproven", [spec])
    with pytest.raises(mhc.BackendUnavailableError):
        mhc.aggregate(np.zeros((3, 4, 5), np.float32), np.ones(4, np.float32), backend="unproven")
    asked.asked.clear()
    report = tmp_path / "report.json"
    words = ["conformance", "unproven", "--kind", "forward", "--jobs", "1", "--report", str(report)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["records"][0]["passed"]
    words = ["bench", "--backend", "unproven", "--vs", "none", "--row", "aggregate"]
    sizes = ["--T", "2", "--C", "4", "--repeats", "1", "--calls", "1"]
    result = CliRunner().invoke(app, [*words, *sizes])
    assert result.exit_code == 0, result.output
    assert not asked.asked


# --- under a trace --------------------------------------------------------------------------------


def test_it_is_asked_under_a_trace_too(plugins: Plugins) -> None:
    """Check traces: selection looks at types alone, and another process tries the kernels."""
    asked = Fixed(WHY)
    spec = plugins.spec("kernels", array_types=METAL.array_types, proof=asked, priority=99)
    plugins.plugin("kernels", [spec])
    logits = mx.random.normal((3, 4, 4))
    want = mhc.sinkhorn(logits, backend="mlx-compiled")

    def loss(logits: mx.array) -> mx.array:
        return (mhc.sinkhorn(logits) * mx.arange(4.0)).sum()

    assert mx.allclose(mx.compile(mhc.sinkhorn)(logits), want)
    assert asked.asked == [("sinkhorn", ("float32", "float32"), 4)]
    gradient = mx.compile(mx.grad(loss))(logits)
    assert mx.allclose(mx.vmap(mhc.sinkhorn)(logits), want)
    (back,) = mhc.vjp("sinkhorn", (logits,), mx.broadcast_to(mx.arange(4.0), logits.shape))
    assert mx.allclose(gradient, back, atol=1e-6)
    assert set(asked.asked) == {("sinkhorn", ("float32", "float32"), 4)}


# --- the verdict's file ---------------------------------------------------------------------------

KIND = ("sinkhorn", ("float32", "float32"), 4)
HELD = Found(None, {"sinkhorn": "held"}, True)
FAILED = Found(WHY, {"sinkhorn": "failed"}, True)
LATE = Found("trying it timed out", {"sinkhorn": "failed"}, False, timed_out=True)
NEVER = Found("no process can be started", {}, False)


class Tries:
    """A stand-in for the process of its own: its findings, and how often it was asked."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.count = 0

    def __call__(self, *_: Any) -> Found:
        self.count += 1
        return self.found


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tries:
    made = Tries(HELD)
    monkeypatch.setattr(process, "prove", made)
    monkeypatch.setenv("MHC_CACHE", str(tmp_path / "cache"))
    return made


def new() -> KernelProof:
    """Return a proof as another process would make it."""
    return KernelProof("kernels", "nowhere:metal_kernel")


def the_file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").rglob("*.json")
    return file


@pytest.mark.parametrize(("found", "again"), [(HELD, 1), (FAILED, 1), (LATE, 1), (NEVER, 2)])
def test_a_verdict_is_kept_for_other_processes(tries: Tries, found: Found, again: int) -> None:
    """Check also that "nothing could be tried" is not kept: that holds for this process alone."""
    tries.found = found
    proof = new()
    assert proof.verdict(*KIND) == found.reason
    assert proof.verdict(*KIND) == found.reason
    assert tries.count == 1
    assert new().verdict(*KIND) == found.reason
    assert tries.count == again


def test_what_is_kept_says_of_what_it_holds(tries: Tries, tmp_path: Path) -> None:
    tries.found = FAILED
    new().verdict(*KIND)
    kept = json.loads(the_file(tmp_path).read_text())
    assert set(kept["identity"]) == {"mhc-core", "mlx", "system", "chip"}
    assert kept["identity"]["mlx"] == mx.__version__
    assert kept["identity"]["mhc-core"].startswith(mhc.__version__)
    assert kept["classes"] == {"sinkhorn": "failed"}
    assert new().verdicts() == [Verdict(*KIND, WHY)]


@pytest.mark.parametrize("what", ["mhc-core", "mlx", "system", "chip"])
def test_another_version_proves_itself_anew(
    tries: Tries, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    new().verdict(*KIND)
    other = {**cache.identity(), what: "another"}
    monkeypatch.setattr(cache, "identity", lambda: other)
    assert new().verdicts() == []
    new().verdict(*KIND)
    assert tries.count == 2
    monkeypatch.undo()


def test_kernels_and_tuning_are_of_the_identity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = cache.identity()
    assert cache.identity() == before
    tuning = tmp_path / "tuning.json"
    tuning.write_text('{"combine": {"threads": 128}}')
    monkeypatch.setenv("MHC_KERNEL_TUNING", str(tuning))
    tuned = cache.identity()
    assert tuned != before
    tuning.write_text('{"combine": {"threads": 64}}')
    assert cache.identity() not in (tuned, before)


BROKEN: dict[str, Callable[[dict[str, Any]], str | bytes]] = {
    "empty": lambda _: "",
    "cut off": lambda kept: json.dumps(kept)[:-20],
    "no text": lambda _: b"\xff\xfe\x00",
    "no object": lambda _: "[]",
    "without a reason": lambda kept: json.dumps({k: v for k, v in kept.items() if k != "reason"}),
    "of another identity": lambda kept: json.dumps({**kept, "identity": {"mlx": "0.1"}}),
    "of another kind": lambda kept: json.dumps({**kept, "kind": ["pre", ["float32"], 4]}),
    "with a number for a reason": lambda kept: json.dumps({**kept, "reason": 3}),
    "with no kind": lambda kept: json.dumps({**kept, "kind": None}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_not_there(tries: Tries, tmp_path: Path, how: str) -> None:
    tries.found = FAILED
    new().verdict(*KIND)
    file = the_file(tmp_path)
    content = BROKEN[how](json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    tries.found = HELD
    assert KIND not in [verdict[:3] for verdict in new().verdicts()]
    assert new().verdict(*KIND) is None
    assert tries.count == 2
    assert new().verdict(*KIND) is None  # it was written anew
    assert tries.count == 2


def test_what_timed_out_is_tried_again_after_a_day(
    tries: Tries, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries.found = LATE
    new().verdict(*KIND)
    now = time.time()
    monkeypatch.setattr(cache.time, "time", lambda: now + cache.A_DAY - 60)
    assert new().verdict(*KIND) == LATE.reason
    monkeypatch.setattr(cache.time, "time", lambda: now + cache.A_DAY + 60)
    assert new().verdicts() == []
    assert new().verdict(*KIND) == LATE.reason
    assert tries.count == 2


def test_after_one_has_timed_out_nobody_waits_for_others(tries: Tries) -> None:
    proof = new()
    tries.found = LATE
    proof.verdict(*KIND)
    assert proof.verdict("pre", ("float32",), 4) == "not tried, as trying it timed out for sinkhorn"
    assert tries.count == 1
    tries.found = HELD
    assert new().verdict("pre", ("float32",), 4) is None  # the next process tries it


def _a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("in the way")


def _read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(stat.S_IRUSR | stat.S_IXUSR)

    def refuse(*_: Any, **__: Any) -> Any:  # root may write anywhere
        raise PermissionError("read-only")

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)


def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MHC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no user
    assert cache.folder() is None


def _full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", refuse)


@pytest.mark.parametrize("spoil", [_a_file_in_the_way, _read_only, _no_home, _full])
def test_where_nothing_can_be_kept_it_holds_for_the_process(
    tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None]
) -> None:
    spoil(tmp_path, monkeypatch)
    proof = new()
    assert proof.verdict(*KIND) is None
    assert proof.verdict(*KIND) is None
    assert tries.count == 1
    assert proof.verdicts() == [Verdict(*KIND, None)]
    assert new().verdicts() == []
    assert new().verdict(*KIND) is None
    assert tries.count == 2
    assert not list(tmp_path.rglob("*.part"))


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHC_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/j")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/j")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.folder() == Path("/var/j/mhc-core")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path("/home/j/.cache/mhc-core")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder() == Path("/home/j/Library/Caches/mhc-core")


def test_processes_at_the_same_time_do_no_harm(tries: Tries, tmp_path: Path) -> None:
    """Check that each writes its own file whole: a reader meanwhile sees a whole file or none."""
    stop = threading.Event()
    wrong: list[Any] = []

    def read() -> None:
        while not stop.is_set():
            found = cache.Cache("kernels").read(KIND)
            if found is not None and found["classes"] != HELD.classes:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [
        threading.Thread(
            target=lambda: [cache.Cache("kernels").write(KIND, *HELD[:3]) for _ in range(20)]
        )
        for _ in range(3)
    ]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert new().verdict(*KIND) is None
    assert tries.count == 0
    assert not list(tmp_path.rglob("*.part"))


def test_threads_wait_for_one_proof(tries: Tries) -> None:
    proof = new()
    threads = [threading.Thread(target=proof.verdict, args=KIND) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tries.count == 1


# --- the process of its own -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "frozen", "reason"),
    [
        ("", False, "this application has no Python interpreter of its own"),
        (sys.executable, True, "this application has no Python interpreter of its own"),
        (
            "/Applications/Paint.app/Contents/MacOS/Paint",
            False,
            "is 'Paint', not a Python interpreter",
        ),
        ("/no/such/folder/python3", False, "no process can be started.*No such file"),
    ],
)
def test_where_there_is_no_interpreter_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, executable: str, frozen: bool, reason: str
) -> None:
    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "frozen", frozen, raising=False)
    said = new().verdict(*KIND)
    assert said is not None
    assert re.search(reason, said), said
    assert not list(tmp_path.rglob("*.json"))


def test_where_no_process_may_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    monkeypatch.setattr(process.subprocess, "Popen", refuse)
    said = new().verdict(*KIND)
    assert said == "no process can be started to try it in ([Errno 1] Operation not permitted)"


def test_a_launcher_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Check that nothing is kept if the process ends before it comes to a kernel.

    No file of the folder that it is started in hides one of Python's own modules.
    """
    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    said = new().verdict(*KIND)
    assert said is not None
    assert said.startswith("the process that tried it ended with code 1: ModuleNotFoundError")
    assert not list(tmp_path.rglob("*.json"))


# --- what is tried --------------------------------------------------------------------------------


def _dtypes(op: str, streams: str) -> tuple[str, ...]:
    declared = dispatch.get_op(op)
    own = ("x", "y", "h", "res", "logits", "matrix")
    arrays = [name for name in declared.arrays if name != "h_pre" or name not in declared.optional]
    return (
        *(streams if name in own else "float32" for name in arrays),
        *(streams if out.dtype == "stream" else "float32" for out in declared.outputs.values()),
    )


def _some_sizes() -> Iterator[tuple[int, int]]:
    rng = np.random.default_rng(0)
    for T in (1, 2, 5, 16, 17, 40, 300, 511, 512, 1024, 3000):
        yield from ((T, int(C)) for C in rng.integers(1, 6000, 3))
    yield from ((T, C) for T in (1, 16, 700) for C in (64, 768, 1024, 4096, 7168))
    yield from ((T, C) for T in (8192, 20000) for C in (1, 7, 16, 300, 512))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 4])
def test_every_launch_class_that_a_call_can_come_to_is_tried(n: int, dtype: str) -> None:
    """Check ops that launch in different ways, at sizes other than the proof's."""
    for op in ("aggregate", "combine", "pre", "static_layer"):
        dtypes = _dtypes(op, dtype)
        chosen = calls(op, dtypes, n)
        tried = {launched.class_ for call in chosen for launched in launches(call)}
        for T, C in _some_sizes():
            call = Call(op, dtypes, T, n, C, chosen[0].static)
            met = {launched.class_ for launched in launches(call)}
            assert met <= tried, f"{call.name}: {met - tried}"
        assert len(chosen) <= 40  # half of them without H_res


def test_every_kernel_is_tried_by_some_op() -> None:
    few = [(op, None if op == "rms_norm" else 4) for op in OPS]
    many = [(op, 9) for op in ("combine", "gated_combine", "static_layer")]
    tried = {
        launched.kernel
        for op, n in (*few, *many)
        for call in calls(op, _dtypes(op, "float32"), n)
        for launched in launches(call)
    }
    assert tried == set(KERNELS)


def test_both_sides_of_choices_are_tried() -> None:
    chosen = calls("combine_pre", _dtypes("combine_pre", "bfloat16"), 4)
    proven = frozenset[Any]().union(*(one.proves for call in chosen for one in launches(call)))
    assert {kernel for kernel, *_ in proven} >= {
        "combine_project",
        "combine_project_few",
        "pre",
        "project_dx",
        "project_dphi",
        "combine_vjp",
    }
    for fact in (
        ("combine_project", "whole K steps", True),
        ("combine_project", "whole K steps", False),
        ("combine_project", "partials", True),
        ("combine_project_few", "begins anywhere", 1),
        ("combine_vjp", "begins anywhere", 4),
        ("pre", "LOG", True),
        ("pre", "LOG", False),
        ("pre", "SAVES", True),
        ("pre", "SAVES", False),
        ("combine_vjp", "h_post", "float32", "constant"),
        ("combine_vjp", "h_post", "float32", "device"),
        ("combine_vjp", "threads", "one"),
        ("combine_vjp", "threads", "most"),
    ):
        assert fact in proven, fact


def test_what_runs_differentiated_has_its_outputs_cotangents() -> None:
    dtypes = ("bfloat16", "float32", "float32")
    call = Call("aggregate", dtypes, 3, 4, 8)
    assert call.differentiated.dtypes == ("bfloat16", "float32", "bfloat16")


@pytest.mark.skipif(sys.platform == "darwin", reason="where it is a proof, not a failure")
def test_without_a_mac_metal_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check that MLX refuses, in the process that tries kernels, once that launches one."""
    monkeypatch.setenv("MHC_CACHE", str(tmp_path))
    assert METAL.proof is not None
    reason = METAL.proof.verdict("sinkhorn", ("float32", "float32"), 2)
    assert reason is not None
    assert "kernel sinkhorn" in reason


def test_views_begin_where_no_vector_may() -> None:
    for offset, place in ((0, 0), (1, 4)):
        own = child._own(np.arange(12, dtype=np.float32).reshape(3, 4), offset)
        assert mx.array_equal(own, mx.arange(12.0).reshape(3, 4))
        assert np.asarray(memoryview(own)).__array_interface__["data"][0] % 8 == place


def test_what_has_never_run_has_a_proof() -> None:
    assert isinstance(METAL.proof, Proof)
    assert all(
        backend.spec.proof is None
        for name, backend in mhc.backends().items()
        if backend.spec is not None and name not in ("mlx-metal", "torch-metal")
    )
