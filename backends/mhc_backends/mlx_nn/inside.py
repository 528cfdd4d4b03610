"""The RMS norm that a layer begins with, applied in the pass that makes the layer's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx import nn

import mhc_core as mhc
from mhc_backends.mlx_compiled import SPEC as FORMULAS
from mhc_core.dispatch import get_op
from mhc_core.errors import UnsupportedError
from mhc_core.selection import selected, situation
from mhc_core.signature import signature

__all__ = ["Call", "norm_inside", "runs_formulas"]


class Call(NamedTuple):
    """A call of an op: its name, its arrays, its static arguments."""

    op: str
    arrays: Sequence[mx.array | None]
    static: Mapping[str, Any]


def runs_formulas(call: Call) -> bool:
    """Return whether a call would run formulas, not kernels."""
    op, arrays, static = call
    there = [array for array in arrays if array is not None]
    return selected(signature(get_op, op, arrays, static), there).name == FORMULAS.name


def norm_inside(
    op: str, arrays: Sequence[mx.array | None], norm: nn.Module | None, variant: mhc.Variant
) -> dict[str, Any]:
    """Return the words with which ``op`` applies a norm itself; none if the module must run.

    ``arrays`` are those of ``pre`` or ``combine_pre``, the streams first. Where kernels run, the
    pass that makes h normalises it too. The formulas would gain nothing, so there, and for a norm
    of any other class or one that changes the dtype, the module itself runs.
    """
    if type(norm) is not nn.RMSNorm:
        return {}
    x, weight = cast("mx.array", arrays[0]), cast("mx.array", norm["weight"])
    if x.dtype not in (weight.dtype, mx.float32):
        return {}  # the module's result may have the weight's dtype
    key = (op, variant.mixer, x.dtype, x.shape[-2:], *situation())
    if key not in _inside:
        static = {"variant": variant, "h_norm_eps": norm.eps, "h_raw": False}
        try:
            _inside[key] = not runs_formulas(Call(f"{op}_norm", (*arrays, weight), static))
        except UnsupportedError:  # a chosen backend that does not have this op
            _inside[key] = False
    return {"h_norm_weight": weight, "h_norm_eps": norm.eps} if _inside[key] else {}


_inside: dict[Any, bool] = {}
