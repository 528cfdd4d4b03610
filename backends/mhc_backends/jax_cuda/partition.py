"""How devices share the arrays of a function that runs plans: by tokens, by channels, or both.

XLA gathers around a call that it cannot look into. So it is told of every function here which axes
may be sharded, and each device runs the function on its shard: tokens need nothing of the others
but the sums of parameters' gradients, and channels the sums over C. On meshes with Auto axes that
is ``custom_partitioning``; on those with Explicit axes the arrays' types have their shardings, and
it is ``shard_map``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mhc_backends.jax.ops import by_our_rules
from mhc_core.sharding import CHANNEL_OPS

__all__ = ["CHANNELS", "LAX", "Axes", "Layout", "Words", "distributed", "explicit_mesh", "vmapped"]

Words = tuple[str, ...]
"""A word for each axis of an array: a token axis's number, ``"C"``, ``"nC"``, or nothing."""

Arrays = tuple[jax.Array, ...]
Axes = tuple[str, ...]
Function = Callable[..., Arrays]

LAX: Any = jax.lax  # its own stubs leave types open
CHANNELS = "C"
STREAMS = "nC"  # the channels of all streams in one axis, as phi has them


class Layout(NamedTuple):
    """The axes of a function's arrays.

    Attributes
    ----------
    op
        The op's name.
    operands, results
        Each array's words.
    per_token
        Whether each operand, and then each result, has numbers of its own for every token.
    either
        Whether each operand may be one for all tokens or the tokens' own.
    gradients
        Whether the first results are the gradients of the first operands, and summed over the
        tokens where an operand is one for all.
    """

    op: str
    operands: tuple[Words, ...]
    results: tuple[Words, ...]
    per_token: tuple[bool, ...]
    either: tuple[bool, ...]
    gradients: bool

    @property
    def leading(self) -> int:
        """The number of token axes, which the first operand has."""
        return sum(word.isdigit() for word in self.operands[0])

    @property
    def arrays(self) -> tuple[Words, ...]:
        """The words of all operands and results."""
        return (*self.operands, *self.results)

    def sums_tokens(self, result: int) -> bool:
        """Return whether a result is summed over tokens."""
        return self.gradients and not self.per_token[len(self.operands) + result]


def distributed(run: Callable[[Axes, int], Function], layout: Layout) -> Function:
    """Return a function of arrays that may be sharded.

    ``run(axes, devices)`` returns the function of whole tokens, or, with mesh axes and their number
    of devices, that of one part of the channels on each of them.
    """
    whole = run((), 1)

    def function(*arrays: jax.Array) -> Arrays:
        return whole(*arrays)

    def local(axes: Mapping[str, Axes], sizes: Mapping[str, int]) -> Function:
        return by_our_rules(_on_shard(run, layout, axes, sizes))

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        given = [*operands, *results]
        for one in given:
            if not isinstance(one.sharding, NamedSharding):
                raise ValueError(
                    f"{layout.op}: backend 'jax-cuda' got {one.sharding}, arrays on several "
                    "devices without a mesh; needs jax.sharding.NamedSharding, or backend='jax'"
                )
        axes = _shared(layout, mesh.shape, [one.shape for one in given], _specs(given))
        placed = [NamedSharding(mesh, spec) for spec in _placed(layout, axes)]
        count = len(layout.operands)
        return mesh, local(axes, mesh.shape), tuple(placed[count:]), tuple(placed[:count])

    def infer(mesh: Any, operands: Any, results: Any) -> Any:
        specs = [*_specs(operands), *[PartitionSpec() for _ in results]]
        shapes = [one.shape for one in (*operands, *results)]
        placed = _placed(layout, _shared(layout, mesh.shape, shapes, specs))
        return tuple(NamedSharding(mesh, spec) for spec in placed[len(layout.operands) :])

    partitioned: Any = custom_partitioning(function)
    rule, replicated = _rule(layout)
    partitioned.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,  # for JAX without Shardy
        sharding_rule=rule,
        need_replication_factors=replicated,
    )

    def call(*arrays: jax.Array) -> Arrays:
        mesh = explicit_mesh(arrays)
        if mesh is None:
            return partitioned(*arrays)
        specs: list[Any] = [jax.typeof(one).sharding.spec for one in arrays]
        specs += [PartitionSpec() for _ in layout.results]
        outs: Any = jax.eval_shape(run((), 1), *[_plain(one) for one in arrays])
        shapes = [one.shape for one in (*arrays, *outs)]
        axes = _shared(layout, mesh.shape, shapes, specs)
        placed, count = _placed(layout, axes), len(arrays)
        moved = [
            jax.sharding.reshard(one, NamedSharding(mesh, spec))
            for one, spec in zip(arrays, placed, strict=False)
        ]
        # nothing differentiates it, so that nothing needs to know what varies over the devices
        mapped = jax.shard_map(
            local(axes, mesh.shape),
            mesh=mesh,
            in_specs=tuple(placed[:count]),
            out_specs=tuple(placed[count:]),
            check_vma=False,
        )
        return mapped(*moved)

    return call


