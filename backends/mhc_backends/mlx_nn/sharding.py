"""Several processes for one model, on ``mx.distributed``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable
from typing import Any, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends.mlx_nn.gated import Gates
from mhc_backends.mlx_nn.hyper import Projection
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core import sharding

__all__ = ["channels_over", "pipeline_value_and_grad", "shard_channels"]

tree_flatten = cast("Callable[[Any], list[tuple[str, Any]]]", utils.tree_flatten)
tree_unflatten = cast("Callable[[list[tuple[str, Any]]], Any]", utils.tree_unflatten)


@functools.cache
def _all() -> mx.distributed.Group:
    return mx.distributed.init()


@contextlib.contextmanager
def channels_over(group: mx.distributed.Group | None = None) -> Generator[None]:
    """Tell the ops inside that every process of a group has a part of the channels.

    Streams, layer inputs and outputs, norm weights and phi (:func:`shard_channels`) are then parts;
    mappings, scale and bias are the same in all processes, and so are their gradients. What the
    maths needs of the other parts is summed, in one ``all_sum`` each: ``m + 1`` numbers a token in
    ``mappings``, ``pre`` and ``combine_pre``, and for the gradients of H_pre, H_post and H_res as
    many numbers as these have. Streams are never gathered. The ops are those in
    ``mhc_core.sharding.CHANNEL_OPS``, on ``mlx-compiled`` and on the kernels of ``mlx-metal`` and
    ``mlx-cuda``. Take gradients of gradients of whole tokens only.

    ``mx.checkpoint`` runs a function again for its gradients: where these are taken outside the
    block, open it inside that function. ``HyperConnectedStack`` does so itself.

    Parameters
    ----------
    group
        The processes, each with a part of the same size; by default all. Make it once, not in every
        step.

    Raises
    ------
    ValueError
        From an op inside that takes no parts of the channels.

    Examples
    --------
    >>> import mlx.core as mx, mhc_core as mhc
    >>> from mhc_core.mlx import HyperConnection, channels_over, shard_channels
    >>> connection = shard_channels(HyperConnection(dims=8))
    >>> with channels_over():
    ...     h, h_post, h_res = connection.pre(mx.ones((5, 4, 8)))
    >>> h.shape
    (5, 8)
    """
    group = _all() if group is None else group

    def total(part: mx.array) -> mx.array:
        return mx.distributed.all_sum(part, group=group)

    with sharding.channels_over(sharding.Group("mlx", group, group.size(), total)):
        yield


def shard_channels(module: Any, group: mx.distributed.Group | None = None) -> Any:
    """Leave each process its part of phi, in every connection and head of a module, in place.

    Of gated residuals, each process keeps its part of all weights.

    Call the module inside :func:`channels_over`, on this process's part of the channels. Other
    parameters stay; shard a layer by ``mlx.nn.layers.distributed.shard_linear``.

    Parameters
    ----------
    module
        A module of ``mhc_core.mlx``, or one around some.
    group
        The processes; by default all.

    Returns
    -------
    Any
        The module.

    Raises
    ------
    TypeError
        For gated residuals whose projections are no plain matrices: quantised, or with an adapter.
    ValueError
        If the channels are no multiple of the processes.
    """
    group = _all() if group is None else group
    rank, size = group.rank(), group.size()
    modules = cast("list[nn.Module]", module.modules())
    for one in modules:
        if isinstance(one, Gates) and one.weights() is None:
            raise TypeError(
                "shard_channels: a projection of gated residuals is quantised or has an adapter; "
                "needs plain matrices, whose channels are sharded"
            )
        if isinstance(one, (Projection, Gates)) and one.dims % size:
            raise ValueError(
                f"shard_channels: dims is {one.dims}; needs a multiple of the {size} processes"
            )

    def part(weight: mx.array, dims: int, axis: int = 1) -> mx.array:
        """Return this process's channels of the axis n C."""
        by_stream = mx.unflatten(weight, axis, (-1, dims))
        own = mx.split(by_stream, size, axis + 1)[rank]
        return mx.contiguous(mx.flatten(own, axis, axis + 1))

    for one in modules:
        if isinstance(one, Projection):
            one[one.names[0]] = part(one.projection[0], one.dims)
        elif isinstance(one, Gates):
            for layer in (one.hc_norm, *one.projections):
                weight = cast("mx.array", layer["weight"])
                rows = weight.ndim == 1 or layer is one.input_mix_weight_up
                layer["weight"] = part(weight, one.dims, 0 if rows else 1)
        else:
            continue
        one.dims //= size
    return module


