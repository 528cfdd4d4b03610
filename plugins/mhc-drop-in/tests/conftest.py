"""A clean environment, and the originals, each fetched once per run."""

from __future__ import annotations

import pytest
from originals import Original, fetch

VARIABLES = ("MHC_BACKEND", "MHC_DISABLE_PLUGINS", "MHC_MLX_DISABLE_METAL", "MHC_MLX_RUN_STRESS")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def mhc_mlx_original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return fetch("mhc-mlx", tmp_path_factory.mktemp("mhc-mlx"))


@pytest.fixture(scope="session")
def mlx_mhc_original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return fetch("mlx-mhc", tmp_path_factory.mktemp("mlx-mhc"))
