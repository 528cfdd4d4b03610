"""The maths of mHC: each op's formula and its vjp, written once against the array API standard.

Every module has ``OP`` (the declaration), ``forward(*arrays, **static)``, and
``vjp(primals, cotangents, saved=None, **static)``. Where a forward has values that its vjp would
otherwise recompute, the module also has
``forward_with_saved(*arrays, **static) -> (outputs, saved)``; ``vjp`` takes ``saved`` or, without
it, recomputes them from the primals.

Sizes in comments: T tokens (any leading shape), n streams, C channels, m = n * n + 2 * n.
Sums, mappings and Sinkhorn are computed in float32 (float64 for float64 streams); streams and h
are cast to the streams' dtype once, at the end, and every gradient to its primal's.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__all__ = ["OPS", "load"]

OPS = tuple(sorted(m.name for m in iter_modules(__path__) if not m.name.startswith("_")))
"""The names of all ops: one module each."""


def load(op: str) -> Any:
    """Import the module of an op."""
    return import_module(f"{__name__}.{op}")
