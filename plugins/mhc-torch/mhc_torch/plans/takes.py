"""The calls that backends with plans take, found without an import of PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["MIXERS", "first_tensor", "is_mapped"]

MIXERS = ("sinkhorn", "identity")  # whose mappings kernels make


def first_tensor(arrays: Sequence[Any]) -> Any:
    """Return the first tensor among a call's arrays, or None: the others are NumPy's."""
    return next((one for one in arrays if hasattr(one, "is_cuda")), None)


def is_mapped() -> bool:
    """Return whether a call is inside ``torch.vmap``."""
    functorch: Any = sys.modules["torch"]._C._functorch
    if functorch.peek_interpreter_stack() is None:
        return False
    levels = functorch.get_interpreter_stack()
    return any(level.key() == functorch.TransformType.Vmap for level in levels)
