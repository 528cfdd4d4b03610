"""The declaration of a family of models, and what its replacements share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor, nn

from mhc_backends.acceleration import Swap
from mhc_torch import cuda

__all__ = [
    "EVERYWHERE",
    "Family",
    "classes_of",
    "difference",
    "has_values",
    "installed",
    "pays",
    "require",
]

EVERYWHERE = "_mhc_everywhere"  # an attribute of modules: the argument of accelerate


def _nothing_left(_: type[Any], __: Any) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The replacements of a library's classes, for the models of one of its modules.

    Attributes
    ----------
    swaps
        The subclass for each class; its check runs once, on the model's first instance.
    leaves
        Returns why the instances of a class stay unchanged, or None; it gets the first one.
    """

    swaps: Mapping[type[Any], Swap]
    leaves: Callable[[type[Any], Any], str | None] = _nothing_left


def installed() -> str:
    """Return the installed transformers in words."""
    try:
        return f"transformers {version('transformers')}"
    except PackageNotFoundError:
        return "transformers of unknown version"


def classes_of(home: str, names: Sequence[str]) -> list[Any]:
    """Return classes of a library's module; raise, naming those that it does not have."""
    module = import_module(home)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise RuntimeError(
            f"accelerate: {home} of {installed()} has no {', '.join(missing)}; look for a newer "
            "mhc-torch"
        )
    return [getattr(module, name) for name in names]


def require(path: str, module: Any, names: Sequence[str]) -> None:
    """Raise unless a module has attributes of these dotted names."""
    for name in names:
        value: Any = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            raise RuntimeError(
                f"accelerate: {path}, a {type(module).__name__} of {installed()}, has no {name}; "
                "look for a newer mhc-torch"
            )


def has_values(module: nn.Module) -> bool:
    """Return whether a module's parameters are whole and on a real device."""
    return not any(p.is_meta or hasattr(p, "full_tensor") for p in module.parameters())


def difference(got: Any, want: Any) -> float:
    """Return the largest difference of tensors or tuples of them, relative to the largest entry."""
    pairs = zip(_tuple(got), _tuple(want), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", value) if isinstance(value, tuple) else (value,)


def pays(module: nn.Module, x: Tensor) -> bool:
    """Return whether the ops are not slower than the model's own code for these streams."""
    if vars(module).get(EVERYWHERE):
        return True
    return x.is_cuda and x.dtype != torch.float64 and _kernels(x.get_device())


def _has_kernels(index: int) -> bool:
    if index not in _KERNELS:
        probe = torch.empty(0, device=f"cuda:{index}")
        _KERNELS[index] = not cuda.missing() and not cuda.takes((probe,))
    return _KERNELS[index]


_KERNELS: dict[int, bool] = {}
_kernels = cast("Callable[[int], bool]", torch.compiler.assume_constant_result(_has_kernels))
