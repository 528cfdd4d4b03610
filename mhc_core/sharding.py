"""The devices that share the channels of what is computed.

Where an array is one device's part, a sum over C is that of its part alone: the formulas of
:mod:`mhc_core.math` then sum it over the devices. In a function that is mapped over the devices of
a mesh, they are an axis of the mesh, by name; where every device has a process of its own, they are
a :class:`Group`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "CHANNEL_OPS",
    "Axis",
    "Group",
    "Named",
    "channel_axis",
    "channels_over",
    "check_op",
    "in_this_block",
    "library",
]


@dataclass(frozen=True)
class Group:
    """The processes that share channels: how many, and their all-reduce of one array.

    ``key`` is the library's own group. Groups are equal if their keys are, so that what is made for
    a group is found again.
    """

    library: str
    key: Any
    size: int = field(compare=False)
    total: Callable[[Any], Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Named:
    """An axis of the mesh over whose devices a library maps what it traces."""

    library: str
    name: str


Axis = Named | Group

CHANNEL_OPS = (
    "aggregate",
    "combine",
    "combine_pre",
    "combine_pre_norm",
    "contract",
    "expand",
    "gated_head",
    "gated_pre",
    "head",
    "mappings",
    "pre",
    "pre_norm",
    "pre_residual",
    "residual_add_aggregate",
    "rms_norm",
)
"""The ops that take a part of the channels on each device."""

_axis: ContextVar[Axis | None] = ContextVar("mhc_channel_axis", default=None)


@contextlib.contextmanager
def channels_over(axis: Axis | None) -> Generator[None]:
    """Sum over C across these devices, in what is computed or traced inside the block."""
    token = _axis.set(axis)
    try:
        yield
    finally:
        _axis.reset(token)


def channel_axis() -> Axis | None:
    """Return the devices of :func:`channels_over`, or None outside of it."""
    return _axis.get()


def in_this_block(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs with the devices of here, wherever it is called.

    A recomputation runs in a backward pass: after the block has ended, or in another thread.
    """
    axis = _axis.get()

    def run(*args: Any, **kwargs: Any) -> Any:
        with channels_over(axis):
            return function(*args, **kwargs)

    return run


def library() -> str | None:
    """Return the library whose devices share channels, or None where none do."""
    axis = _axis.get()
    return None if axis is None else axis.library


def check_op(op: str) -> None:
    """Raise ValueError unless an op takes a part of the channels on each device."""
    if op not in CHANNEL_OPS:
        known = ", ".join(CHANNEL_OPS)
        raise ValueError(f"{op}: it takes no sharded channels; of the ops, {known} do")
