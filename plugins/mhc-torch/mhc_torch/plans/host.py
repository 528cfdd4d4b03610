"""The devices that run plans: what a plan needs of them, and of the places of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mhc_backends.kernels.plan import Launch, Value

__all__ = ["DTYPES", "Host", "Launcher", "Places"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Launcher = Callable[[Sequence[Any]], None]
"""Launches some steps of a plan on the list of a call's tensors; others may still be None in it."""


class Places(Protocol):
    """The place of every buffer of a plan in the list of a call's tensors."""

    count: int
    """The tensors of a call."""
    computed: int
    """How many of these are results of PyTorch's own steps, which may not be there yet."""
    constants: dict[int, tuple[float, ...]]
    """The buffers of numbers that are the same at every call; they have no place."""

    def place(self, value: Value) -> tuple[int, int]:
        """Return the place of a value's tensor, and its offset in it in bytes."""
        ...

    def view(self, value: Value) -> tuple[int, tuple[Any, ...] | None]:
        """Return a value's place, and its shape, strides and offset if it is a part of a tensor."""
        ...


class Host(Protocol):
    """The devices of one kind."""

    dialect: str
    """The language of its kernels, as for :func:`mhc_backends.kernels.plan.record`."""
    shared_workspace: bool
    """True if all buffers that only launches see are one tensor; else they have a tensor each."""

    def memory(self, index: int) -> int:
        """Return the bytes of threadgroup memory for factors of a product on a device."""
        ...

    def guard(self, index: int) -> Any:
        """Return a context in which a device is the current one, or None if it is."""
        ...

    empty: Callable[..., torch.Tensor]
    """``empty(shape, strides, dtype)`` returns a tensor on the current device."""

    def launchers(
        self, parts: Sequence[Sequence[Launch]], places: Places, index: int
    ) -> list[Launcher]:
        """Return a function that launches them for each part of a plan."""
        ...
