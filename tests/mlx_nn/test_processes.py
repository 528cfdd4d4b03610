"""Two processes compute what one does in MLX, by ``mlx.launch`` and the ring."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")

from processes import B, S, n

from mhc_core import DEEPSEEK_V4
from mhc_core.planning import Model, plan

LAUNCH = "from mlx._distributed_utils.launch import main; main()"  # the command mlx.launch


def _two_ports() -> int:
    """Return the first of two ports in a row that are free, for a ring of two.

    They are below those that Linux hands out by itself, to other tests that run meanwhile.
    """
    first = 20000 + os.getpid() % 5000 * 2
    for port in range(first, first + 100, 2):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no two free ports from {first}")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return what two processes found."""
    ports = ("--starting-port", str(_two_ports()))
    script = (str(Path(__file__).with_name("processes.py")), "--json")
    ring = ("-n", "2", "--backend", "ring", "--python", sys.executable)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *ring, *ports, *script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr
    return json.loads(lines[-1])


LAYOUTS = (
    "data", "channels", "channels, gated", "channels, recomputed", "pipeline",
    "pipeline, single pass",
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_one_process(layout: str, found: dict[str, Any]) -> None:
    assert found["processes"] == 2
    assert found[layout] < 2e-5


def test_channels_are_summed_once_a_pre(found: dict[str, Any]) -> None:
    model = Model(layers=1, channels=64, n=n, variant=DEEPSEEK_V4)
    into, back = plan(model, tokens=B * S, devices=2, layout="channels").communication
    assert found["sums"]["forward"] == [into.size]
    # those of combine, and of the pre before it
    own, *rest = found["sums"]["with gradients"]
    assert own == into.size
    assert len(rest) == 2
    assert sum(rest) == back.size


def test_kernels_exchange_what_the_formulas_do(found: dict[str, Any]) -> None:
    """The sums of a pre, a combine_pre and a combine, and those of their vjps, backwards."""
    kernels = found["kernels"]
    if kernels is None:
        pytest.skip("the simulator of Metal kernels cannot run here")
    assert kernels["error"] < 2e-5
    T, m = 4 * 3, n * n + 2 * n
    forward = [T * (m + 1)] * 2
    combined = [T * (n + n * n), T * n, T * (n + n * n)]  # d H_pre comes before dx'
    assert kernels["sums"] == [*forward, *combined, T * n]


def test_what_does_not_fit_is_refused(found: dict[str, Any]) -> None:
    refused: dict[str, str] = found["refused"]
    assert refused["op"].startswith("pre_scale: it takes no sharded channels; of the ops, aggreg")
    assert refused["twice"].startswith("aggregate: gradients of gradients need whole channels")
    assert refused["twice, vjp"] == refused["twice"]
    if found["kernels"] is not None:
        assert refused["twice, vjp of kernels"] == refused["twice"]
    assert refused["stage"].startswith("pipeline_value_and_grad: the stage has first=True and last")
    assert refused["odd"] == "shard_channels: dims is 17; needs a multiple of the 2 processes"
    assert refused["quantised"].startswith(
        "shard_channels: a projection of gated residuals is quan"
    )
