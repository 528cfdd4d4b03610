"""The ops on DTensors: each device runs an op on its part, and sums over C cross the devices.

A mesh dimension over which the first sharded array has parts of the tokens has parts of the tokens
in all, and no communication; the gradients of what all tokens share are partial sums. One over
which it has parts of the channels has parts of the channels in all: the op sums over C across its
devices, and the gradients of mappings, scale and bias are whole. ``register_sharding`` places the
inputs and outputs of one operator; the all-reduce here lies between an op's projection and the rest
of it, so whole ops run on local tensors, as in ``local_map``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mhc_core.dispatch import get_op
from mhc_core.sharding import Group, channels_over, check_op
from mhc_torch import _function

__all__ = ["apply", "group_of", "is_distributed", "vjp"]

CHANNELS = "channels"

_C: Any = import_module("torch._C")


def is_distributed(arrays: Sequence[Any]) -> bool:
    """Return whether any array is a DTensor; nothing is imported for it."""
    library: Any = sys.modules.get("torch.distributed.tensor")
    return library is not None and any(isinstance(one, library.DTensor) for one in arrays)


def group_of(groups: Sequence[Any]) -> Group:
    """Return the processes of these groups, over all of which a sum is taken."""
    from torch import distributed

    def total(part: Tensor) -> Tensor:
        if (way := _symbolic(part)) is not None:
            raise RuntimeError(
                "channels_over: a sum over the processes is for eager code, and this call is "
                f"under {way}; needs tensors with numbers"
            )
        whole = part.contiguous().clone()
        for group in groups:
            distributed.all_reduce(whole, group=group)
        return whole

    size = math.prod(distributed.get_world_size(group) for group in groups)
    return Group("torch", tuple(groups), size, total)


def _symbolic(part: Tensor) -> str | None:
    """Return what is under way where a tensor stands for others, else None."""
    if _C._functorch.is_batchedtensor(part):
        return "torch.vmap"
    if cast("Any", torch)._is_functional_tensor(part) or isinstance(part, FakeTensor):
        return "torch.compile"
    return None


def apply(
    op: str,
    run: Callable[..., Any],
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    shared: Callable[..., Any] = _function.apply,
) -> Any:
    """Run an op on DTensors.

    ``run`` is the op on local tensors of whole tokens, and ``shared(op, local, static)`` on parts
    of the channels.
    """
    layout = _layout(op, arrays, static)
    local = tuple(map(layout.local, layout.declared.arrays, arrays))
    with channels_over(layout.group):
        whole = layout.group is None
        results = run(*local, **static) if whole else shared(op, local, dict(static))
    several = cast("tuple[Any, ...]", results if isinstance(results, tuple) else (results,))
    outputs = list(map(layout.output, layout.declared.outputs, several))
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def vjp(
    op: str,
    run: Callable[..., Any],
    primals: Sequence[Any],
    cotangents: Sequence[Any],
    static: Mapping[str, Any],
    shared: Callable[..., Any] | None = None,
) -> tuple[Any, ...]:
    """Pull DTensors back.

    ``run`` is the vjp on local tensors of whole tokens, and ``shared(op, primals, cotangents,
    static)`` on parts of the channels, by default the formulas.
    """
    layout = _layout(op, primals, static)
    names, outputs = list(layout.declared.arrays)[: len(primals)], layout.declared.outputs
    given = (
        None if one is None else layout.placed(one, layout.of_output(name)).to_local()
        for name, one in zip(outputs, cotangents, strict=True)
    )
    local = tuple(map(layout.local, names, primals))
    with channels_over(layout.group):
        if layout.group is None:
            gradients = run(op, local, tuple(given), **static)
        elif shared is not None:
            gradients = shared(op, local, tuple(given), dict(static))
        else:
            gradients = _function.pull_back_parts(op, local, tuple(given), dict(static))
    return tuple(map(layout.gradient, names, primals, gradients))


class _Layout(NamedTuple):
    """Which part of an op's arrays each device of a mesh has.

    ``parts`` has, for each dimension of the mesh, a placement of tokens, :data:`CHANNELS`, or None
    where all its devices have the same.
    """

    declared: Any
    mesh: Any
    parts: tuple[Any, ...]
    leading: tuple[int, ...]
    sizes: Mapping[str, int]
    group: Group | None

    def local(self, name: str, array: Any) -> Tensor | None:
        """Return this device's part of an array, with gradients of that part."""
        if array is None:
            return None
        words = self.words(name, array.ndim)
        if self.group is None or "nC" not in words:
            return self._local(array, words)
        k = words.index("nC")  # a part of C is no block of n C
        by_stream = array.unflatten(k, (self.sizes["n"], self.sizes["C"]))
        return self._local(by_stream, _apart(words)).flatten(k, k + 1)

    def _local(self, array: Any, words: Sequence[str]) -> Tensor:
        placed = self.placed(array, self.placements(words))
        return placed.to_local(grad_placements=self.placements(words, shared="sum"))

    def placed(self, array: Any, placements: tuple[Any, ...]) -> Any:
        """Return a DTensor with other placements, or itself."""
        same = tuple(array.placements) == placements
        return array if same else array.redistribute(placements=placements)

    def words(self, name: str, ndim: int) -> list[str]:
        """Return the alternative of an array's shape in words that has its dimensions."""
        for words in self.declared.patterns[name]:
            ahead = len(self.leading) if words[0] == "..." else 0
            if ahead + len(words) - (words[0] == "...") == ndim:
                return words
        raise AssertionError(f"{name} has {ndim} dimensions")  # the signature has checked it

    def placements(self, words: Sequence[str], shared: str = "") -> tuple[Any, ...]:
        """Return the placements of an array, or of its gradient where ``shared`` is "sum"."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        per_token = words[0] == "..."
        ahead = len(self.leading) - 1 if per_token else 0
        found: list[Any] = []
        for part in self.parts:
            if part == CHANNELS:
                found.append(Shard(ahead + words.index("C")) if "C" in words else Replicate())
            elif part is not None and per_token:
                found.append(part)
            else:
                found.append(Partial(shared) if part is not None and shared else Replicate())
        return tuple(found)

    def of_output(self, name: str) -> tuple[Any, ...]:
        """Return the placements of an output."""
        return self.placements(self.declared.outputs[name].shape.split())

    def output(self, name: str, part: Tensor | None) -> Any:
        """Return the DTensor of this device's part of an output."""
        if part is None:
            return None
        words = self.declared.outputs[name].shape.split()
        per_token = words[0] == "..."
        own = part.shape[len(self.leading) if per_token else 0 :]
        whole = [
            self.sizes.get(word, size) for word, size in zip(words[per_token:], own, strict=True)
        ]
        shape = (*self.leading, *whole) if per_token else tuple(whole)
        return self._wrapped(part, self.placements(words), shape)

    def gradient(self, name: str, primal: Any, part: Tensor | None) -> Any:
        """Return the DTensor of this device's part of a primal's gradient."""
        if part is None:
            return None
        words, shape = self.words(name, primal.ndim), tuple(primal.shape)
        if self.group is None or "nC" not in words:
            return self._wrapped(part, self.placements(words, shared="sum"), shape)
        k, n, C = words.index("nC"), self.sizes["n"], self.sizes["C"]
        placements = self.placements(_apart(words), shared="sum")
        by_stream = part.reshape(*part.shape[:k], n, -1, *part.shape[k + 1 :])
        whole = (*shape[:k], n, C, *shape[k + 1 :])
        return self._wrapped(by_stream, placements, whole).flatten(k, k + 1)

    def _wrapped(self, part: Tensor, placements: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part.contiguous(),
            self.mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )


