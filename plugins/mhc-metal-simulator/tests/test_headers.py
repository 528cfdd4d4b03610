"""Each of the kernels' headers is by itself Metal that the simulator's front end takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from mhc_backends import kernels
from mhc_backends.kernels.text import flat

from mhc_metal_simulator.errors import CompileError
from mhc_metal_simulator.front_ends import metal

KERNELS = Path(kernels.__file__).parent
HEADERS = sorted(
    str(path.relative_to(KERNELS))
    for path in KERNELS.glob("**/*.h")
    if "cuda" not in path.relative_to(KERNELS).parts
)


@pytest.mark.parametrize("path", HEADERS)
def test_it_compiles_by_itself(path: str) -> None:
    metal(flat("metal", path), path)


def test_a_header_that_lacks_an_include_does_not() -> None:
    text = flat("metal", "common/channels.h")
    with pytest.raises(CompileError, match="Position"):
        metal(text.replace("struct Position", "struct Other"), "text")
