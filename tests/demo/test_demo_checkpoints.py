"""mhc demo's checkpoints: kill -9 at the worst moments, Ctrl-C, damage, other settings."""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import about, numbers, process, run, same, settings, was_killed, words

from mhc_core.cli.demo import _checkpoint, _train
from mhc_core.cli.demo._checkpoint import Checkpoint, CheckpointError
from mhc_core.cli.demo._library import library
from mhc_core.cli.demo._settings import Settings
from mhc_core.cli.demo._train import Task, train

EVERY = 5
STEPS = 24
OPTIONS = ("--save-every", str(EVERY))

DIES = "os.kill(os.getpid(), signal.SIGKILL)"

# Each replaces a function of the process that will be killed by one that kills it at a call: the
# first save is of step 0, the third of step 10.
MOMENTS = {
    "in the middle of a write": f"""
import safetensors.numpy
whole, calls = safetensors.numpy.save, []
def cut(*arguments, **words):
    calls.append(1)
    content = whole(*arguments, **words)
    if len(calls) < 4:
        return content
    class Half(bytes):
        pass
    with open(sys.argv[-1] + "/mHC.partial", "wb") as stream:
        stream.write(content[: len(content) // 2])
    {DIES}
safetensors.numpy.save = cut
""",
    "before the new one is in its place": f"""
replace, calls = os.replace, []
def dying(*names):
    calls.append(1)
    if len(calls) == 4:
        {DIES}
    replace(*names)
os.replace = dying
""",
    "when the new one is in its place": f"""
replace, calls = os.replace, []
def dying(*names):
    calls.append(1)
    replace(*names)
    if len(calls) == 4:
        {DIES}
os.replace = dying
""",
    "in the middle of a step": f"""
from mhc_core.cli.demo import _data
batch = _data.batch
def dying(text, seed, step, *sizes):
    if step == 13:
        {DIES}
    return batch(text, seed, step, *sizes)
_data.batch = dying
""",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train without interruption."""
    out = tmp_path_factory.mktemp("whole")
    result = run(*words(out, *OPTIONS, steps=STEPS))
    assert result.exit_code == 0, result.output
    return numbers(out)


def steps_of(out: Path) -> int:
    return int(about(out)["step"])


def stored(out: Path) -> Settings:
    return Settings(**json.loads(about(out)["settings"]))


def resumed(out: Path, *more: str) -> None:
    result = run(*words(out, *OPTIONS, "--resume", *more, steps=STEPS))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_kill_9_it_goes_on_as_if_nothing_had_been(
    moment: str, whole: dict[str, Any], tmp_path: Path
) -> None:
    killed = process(_folder_last(tmp_path), MOMENTS[moment])
    assert was_killed(killed)
    reached = {"when the new one is in its place": 15}.get(moment, 10)
    assert steps_of(tmp_path) == reached, "at most the last interval is lost"
    assert _checkpoint.load(_checkpoint.path(tmp_path, "mHC"), stored(tmp_path), "mHC")
    resumed(tmp_path)
    assert same(numbers(tmp_path), whole)
    assert not list(tmp_path.glob("*.partial"))


def _folder_last(out: Path) -> list[str]:
    """Return the command line with its folder last, where the code that kills the run looks."""
    spelled = words(out, *OPTIONS, steps=STEPS)
    at = spelled.index("--out")
    return [*spelled[:at], *spelled[at + 2 :], "--out", str(out)]


def test_killed_at_any_time_and_again_and_again(whole: dict[str, Any], tmp_path: Path) -> None:
    """Check kills at any time, without added code: at least two signals come during training."""
    file, kills = _checkpoint.path(tmp_path, "mHC"), 0
    for after in (0.01, 0.05):
        start = time.monotonic()
        before = file.stat().st_mtime_ns if file.exists() else 0
        more = ("--resume",) if file.exists() else ()
        running = process(words(tmp_path, "--save-every", "1", *more, steps=STEPS))
        while not file.exists() or file.stat().st_mtime_ns == before:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() - start < 60
            time.sleep(0.002)
        time.sleep(after)
        running.kill()
        kills += was_killed(running)
        assert _checkpoint.load(file, stored(tmp_path), "mHC").step == steps_of(tmp_path)
    assert kills, "it was over before it could be killed"
    resumed(tmp_path)
    assert same(numbers(tmp_path), whole)


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    interrupts = """
from mhc_core.cli.demo import _data
batch = _data.batch
def interrupted(text, seed, step, *sizes):
    if step == 12:
        os.kill(os.getpid(), signal.SIGINT)
    return batch(text, seed, step, *sizes)
_data.batch = interrupted
"""
    running = process(words(tmp_path, *OPTIONS, steps=STEPS), interrupts)
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 130
    assert f"Stopped and saved in {tmp_path}; --resume continues." in output
    assert "Traceback" not in output
    assert steps_of(tmp_path) == 13
    resumed(tmp_path)
    assert same(numbers(tmp_path), whole)


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with _train._held_back() as flag:
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_jax_goes_on_with_the_same_numbers_too(tmp_path: Path) -> None:
    task = Task(
        settings=settings("jax", depth=2),
        variant="residual",
        text=bytes(range(256)),
        library=library("jax"),
        folder=tmp_path,
        save_every=3,
        before=None,
    )
    train(task, lambda taken, loss: None)
    untouched = numbers(tmp_path, "residual")

    def end(taken: int, loss: float) -> None:
        if taken == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task, end)
    before = _checkpoint.load(_checkpoint.path(tmp_path, "residual"), task.settings, "residual")
    assert before.step == 3
    train(replace(task, before=before), lambda taken, loss: None)
    assert same(numbers(tmp_path, "residual"), untouched)


def test_a_variant_that_is_done_is_not_trained_again(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed(tmp_path)  # nothing is there yet: it starts
    assert same(numbers(tmp_path), whole)
    monkeypatch.setattr(_train._Run, "_take", lambda run: pytest.fail("a step was taken"))
    resumed(tmp_path)
    assert (tmp_path / "report.html").exists()


# ---- files --------------------------------------------------------------------------------------


def checkpoint(step: int = 3) -> Checkpoint:
    rng = np.random.default_rng(step)
    groups = {
        group: {"a": rng.normal(size=(2, 3)).astype(np.float32), "b": np.zeros(0)}
        for group in ("parameters", "first", "second", "history")
    }
    return Checkpoint(step=step, **groups)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    file, made = tmp_path / "HC.safetensors", checkpoint()
    _checkpoint.save(file, made, settings(), "HC")
    back = _checkpoint.load(file, settings(), "HC")
    assert back.step == 3
    for group in ("parameters", "first", "second", "history"):
        assert same(getattr(back, group), getattr(made, group))


def test_a_disk_that_is_full_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "HC.safetensors"
    _checkpoint.save(file, checkpoint(3), settings(), "HC")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as here:
        here.setattr(_checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            _checkpoint.save(file, checkpoint(4), settings(), "HC")
    assert _checkpoint.load(file, settings(), "HC").step == 3


def test_the_content_reaches_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = _checkpoint.os.fsync, _checkpoint.os.replace
    monkeypatch.setattr(_checkpoint.os, "fsync", lambda n: (calls.append("fsync"), fsync(n)))
    monkeypatch.setattr(
        _checkpoint.os, "replace", lambda *names: (calls.append("replace"), replace(*names))
    )
    _checkpoint.save(tmp_path / "HC.safetensors", checkpoint(), settings(), "HC")
    assert calls == ["fsync", "replace", "fsync"]


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (half, "cannot be read"),
        (lambda _: b"", "cannot be read"),
        (lambda content: b"nonsense" * 9, "cannot be read"),
        (flipped, "is damaged"),
        (lambda content: content.replace(b"mhc-demo 1", b"mhc-demo 0"), "of this version"),
        (lambda content: content.replace(b'"__metadata__"', b'"__nothing___"'), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "HC.safetensors"
    _checkpoint.save(file, checkpoint(), settings(), "HC")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=said):
        _checkpoint.load(file, settings(), "HC")


@pytest.mark.parametrize("bit", [0, 5])
def test_any_flipped_bit_is_seen(bit: int, tmp_path: Path) -> None:
    """Check the step and the settings too: 29 steps must not silently become 39."""
    file = tmp_path / "HC.safetensors"
    _checkpoint.save(file, checkpoint(), settings(), "HC")
    whole = file.read_bytes()
    for k in range(len(whole)):
        file.write_bytes(whole[:k] + bytes([whole[k] ^ (1 << bit)]) + whole[k + 1 :])
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            _checkpoint.load(file, settings(), "HC")


def test_a_checkpoint_of_other_settings_is_refused_and_says_which(tmp_path: Path) -> None:
    file = tmp_path / "HC.safetensors"
    _checkpoint.save(file, checkpoint(), settings(), "HC")
    for changed, said in (
        ({"depth": 6}, "depth 4 and not 6"),
        ({"rate": 0.5, "seed": 9}, "rate 0.01 and not 0.5, seed 0 and not 9"),
        ({"backend": "mlx-compiled"}, "backend jax and not mlx-compiled"),
    ):
        with pytest.raises(CheckpointError, match=said):
            _checkpoint.load(file, settings(**changed), "HC")
    with pytest.raises(CheckpointError, match="variant HC and not mHC"):
        _checkpoint.load(file, settings(), "mHC")
