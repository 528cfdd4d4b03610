"""jax: the neutral maths under jax.jit, with the hand-written vjps behind jax.grad."""

from __future__ import annotations

from importlib.util import find_spec

from mhc_core import math
from mhc_core.backend import DTYPES, BackendSpec
from mhc_core.hookspecs import hookimpl


def _missing() -> str | None:
    if find_spec("jax") is None or find_spec("jaxlib") is None:
        return "JAX is not installed: pip install jax"
    return None


SPEC = BackendSpec(
    name="jax",
    module="mhc_backends.jax.ops",
    array_types=("jax.Array",),
    ops=math.OPS,
    dtypes=DTYPES,
    protocol="__jax_array__",
    missing=_missing,
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
