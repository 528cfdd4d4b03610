"""The backend torch-cuda without a GPU: its plans, and CUDA texts that g++ compiles.

The module is that of a backend, as ``mhc_torch.cuda.ops`` is.
"""

from __future__ import annotations

import atexit
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Call

import mhc_torch
from mhc_backends.kernels.cuda_function import function
from mhc_backends.kernels.plan import Launch, record
from mhc_torch.cuda.driver import Wanted
from mhc_torch.cuda.launches import Cuda
from mhc_torch.ops import checkpoint, compile, from_host, grad, to_host
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

ROOT = Path(__file__).parents[3] / "tests"  # of the repository, which an archive does not have
if not (ROOT / "cuda_on_cpu.py").is_file():
    pytest.skip("needs the repository, whose stand-in for GPUs it is", allow_module_level=True)
sys.path.append(str(ROOT))
from cuda_on_cpu import Device, needs_gcc  # noqa: E402

__all__ = [
    "DEVICE", "SPEC", "checkpoint", "compile", "from_host", "grad", "needs_gcc", "prepare",
    "to_host", "vjp",
]  # fmt: skip

NAME = "torch-cuda-on-cpu"
SPEC = replace(
    mhc_torch.CUDA, name=NAME, module=__name__, missing=lambda: None, takes=None, automatic=False
)
_FOLDER = tempfile.TemporaryDirectory(prefix="mhc-cuda-on-cpu-")
atexit.register(_FOLDER.cleanup)  # its finalizer warns, which is an error in a worker
DEVICE = Device(Path(_FOLDER.name))
_op, vjp = functions(Kernels(NAME, Cuda(DEVICE)))


def __getattr__(name: str) -> Any:
    return _op(name)


def prepare(calls: Iterable[tuple[Call, list[torch.Tensor]]]) -> None:
    """Compile all that these calls launch, forward and back."""
    wanted: list[Wanted] = []
    for call, arrays in calls:
        primals = [(tuple(one.shape), one.dtype) for one in arrays]
        asked = call.static, "cuda", MEMORY, call.absent
        forward = record("forward_with_saved", call.op, [primals], *asked)
        groups = [
            [(one.shape, one.dtype) for one in values]
            for values in (forward.outputs, forward.saved)
        ]
        plans = [forward, record("forward", call.op, [primals], *asked)]
        for more in (groups[:1], groups):
            given = [primals, *[group for group in more if group]]
            plans.append(record("vjp", call.op, given, *asked))
        for plan in plans:
            for step in plan.steps:
                if isinstance(step, Launch):
                    wanted.append(Wanted(function(step).text, step.program.memory))
    DEVICE.prepare(wanted)


MEMORY = DEVICE.memory(0)