def explicit_mesh(arrays: Sequence[Any]) -> Any:
    """Return the mesh with Explicit axes in the arrays' types, if there is one."""
    for one in arrays:
        mesh = getattr(getattr(jax.typeof(one), "sharding", None), "mesh", None)
        if any(kind.name == "Explicit" for kind in getattr(mesh, "axis_types", ())):
            return mesh
    return None


def _plain(array: Any) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


# ---- which axes are shared -----------------------------------------------------------------------


def _specs(given: Sequence[Any]) -> list[Any]:
    """Return how arrays are sharded; XLA may not know it yet."""
    return [getattr(one.sharding, "spec", PartitionSpec()) for one in given]


def _shared(
    layout: Layout, sizes: Mapping[str, int], shapes: Sequence[Any], specs: Sequence[Any]
) -> dict[str, Axes]:
    """Return the mesh axes over which each word's axis is sharded.

    The first array that has a word decides. What does not divide evenly is not sharded.
    """
    found: dict[str, Axes] = {}
    for words, shape, spec in zip(layout.arrays, shapes, specs, strict=True):
        for word, length, entry in zip(words, shape, spec, strict=False):
            if word in ("", STREAMS) or word in found or entry is None:
                continue
            axes = (entry,) if isinstance(entry, str) else tuple(entry)
            used = {axis for other in found.values() for axis in other}
            devices = 1
            for axis in axes:
                devices *= sizes[axis]
            if devices > 1 and not used & set(axes) and length % devices == 0:
                found[word] = axes
    return found


def _placed(layout: Layout, axes: Mapping[str, Axes]) -> list[PartitionSpec]:
    return [PartitionSpec(*[axes.get(word) for word in words]) for words in layout.arrays]


def _rule(layout: Layout) -> tuple[str, tuple[str, ...]]:
    """Return Shardy's rule and those of its factors that no device may have a part of."""
    whole: list[str] = []

    def factor(word: str) -> str:
        if word not in ("", STREAMS):
            return f"t{word}" if word.isdigit() else "c"
        whole.append(f"w{len(whole)}")
        return whole[-1]

    sides = [
        ", ".join(" ".join(factor(word) for word in words) for words in arrays)
        for arrays in (layout.operands, layout.results)
    ]
    return " -> ".join(sides), tuple(whole)


# ---- one device's shard --------------------------------------------------------------------------


def _on_shard(
    run: Callable[[Axes, int], Function],
    layout: Layout,
    axes: Mapping[str, Axes],
    sizes: Mapping[str, int],
) -> Function:
    """Return the function of one device's arrays, which sums over the devices what must be."""
    channels = axes.get(CHANNELS, ())
    if channels and layout.op not in CHANNEL_OPS:
        raise ValueError(
            f"{layout.op}: backend 'jax-cuda' got a last axis that is sharded over "
            f"{' and '.join(channels)}, and needs all channels of a token on one device: shard its "
            "tokens, or name backend='jax'"
        )
    tokens = tuple(axis for word, own in axes.items() if word != CHANNELS for axis in own)
    devices = 1
    for axis in channels:
        devices *= sizes[axis]
    function = run(channels, devices)
    summed = [k for k in range(len(layout.results)) if tokens and layout.sums_tokens(k)]

    def shard(*arrays: jax.Array) -> Arrays:
        given = list(arrays)
        for k in summed:  # so that a sum over devices is rounded once
            given[k] = given[k].astype(jnp.float32)
        if channels:
            own = _own_channels(layout, arrays)
            given = [
                _part(one, words.index(STREAMS), own, channels) if STREAMS in words else one
                for one, words in zip(given, layout.operands, strict=True)
            ]
        made = list(function(*given))
        totals: Any = LAX.psum([made[k] for k in summed], tokens) if summed else []
        for k, total in zip(summed, totals, strict=True):
            made[k] = total.astype(arrays[k].dtype)
        if channels:
            own = _own_channels(layout, arrays)
            made = [
                _gathered(one, words.index(STREAMS), own, channels) if STREAMS in words else one
                for one, words in zip(made, layout.results, strict=True)
            ]
        return tuple(made)

    return shard


