"""torch-metal: mhc-core's Metal kernels on PyTorch's MPS tensors. Nothing here imports PyTorch.

``ops.py`` has the ops, and ``host.py`` compiles and launches the kernels of a plan by
``torch.mps.compile_shader``.

It has never run on a Mac: the tests run its plans by the simulator of Metal, under the rules by
which PyTorch binds arguments. What PyTorch does is taken from its sources. ``compileLibrary`` in
``aten/src/ATen/native/mps/OperationUtils.mm`` (commit bff2c90b) compiles for Metal 3.1 or later,
which has bfloat, and with safe maths and precise functions, unless ``PYTORCH_MPS_FAST_MATH`` is set
to anything but 0. Fast maths knows no infinities and reorders sums, so this backend refuses it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from mhc_torch.plans.takes import MIXERS, first_tensor, is_mapped

__all__ = ["FAST_MATH", "MIXERS", "NEVER_RUN", "NO_MPS", "NO_VMAP", "missing", "takes"]

NEVER_RUN = (
    "never run on a Mac: its plans and texts are tested by a simulator of Metal; "
    "`mhc conformance torch-metal` tests them on one"
)

NO_VMAP = (
    "has no vmap: kernels take leading axes instead; without backend='torch-metal', 'torch' "
    "answers under vmap"
)

NO_MPS = "PyTorch finds no MPS device (torch.backends.mps.is_available() is False)"

FAST_MATH = "PYTORCH_MPS_FAST_MATH"


def missing() -> str | None:
    """Return why Metal kernels cannot run here, or None; this does not import PyTorch."""
    if find_spec("torch") is None:
        return "PyTorch is not installed: pip install torch"
    if (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return (
            "Metal kernels need macOS on Apple silicon, and this is "
            f"{sys.platform} on {platform.machine()}"
        )
    if os.environ.get(FAST_MATH, "0") != "0":  # as PyTorch reads it
        return (
            f"{FAST_MATH} is {os.environ[FAST_MATH]!r}, with which PyTorch compiles kernels that "
            "lose infinities and the order of sums; it needs to be unset"
        )
    torch: Any = sys.modules.get("torch")
    return NO_MPS if torch is not None and not torch.backends.mps.is_available() else None


def takes(arrays: Sequence[Any]) -> str | None:
    """Return why the kernels do not take these arrays, or None."""
    first = arrays[0]
    if not getattr(first, "is_mps", False):
        first = first_tensor(arrays)
        if first is None:
            return None  # NumPy's, which go to the GPU
        if not first.is_mps:
            return f"takes MPS tensors, not those on {first.device}"
    return NO_VMAP if is_mapped() else None
