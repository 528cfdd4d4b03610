"""Arrays of which each device has a part: sums over the channels of all, and JAX's shardings.

Where devices share the channels an array is a device's part, and a sum over C that of its part.
"""

from __future__ import annotations

import itertools
import math
from importlib import import_module
from typing import Any

from mhc_core.math._xp.libraries import Array, lax
from mhc_core.sharding import Axis, Named, channel_axis, library

__all__ = [
    "channels",
    "devices_of_channels",
    "explicit_sharding",
    "over_channels",
    "placed",
    "resharded",
    "split_last",
    "summed_over_devices",
]


def over_channels(xp: Any, *sums: Array) -> tuple[Array, ...]:
    """Sum one device's sums over C across all devices that have channels, in one all-reduce."""
    axis = _axis_of(xp)
    if axis is None:
        return sums
    if isinstance(axis, Named):
        return lax().psum(sums, axis.name)
    if len(sums) == 1:
        return (axis.total(sums[0]),)
    total = axis.total(xp.concat([xp.reshape(one, (math.prod(one.shape),)) for one in sums]))
    starts = itertools.accumulate((math.prod(one.shape) for one in sums), initial=0)
    return tuple(
        xp.reshape(total[start : start + math.prod(one.shape)], one.shape)
        for start, one in zip(starts, sums, strict=False)
    )


def channels(xp: Any, x: Array) -> int:
    """Return C, on all devices together."""
    return x.shape[-1] * devices_of_channels(xp)


def devices_of_channels(xp: Any) -> int:
    """Return the number of devices that share the channels."""
    axis = _axis_of(xp)
    if axis is None:
        return 1
    return lax().psum(1, axis.name) if isinstance(axis, Named) else axis.size


def _axis_of(xp: Any) -> Axis | None:
    """Return the devices that share this library's channels, if any."""
    sharing = library()
    return channel_axis() if sharing and sharing in xp.__name__ else None


# ---- JAX's shardings ----------------------------------------------------------------------------


def placed(sharding: Any, spec: tuple[Any, ...]) -> Any:
    """Return a sharding of other axes on the same mesh."""
    return type(sharding)(sharding.mesh, type(sharding.spec)(*spec))


def resharded(array: Array, sharding: Any, spec: tuple[Any, ...]) -> Array:
    """Return the array on other devices of a sharding's mesh."""
    return import_module("jax").sharding.reshard(array, placed(sharding, spec))


def explicit_sharding(array: Array) -> Any:
    """Return the sharding in an array's type, which exists on a mesh with Explicit axes."""
    jax = import_module("jax")
    typeof = getattr(jax, "typeof", None)  # JAX 0.6
    sharding = getattr(typeof(array), "sharding", None) if typeof else None
    axis_types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if any(axis_type.name == "Explicit" for axis_type in axis_types) else None


def summed_over_devices(a: Array, axes: int = 1) -> dict[str, Any]:
    """Return where a product over the last axes of ``a`` lies, if Explicit axes shard the last.

    JAX asks to be told: it could also leave a part of the sum on each device.
    """
    sharding = explicit_sharding(a)
    if sharding is None or sharding.spec[-1] is None:
        return {}
    return {"out_sharding": placed(sharding, (*tuple(sharding.spec)[:-axes], None))}


def split_last(sharding: Any) -> Any:
    """Return the sharding of [m, n, C] for that of [m, n C], whose last axis is not sharded."""
    return placed(sharding, tuple(sharding.spec)[:1])
