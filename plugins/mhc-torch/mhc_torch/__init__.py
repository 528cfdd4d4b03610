"""torch: the neutral maths on PyTorch tensors, with the hand-written vjps behind autograd.

torch-cuda: the same ops by mhc-core's kernels, on CUDA tensors.
torch-metal: likewise, on MPS tensors.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mhc_backends.kernels.ops import OPS
from mhc_backends.proof import KernelProof
from mhc_core import math
from mhc_core.backend import DTYPES, BackendSpec
from mhc_core.hookspecs import hookimpl
from mhc_torch import cuda, metal

_LATE = {  # these import PyTorch
    "accelerate": "mhc_torch.models",
    "load_hyper_connections": "mhc_torch.checkpoints",
    "restore": "mhc_torch.models",
}


def _missing() -> str | None:
    return None if find_spec("torch") else "PyTorch is not installed: pip install torch"


def _device() -> str:
    torch: Any = import_module("torch")
    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.get_device_name()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


SPEC = BackendSpec(
    name="torch",
    module="mhc_torch.ops",
    array_types=("torch.Tensor",),
    ops=math.OPS,
    dtypes=DTYPES,
    mixers=None,
    channels="torch",
    missing=_missing,
    device=_device,
    api_version=1,
)


CUDA = BackendSpec(
    name="torch-cuda",
    module="mhc_torch.cuda.ops",
    array_types=("torch.Tensor",),
    ops=OPS,
    dtypes=("float32", "float16", "bfloat16"),
    mixers=cuda.MIXERS,
    channels="torch",
    sizes=(1, 32),
    priority=10,
    without={"vmap": cuda.NO_VMAP},
    missing=cuda.missing,
    takes=cuda.takes,
    device=_device,
    api_version=1,
)

METAL = BackendSpec(
    name="torch-metal",
    module="mhc_torch.metal.ops",
    array_types=("torch.Tensor",),
    ops=OPS,
    dtypes=("float32", "float16", "bfloat16"),
    mixers=metal.MIXERS,
    sizes=(1, 32),
    priority=10,
    without={"vmap": metal.NO_VMAP},
    missing=metal.missing,
    takes=metal.takes,
    proof=KernelProof(
        "torch-metal",
        "mhc_torch.metal.host:Metal",
        child="mhc_torch.metal.proof",
        identity="mhc_torch.metal.proof:identity",
    ),
    device=_device,
    note=metal.NEVER_RUN,
    api_version=1,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the specs of the backends."""
    return [SPEC, CUDA, METAL]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
