"""mhc demo's command line: its refusals before any work, and its defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from demo_runs import run, words

from mhc_core import machine
from mhc_core.cli import demo
from mhc_core.cli.demo import _plot, _report, _train

if TYPE_CHECKING:
    from conftest import Plugins


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail if anything is trained."""
    monkeypatch.setattr(_train, "train", lambda *_: pytest.fail("something was trained"))


def refused(*arguments: str) -> str:
    """Run a command that is refused; return its one line of output."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.output.splitlines()) == 1
    return bare(result.output)


def bare(said: str) -> str:
    """Return a text without spaces: lines may be broken anywhere."""
    return "".join(said.split())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--variants", "mHC,HD"), "--variants has 'HD'; needs some of residual, HC, mHC"),
        (("--variants", ""), "--variants has ''"),
        (("--resume", "--overwrite"), "needs one of them"),
        (("--depth", "5"), "--depth is 5; needs an even number"),
        (("--width", "9", "--heads", "2"), "--width is 9; needs a multiple of --heads, here 2"),
        (("--rate", "0"), "--rate is 0.0; needs a number above 0"),
        (("--rate", "inf"), "--rate is inf"),
        (("--rate", "nan"), "--rate is nan"),
        (("--steps", "0"), "--steps"),
        (("--seed", "-1"), "--seed"),
        (("--backend", "numpy"), "'numpy' does not train; the demo needs a backend with gradients"),
        (("--backend", "jaxx"), "'jax'"),
        (("--text", "no-such-file.txt"), "no-such-file.txt cannot be read: No such file"),
        (("--text", "."), "cannot be read: Is a directory"),
        (("--plot", "no/folder/out.png"), "--plot no/folder/out.png cannot be written: there is"),
        (("--json", "no/folder/out.json"), "--json no/folder/out.json cannot be written: there is"),
        (("--plot", "out.xyz"), "--plot is 'out.xyz'; needs a name that ends in one of ."),
        (("--batch", "999999999"), "GiB at least; here are"),
        (("--steps", "9" * 5000), "--steps"),
        (("--context", "²"), "--context"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    more: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bare(said) in refused("--out", str(tmp_path / "out"), *more)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_bytes(b"x" * 129)
    said = refused("--out", str(tmp_path), "--text", str(short), "--context", "64")
    assert bare("has 129 bytes; needs at least 130 for sequences of 64") in said


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert bare("cannot be made") in refused("--out", str(tmp_path / "out"))


def test_an_earlier_run_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mHC.safetensors").write_bytes(b"")
    said = refused(*words(tmp_path))
    assert bare("is from an earlier run; --resume continues it, --overwrite starts over") in said


def test_to_start_anew_takes_all_old_checkpoints_away_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in ("residual", "HC", "mHC")]
    for file in files:
        file.write_bytes(b"")

    def ends(task: Any, tell: Any) -> Any:
        raise _train.InterruptedRunError

    monkeypatch.setattr(_train, "train", ends)
    result = run(*words(tmp_path, "--overwrite", variants="residual,HC"))
    assert result.exit_code == 130
    assert [file.exists() for file in files] == [False, False, True]  # mHC was not asked for


def test_checkpoints_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mHC.safetensors").write_bytes(b"nonsense")
    assert bare("mHC.safetensors cannot be read") in refused(*words(tmp_path, "--resume"))


def test_what_the_report_needs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as here:
        here.setattr(_plot, "find_spec", lambda name: None)
        picture = ("--plot", str(tmp_path / "out.png"))
        assert bare("pip install matplotlib") in refused(*words(tmp_path / "out", *picture))
    monkeypatch.setattr(_report, "PACKAGE", "a-package-that-nobody-has")
    assert bare("pip install a-package-that-nobody-has") in refused(*words(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_a_backend_that_trains_it_says_so(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.only("numpy")
    said = refused("--out", str(tmp_path))
    assert (
        bare("no backend here trains; the demo needs a backend with gradients, of JAX or MLX")
        in said
    )


def test_the_fastest_backend_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str) -> tuple[str, str]:
        monkeypatch.setattr(machine, "devices", lambda names: dict.fromkeys(names, device))
        return demo._backend(None)

    assert on("cpu, something") == ("jax", "jax")
    name, library = on("gpu, something")
    assert library == "mlx"
    assert name.startswith("mlx-")
    monkeypatch.setenv("MHC_BACKEND", "mlx-compiled")
    assert on("cpu, something") == ("mlx-compiled", "mlx")
    assert demo._backend("jax") == ("jax", "jax")


def test_the_command_that_is_told_trains_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    typed = ["/usr/bin/mhc", "demo", "--resume", "--text", "/home/somebody/a b.txt", "--overwrite"]
    monkeypatch.setattr(sys, "argv", typed)
    assert demo._command() == "mhc demo --text '~/a b.txt'"


def test_the_command_imports_no_array_library() -> None:
    code = "import sys, mhc_core.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"numpy", "jax", "mlx", "torch", "matplotlib", "safetensors", "mhc_backends", "uplot"}
    assert not heavy & set(done.stdout.split())
