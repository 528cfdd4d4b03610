"""jax: the neutral maths under jax.jit, with the hand-written vjps behind jax.grad."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mhc_core import math
from mhc_core.backend import DTYPES, BackendSpec
from mhc_core.hookspecs import hookimpl


def _missing() -> str | None:
    if find_spec("jax") is None or find_spec("jaxlib") is None:
        return "JAX is not installed: pip install jax"
    return None


def _device() -> str:
    library: Any = import_module("jax")
    first = library.devices()[0]
    return f"{first.platform}, {first.device_kind}"


SPEC = BackendSpec(
    name="jax",
    module="mhc_backends.jax.ops",
    array_types=("jax.Array",),
    ops=math.OPS,
    dtypes=DTYPES,
    mixers=None,
    neutral=True,
    channels="jax",
    protocol="__jax_array__",
    missing=_missing,
    device=_device,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
