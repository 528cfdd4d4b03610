"""The axis of a device mesh over which the channels of what is being traced are sharded.

Inside a function that a library maps over devices (``jax.shard_map``) an array is one device's
part, and a sum over C is that of its part alone: the formulas of :mod:`mhc_core.math` then sum it
over the devices of this axis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

__all__ = ["channel_axis", "channels_over"]

_axis: ContextVar[str | None] = ContextVar("mhc_channel_axis", default=None)


@contextlib.contextmanager
def channels_over(axis_name: str | None) -> Generator[None]:
    """Sum over C across the devices of a mesh's axis, in what is traced inside the block."""
    token = _axis.set(axis_name)
    try:
        yield
    finally:
        _axis.reset(token)


def channel_axis() -> str | None:
    """Return the axis of :func:`channels_over`, or None outside of it."""
    return _axis.get()
