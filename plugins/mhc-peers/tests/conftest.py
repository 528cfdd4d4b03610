"""The peers that these tests run: the small ones in pure Python, which pip brings in seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from mhc_peers.registry import named
from mhc_peers.targets import installed


@pytest.fixture(scope="session")
def tile_kernels() -> Iterator[None]:
    """Put TileKernels' references on the path of this process."""
    folders = [str(folder) for folder in installed(named("tile-kernels"), sys.executable)]
    sys.path += folders
    yield
    for folder in folders:
        sys.path.remove(folder)