def pipeline_value_and_grad(
    stage: HyperConnectedStack,
    loss: Callable[[mx.array], mx.array],
    group: mx.distributed.Group | None = None,
) -> Callable[..., tuple[mx.array, Any]]:
    """Return a function that computes the loss and this stage's gradients in a pipeline.

    The process of rank 0 has the first stage, made with ``first=True, last=False``, and so on. The
    streams, and in the single-pass order H_pre, are sent onward, and their cotangents back.

    Parameters
    ----------
    stage
        This process's part of the stack.
    loss
        A function from the last stage's output to a scalar.
    group
        The processes; by default all.

    Returns
    -------
    Callable
        ``step(h, *args)`` returns the loss, in every process, and the gradients of the stage's
        trainable parameters. h is the hidden state; stages after the first read its shape and dtype
        alone. Further arguments go to every layer.

    Raises
    ------
    ValueError
        If the stage is not made for its place in the group.
    """
    group = _all() if group is None else group
    rank, last = group.rank(), group.size() - 1
    if (stage.first, stage.last) != (rank == 0, rank == last):
        raise ValueError(
            f"pipeline_value_and_grad: the stage has first={stage.first} and last={stage.last}; "
            f"rank {rank} of {last + 1} needs first={rank == 0} and last={rank == last}"
        )

    def receive(like: list[mx.array], source: int) -> list[mx.array]:
        return [mx.distributed.recv_like(one, source, group=group) for one in like]

    def send(arrays: Any, target: int) -> None:
        in_order(mx.distributed.send(one, target, group=group) for one in arrays)

    def in_order(arrays: Iterable[mx.array]) -> None:
        for one in arrays:  # one stage's first array must be the other's first
            mx.eval(one)

    def step(h: mx.array, *args: Any) -> tuple[mx.array, Any]:
        streams = mx.zeros((*h.shape[:-1], stage.n, h.shape[-1]), h.dtype)
        crossing = [streams]
        if stage.single_pass:
            crossing.append(mx.zeros(streams.shape[:-1], mx.float32))
        given = [h] if stage.first else receive(crossing, rank - 1)
        in_order(given)
        names, parameters = zip(*tree_flatten(stage.trainable_parameters()), strict=True)

        def run(*arrays: mx.array) -> Any:
            stage.update(tree_unflatten(list(zip(names, arrays[len(given) :], strict=True))))
            out = stage(*arrays[: len(given)], *args)
            return loss(out) if stage.last else out

        try:
            # lazy: they are received after the outputs are sent
            cotangents = [mx.ones(())] if stage.last else receive(crossing, rank + 1)
            outputs, gradients = mx.vjp(run, [*given, *parameters], cotangents)
        finally:
            stage.update(tree_unflatten(list(zip(names, parameters, strict=True))))
        if not stage.last:
            send(outputs, rank + 1)
        in_order(cotangents)
        mx.eval(gradients)
        if not stage.first:
            send(gradients[: len(given)], rank - 1)
        value = outputs[0] if stage.last else mx.zeros(())
        value = mx.distributed.all_sum(value, group=group)
        return value, tree_unflatten(list(zip(names, gradients[len(given) :], strict=True)))

    return step
