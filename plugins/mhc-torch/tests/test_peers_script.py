"""tests/gpu/peers.py of the repository, as far as it runs without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[3] / "tests" / "gpu"
if not GPU.is_dir():
    pytest.skip("needs the repository, which has the script", allow_module_level=True)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(GPU))
    import peers

    return peers


def test_what_takes_too_long_ends_with_all_that_it_started(peers: Any, tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    compiler = f"import time; open({str(early)!r}, 'w'); time.sleep(5); open({str(late)!r}, 'w')"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {compiler!r}])"
    begin = time.perf_counter()
    assert peers.ended([sys.executable, "-c", command], 3, subprocess.DEVNULL) is None
    assert time.perf_counter() - begin < 5
    time.sleep(4)
    assert early.exists()
    assert not late.exists()


def test_what_cannot_be_compiled_does_not_stop_the_rest(
    peers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"C": "16", "T": "1", "device": "cpu", "transformer_engine": ""}
    peers.warm(Namespace(**given, warm=2, limit=60.0), ["ours", "nosuch"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("compiled side by side in")
    said = {line.split(":")[0]: line.split(":", 1)[1].rsplit(",", 1)[0].strip() for line in lines}
    assert len(said) == 4
    for row in (peers.ROWS[-1], peers.FORWARD[-1]):
        assert said[f"ours C=16 T=1 {row}"] == "compiled"
        assert said[f"nosuch C=16 T=1 {row}"] == "failed (1) KeyError: 'nosuch'"


def test_a_row_that_no_side_has_is_left_out(peers: Any) -> None:
    assert peers.times({}, 1, "cpu") == {}

    def fails() -> None:
        raise RuntimeError("no kernel")

    assert list(peers.times({"fails": fails, "runs": lambda: None}, 1, "cpu")) == ["runs"]
