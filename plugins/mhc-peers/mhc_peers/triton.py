"""Triton's interpreter, which runs kernels on a CPU, made to compute in bfloat16 as a GPU does."""

from __future__ import annotations

import functools
import os
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["fix_interpreter"]


@functools.cache
def fix_interpreter() -> None:
    """Fix the interpreter, where it is what runs kernels.

    It cuts bits off where float32 becomes bfloat16, as a GPU rounds (PTX's ``cvt.rn``); its dot
    takes the bits of bfloat16 for integers; and it times launch shapes on a driver that is not
    there. All three are in ``runtime/interpreter.py`` and ``runtime/autotuner.py`` of 3.6 to 3.9.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    tl: Any = import_module("triton.language")
    Autotuner: Any = import_module("triton.runtime.autotuner").Autotuner
    interpreter: Any = import_module("triton.runtime.interpreter")
    InterpreterBuilder = interpreter.InterpreterBuilder
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)

    def wide_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        wide = [cast(self, one, tl.float32) if _narrow(one) else one for one in (a, b)]
        return dot(self, *wide, *others)

    def _narrow(one: Any) -> bool:
        return one.dtype.scalar == tl.bfloat16

    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_dot = wide_dot
    Autotuner._bench = _no_time  # so that the first of the shapes is taken
    Autotuner.check_disk_cache = _benched


def _no_time(*_: Any, **__: Any) -> float:
    return 0.0


def _benched(tuner: Any, key: Any, configs: Any, bench: Any) -> None:
    bench()


def _rounded(wide: Any) -> Any:
    """Return the bits of bfloat16 numbers nearest to float32 ones, even ones of two as near."""
    bits: Any = np.ascontiguousarray(wide, np.float32).view(np.uint32)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), 0x7FC0, near).astype(np.uint16)
