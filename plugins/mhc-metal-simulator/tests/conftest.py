"""Fixtures for all tests: a cache of their own, and a short way to run a kernel."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def private_cache(run_folder: Path) -> Iterator[None]:
    folder = run_folder / "cache"
    folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MHC_SIMULATOR_CACHE", str(folder))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run test_coverage.py last: until then it would have to run the checks that others run."""
    items.sort(key=lambda item: item.path.name == "test_coverage.py")


class Run(Protocol):
    def __call__(
        self,
        source: str,
        inputs: Sequence[Any] = ...,
        *,
        shape: tuple[int, ...] = ...,
        dtype: Any = ...,
        grid: tuple[int, ...] = ...,
        group: tuple[int, ...] = ...,
        **more: Any,
    ) -> Any: ...


def _triple(extent: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*extent, 1, 1)[:3]
    return x, y, z


def run_kernel(
    source: str,
    inputs: Sequence[Any] = (),
    *,
    shape: tuple[int, ...] = (1,),
    dtype: Any = mx.float32,
    grid: tuple[int, ...] = (1,),
    group: tuple[int, ...] = (1,),
    name: str = "tested",
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> Any:
    """Run a kernel with inputs a, b, c, ... and the output o; return the output as NumPy's."""
    arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    kernel = simulator.metal_kernel(
        name,
        list("abcdefgh"[: len(arrays)]),
        ["o"],
        inspect.cleandoc(source),
        inspect.cleandoc(header) + "\n" if header else "",
        ensure_row_contiguous,
        atomic_outputs,
    )
    out = kernel(
        inputs=arrays,
        template=template,
        grid=_triple(grid),
        threadgroup=_triple(group),
        output_shapes=[shape],
        output_dtypes=[dtype],
        init_value=init_value,
    )[0]
    if dtype == mx.bfloat16:
        import ml_dtypes

        return np.array(out.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(out)


@pytest.fixture
def run() -> Run:
    return run_kernel
