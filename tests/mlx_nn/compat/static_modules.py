"""The shared part of the static modules' tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mhc_backends.mlx_compiled import ops
from mhc_core import math

MLX = {"array_types": ("mlx.core.array",), "dtypes": ("float32", "float16", "bfloat16")}


def recorder(plugins: Any) -> list[str]:
    """Add a backend ``recorder``: mlx-compiled, which records the ops that it is asked for."""
    asked: list[str] = []

    def answer(op: str, *arrays: Any, **static: Any) -> Any:
        asked.append(op)
        return getattr(ops, op)(*arrays, **static)

    functions: dict[str, Callable[..., Any]] = {op: partial(answer, op) for op in math.OPS}
    plugins.backend("recorder", functions, **MLX)
    return asked


def off(found: mx.array, wanted: mx.array) -> float:
    """Return how far apart two arrays are, relative to the second."""
    assert found.shape == wanted.shape
    found, wanted = found.astype(mx.float32), wanted.astype(mx.float32)
    return float(mx.linalg.norm((found - wanted).flatten()) / mx.linalg.norm(wanted.flatten()))


def leaves(tree: Any) -> dict[str, mx.array]:
    """Return the arrays of a tree by their paths."""
    return dict(tree_flatten(tree))


def gradients_match(found: Any, wanted: Any, tolerance: float = 1e-5) -> bool:
    """Return whether two trees of gradients are equal, and fail if all are zero."""
    ours, theirs = leaves(found), leaves(wanted)
    assert ours.keys() == theirs.keys()
    largest = max(float(mx.abs(g).max()) for g in theirs.values())
    assert largest > 0
    return all(bool(mx.all(mx.abs(ours[k] - theirs[k]) <= tolerance * largest)) for k in theirs)
