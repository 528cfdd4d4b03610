"""Fixtures for all tests: a quick compiler, and PyTorch's settings as they were."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "inductor: compiles with inductor, which takes its time")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))  # else each waits for others


@pytest.fixture(autouse=True)
def _quick_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as torch.compile does, forward and backward, but generate no C++ or Triton.

    What tracing finds does not depend on the code generator; a test marked inductor runs that too.
    """
    if request.node.get_closest_marker("inductor") is None:
        traced = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", traced)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """Leave no compiled code and no setting behind; fail if a test changed a setting for good."""
    before = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    yield
    assert torch.get_float32_matmul_precision() == before
    torch.compiler.reset()
