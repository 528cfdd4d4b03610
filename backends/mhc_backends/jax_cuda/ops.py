"""The ops on JAX arrays on NVIDIA GPUs by mhc-core's kernels, and JAX's transforms."""

from __future__ import annotations

from typing import Any

import jax
import numpy

from mhc_backends.jax.ops import checkpoint, compile, grad, to_host, vmap
from mhc_backends.jax_cuda.functions import Ops
from mhc_backends.jax_cuda.library import Gpu

__all__ = ["GPU", "checkpoint", "compile", "from_host", "grad", "to_host", "vjp", "vmap"]

GPU = Gpu()  # here, so that programs of other processes run once this module is imported
_OPS = Ops(GPU)
vjp = _OPS.vjp


def __getattr__(name: str) -> Any:
    return getattr(_OPS, name)


def from_host(array: numpy.ndarray[Any, Any]) -> jax.Array:
    """Copy a NumPy array to the default device if that is a GPU, else to the first GPU."""
    library: Any = jax
    default = library.config.jax_default_device
    if getattr(default, "platform", None) != "gpu":
        default = library.local_devices(backend="gpu")[0]
    return jax.device_put(numpy.array(array), default)
