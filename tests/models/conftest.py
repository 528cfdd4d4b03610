"""Accelerated models run on the ops in these tests, however few their tokens are."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _every_stream_runs_on_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave nothing to the libraries: with the real bound they would run all of a small model."""
    monkeypatch.setattr("mhc_backends.mlx_nn.models.sublayers.FEW", 0)
