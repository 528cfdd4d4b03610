"""torch-cuda: mhc-core's kernels on CUDA tensors. Nothing here imports PyTorch.

``ops.py`` has the ops, ``launches.py`` launches the kernels of a plan, and ``driver.py`` loads its
functions, which ``mhc_backends.kernels.nvrtc`` compiles and keeps on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mhc_backends.kernels.nvidia import OLDEST, devices
from mhc_torch.plans.takes import MIXERS, first_tensor, is_mapped

__all__ = ["MIXERS", "NO_VMAP", "OLDEST", "missing", "takes"]

NO_VMAP = (
    "has no vmap: kernels take leading axes instead; without backend='torch-cuda', 'torch' answers "
    "under vmap"
)


def missing() -> str | None:
    """Return why CUDA kernels cannot run here, or None; this starts no CUDA context."""
    found = find_spec("torch")
    if found is None:
        return "PyTorch is not installed: pip install torch"
    libraries = [Path(path) / "lib" for path in found.submodule_search_locations or ()]
    if not any(list(folder.glob("*torch_cuda.*")) for folder in libraries):
        return "this PyTorch is built without CUDA: see pytorch.org for one that is"
    if not _bindings():
        return "cuda-bindings is not installed: pip install -e 'plugins/mhc-torch[cuda]'"
    try:
        count = devices()
    except OSError as error:
        return f"no NVIDIA driver is installed ({error})"
    return None if count else "NVIDIA's driver finds no GPU"


def _bindings() -> bool:
    try:
        return find_spec("cuda.bindings.driver") is not None
    except ImportError:
        return False


_REFUSED: dict[int, str | None] = {}  # by the index of a device


def takes(arrays: Sequence[Any]) -> str | None:
    """Return why the kernels do not take these arrays, or None."""
    first = arrays[0]
    if not getattr(first, "is_cuda", False):
        first = first_tensor(arrays)
        if first is None:
            return None  # NumPy's, which go to the GPU
        if not first.is_cuda:
            return f"takes CUDA tensors, not those on {first.device}"
    index = first.get_device()
    if index not in _REFUSED:
        _REFUSED[index] = _refusal(index)
    return _REFUSED[index] or (NO_VMAP if is_mapped() else None)


def _refusal(index: int) -> str | None:
    torch: Any = import_module("torch")
    try:
        major, minor = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError):  # a compiler's tensors, on a machine without the GPU
        return None
    if torch.version.hip or major < OLDEST:
        name = torch.cuda.get_device_name(index)
        return f"needs compute capability {OLDEST}.0 or later, and {name} has {major}.{minor}"
    return None
