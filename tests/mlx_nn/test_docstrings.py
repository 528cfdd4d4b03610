"""The public modules: every one is documented, and every example in a docstring runs."""

from __future__ import annotations

import doctest
import inspect
import re
import sys

import pytest

import mhc_core.mlx

OWN = [name for name in mhc_core.mlx.__all__ if inspect.getdoc(getattr(mhc_core.mlx, name))]
MODULES = sorted({getattr(mhc_core.mlx, name).__module__ for name in OWN if name != "OUTPUT_HEADS"})


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("mhc_backends")])
def test_the_examples_run(name: str) -> None:
    result = doctest.testmod(sys.modules[name])
    assert not result.failed


HYPER = ["HyperConnectedBlock", "HyperConnectedStack", "HyperConnection", "HyperHead"]


@pytest.mark.parametrize("name", [*HYPER, "load_hyper_connections"])
def test_parameters_errors_and_source_are_told(name: str) -> None:
    public = getattr(mhc_core.mlx, name)
    text = inspect.getdoc(public) or ""
    for head in ("Parameters\n---", "Raises\n---", "Notes\n---"):
        assert head in text
    for parameter in inspect.signature(public).parameters:
        assert re.search(rf"^(.*, )?{parameter}(,.*)?$", text, re.MULTILINE), parameter
