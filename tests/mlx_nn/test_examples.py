"""The scripts of examples/, run in small."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SMALL = "--steps 20 --dims 32 --layers 2 --batch 4 --context 32 --bytes 100000 --no-compile"


def run(script: str, arguments: str) -> str:
    """Return a script's output; a warning is an error."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found] if isinstance(found, tuple) else [float(found)]


def test_every_script_is_run_here() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == {"wrap_linear.py", "train_text.py", "accelerate_mlx_lm.py"}


def test_wrap_linear() -> None:
    printed = run("wrap_linear.py", "--dims 64 --n 4 --steps 5")
    (away,) = numbers(r"starts as x \+ Linear\(x\), to (\S+) of it", printed)
    assert 0 < away < 1e-3
    first, last = numbers(r"loss (\S+) -> (\S+) in 5 steps", printed)
    assert last < 0.95 * first
    (away,) = numbers(r"QuantizedLinear\(.*bits=8.*\), (\S+) away", printed)
    assert 0 < away < 1e-2
    assert "layers.2 (Linear): wrapped" in printed


def test_train_text() -> None:
    printed = run("train_text.py", SMALL)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+),", printed)]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.5 < 5
    again = run("train_text.py", f"{SMALL} --recompute")
    assert re.findall(r"loss ([\d.]+),", again) == re.findall(r"loss ([\d.]+),", printed)


def test_accelerate_mlx_lm() -> None:
    pytest.importorskip("mlx_lm.models.deepseek_v41", reason="needs pip install mlx-lm==0.32.2")
    printed = run("accelerate_mlx_lm.py", "--tokens 16 --steps 3")
    (away,) = numbers(r"logits: (\S+) apart", printed)
    assert away < 1e-4
    assert "16 greedy tokens: the same" in printed
    first, last = numbers(r"loss (\S+) -> (\S+) in 3 steps", printed)
    assert last < first


def test_accelerate_as_the_readme_calls_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx_lm.models.deepseek_v41", reason="needs pip install mlx-lm==0.32.2")
    import mlx_lm

    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", readme, re.S) if "accelerate" in c]
    make = runpy.run_path(str(EXAMPLES / "accelerate_mlx_lm.py"))["random_model"]
    monkeypatch.setattr(mlx_lm, "load", lambda path: (make(), None))
    exec(code, {})
    assert "HyperConnection" in capsys.readouterr().out