def _layout(op: str, arrays: Sequence[Any], static: Mapping[str, Any]) -> _Layout:
    from torch.distributed.tensor import DTensor

    declared = get_op(op)
    named = {k: one for k, one in zip(declared.arrays, arrays, strict=False) if one is not None}
    for name, one in named.items():
        if not isinstance(one, DTensor):
            raise TypeError(
                f"{op}: {name} is a plain tensor beside DTensors; needs a DTensor too: "
                "DTensor.from_local or distribute_tensor makes one"
            )
    mesh = next(iter(named.values())).device_mesh
    for name, one in named.items():
        if one.device_mesh != mesh:
            raise ValueError(f"{op}: {name} is on {one.device_mesh}; needs {mesh}, as the others")
    first_name, first = next(iter(named.items()))
    words = declared.patterns[first_name][0]
    ahead = first.ndim - len(words) + 1 if words[0] == "..." else 0
    layout = _Layout(declared, mesh, (), tuple(first.shape[:ahead]), _sizes(named, declared), None)
    parts = tuple(_part(op, k, named, layout) for k in range(mesh.ndim))
    shared = [k for k, part in enumerate(parts) if part == CHANNELS]
    if not shared:
        return layout._replace(parts=parts)
    check_op(op)
    group = group_of([mesh.get_group(k) for k in shared])
    if (C := layout.sizes["C"]) % group.size:
        raise ValueError(f"{op}: C is {C}; needs a multiple of the {group.size} devices that share")
    return layout._replace(parts=parts, group=group)


def _sizes(named: Mapping[str, Any], declared: Any) -> dict[str, int]:
    """Return n and C, where the arrays have them."""
    sizes: dict[str, int] = {}
    for name, one in named.items():
        for word, size in zip(declared.patterns[name][0][::-1], one.shape[::-1], strict=False):
            if word in ("n", "C"):
                sizes.setdefault(word, size)
    return sizes


def _part(op: str, mesh_dim: int, named: Mapping[str, Any], layout: _Layout) -> Any:
    """Return what the devices of a mesh dimension have parts of, by the first sharded array."""
    for name, one in named.items():
        placement = one.placements[mesh_dim]
        dim = getattr(placement, "dim", None)
        if dim is None:  # Replicate, or Partial, which is summed first
            continue
        words = layout.words(name, one.ndim)
        if words[0] == "..." and dim < len(layout.leading):
            return placement
        if dim == one.ndim - 1 and words[-1] == "C":
            check_op(op)
            return CHANNELS
        if words[dim - one.ndim] == "nC" and _is_by_channels(placement, layout.sizes["n"]):
            return CHANNELS
        if words[0] == "...":
            raise ValueError(
                f"{op}: {name} is sharded along dimension {dim}, {words[dim - one.ndim]!r}; needs "
                "parts of the tokens or of the channels"
            )
    return None


def _apart(words: Sequence[str]) -> list[str]:
    """Return the words of a shape with n and C apart, where they are merged."""
    k = list(words).index("nC")
    return [*words[:k], "n", "C", *words[k + 1 :]]


def _is_by_channels(placement: Any, n: int) -> bool:
    """Return whether n C is sharded as the flattened [n, C] along C."""
    return n == 1 or getattr(placement, "split_factor", 1) == n
