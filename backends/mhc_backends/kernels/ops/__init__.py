"""Each op as launches of kernels: one module per op, as in ``mhc_core.math``.

``forward(kernels, *arrays, **static)`` and
``vjp(kernels, primals, cotangents, saved=None, **static)`` return the same as the functions of
these names in ``mhc_core.math.<op>``, and so does ``forward_with_saved``, where a vjp needs more
than the primals. ``kernels`` is a :class:`mhc_backends.kernels.host.Kernels`, and the arrays are
of its host. A module without ``vjp`` has kernels for its forward alone: the formulas of
``mhc_core.math.<op>`` pull back, on the host's arrays and by its own operations.

No op imports an array library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from mhc_core import math

__all__ = ["OPS", "has_vjp", "load", "outputs", "pullback"]

OPS = tuple(sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")))
"""The names of the ops that have kernels."""


def load(op: str) -> Any:
    """Import the module of an op."""
    return import_module(f"{__name__}.{op}")


def has_vjp(op: str) -> bool:
    """Return whether kernels compute an op's vjp; if not, the formulas do."""
    return hasattr(load(op), "vjp")


def pullback(op: str, kernels: Any) -> Callable[..., Any]:
    """Return an op's vjp as a function of arrays of the kernels' host."""
    return functools.partial(load(op).vjp, kernels) if has_vjp(op) else math.load(op).vjp


def outputs(op: str) -> int:
    """Return the number of outputs of an op."""
    return len(math.load(op).OP.outputs)