def _own_channels(layout: Layout, arrays: Sequence[jax.Array]) -> int:
    """Return the number of channels of one device."""
    for one, words in zip(arrays, layout.operands, strict=True):
        if CHANNELS in words:
            return one.shape[words.index(CHANNELS)]
    raise ValueError(f"{layout.op}: none of its arrays has channels")  # no op of this kind exists


def _part(weight: jax.Array, k: int, own: int, channels: Axes) -> jax.Array:
    """Return this device's channels of every stream of a weight whose axis k is n C."""
    count = int(LAX.psum(1, channels))
    start = LAX.axis_index(channels) * own
    streams = _apart(weight, k, own * count)
    return _merged(LAX.dynamic_slice_in_dim(streams, start, own, k + 1), k)


def _gathered(weight: jax.Array, k: int, own: int, channels: Axes) -> jax.Array:
    """Return all devices' channels of every stream of a weight whose axis k is n C."""
    whole: Any = LAX.all_gather(_apart(weight, k, own), channels, axis=k + 1, tiled=True)
    return _merged(whole, k)


def _apart(weight: jax.Array, k: int, channels: int) -> jax.Array:
    return weight.reshape(*weight.shape[:k], -1, channels, *weight.shape[k + 1 :])


def _merged(weight: jax.Array, k: int) -> jax.Array:
    return weight.reshape(*weight.shape[:k], -1, *weight.shape[k + 2 :])


# ---- vmap ----------------------------------------------------------------------------------------


def vmapped(function: Function, layout: Layout, again: Callable[..., Arrays]) -> Function:
    """Return a function whose batch axis is one more leading axis where that is the same.

    It is not where parameters have a batch axis too, or gradients of parameters are wanted for each
    element: then elements run one after another. ``again`` is the function for arrays of any shape.
    """
    count = len(layout.operands)
    custom_vmap: Any = jax.custom_batching.custom_vmap
    batchable = custom_vmap(function)

    @batchable.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: jax.Array) -> tuple[Arrays, Any]:
        of_operands, of_results = layout.per_token[:count], layout.per_token[count:]
        kinds = list(zip(arrays, batched, of_operands, layout.either, strict=True))
        apart = any(has and not own and not either for _, has, own, either in kinds)
        if apart or (layout.gradients and not all(of_results)):
            return _one_by_one(batchable, batched, arrays), (True,) * len(of_results)
        first = batched[0]  # the array whose leading axes all tokens have
        leading = arrays[0].shape[first : first + layout.leading]

        def spread(array: jax.Array, has: bool, own: bool) -> jax.Array:
            if own:
                return array if has else jnp.broadcast_to(array, (size, *array.shape))
            if not has:
                return array
            aside = jnp.expand_dims(array, tuple(range(1, 1 + len(leading))))
            return jnp.broadcast_to(aside, (size, *leading, *array.shape[1:]))

        return again(*[spread(one, has, own) for one, has, own, _ in kinds]), tuple(of_results)

    return batchable


def _one_by_one(function: Function, batched: Sequence[bool], arrays: Sequence[jax.Array]) -> Arrays:
    def step(some: Sequence[jax.Array]) -> Arrays:
        following = iter(some)
        pairs = zip(batched, arrays, strict=True)
        return function(*[next(following) if has else one for has, one in pairs])

    chosen = [one for has, one in zip(batched, arrays, strict=True) if has]
    made: Any = LAX.map(step, chosen)
    return made
