"""Each op as launches of kernels: one module per op, as in ``mhc_core.math``.

``forward(kernels, *arrays, **static)`` and
``vjp(kernels, primals, cotangents, saved=None, **static)`` return the same as the functions of
these names in ``mhc_core.math.<op>``, and so does ``forward_with_saved``, where a vjp needs more
than the primals. ``kernels`` is a :class:`mhc_backends.kernels.host.Kernels`, and the arrays are
of its host.

No op imports an array library.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mhc_core import math

__all__ = ["OF_PARTS", "OPS", "load", "outputs"]

OPS = tuple(sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")))
"""The names of the ops that have kernels."""

OF_PARTS = (
    "aggregate",
    "combine",
    "combine_pre",
    "contract",
    "expand",
    "head",
    "mappings",
    "pre",
    "pre_residual",
    "residual_add_aggregate",
)
"""The ops whose kernels take a part of the channels; the formulas do so in the others."""


def load(op: str) -> Any:
    """Import the module of an op."""
    return import_module(f"{__name__}.{op}")


def outputs(op: str) -> int:
    """Return the number of outputs of an op."""
    return len(math.load(op).OP.outputs)
