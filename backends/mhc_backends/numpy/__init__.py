"""numpy: the neutral maths on NumPy, the reference; gradients come from the hand-written vjps."""

from __future__ import annotations

from mhc_core import math
from mhc_core.backend import DTYPES, BackendSpec
from mhc_core.hookspecs import hookimpl

SPEC = BackendSpec(
    name="numpy",
    module="mhc_backends.numpy.ops",
    array_types=("numpy.ndarray",),
    ops=math.OPS,
    dtypes=DTYPES,
    mixers=None,
    neutral=True,
    without={
        "grad": "NumPy has no autodiff; mhc_core.vjp gives every op's gradients",
        "compile": "NumPy has no compiler",
        "vmap": "NumPy has no vmap; every op takes any leading shape",
        "checkpoint": "NumPy has no autodiff, so nothing to recompute",
    },
)


@hookimpl
def mhc_backend_specs() -> list[BackendSpec]:
    """Return the backend's spec."""
    return [SPEC]
