"""Several processes for one model: ``from mhc_torch.distributed import ChannelParallel``.

The ops take DTensors: sharded tokens need no communication, and sharded channels one all-reduce of
m + 1 numbers a token in each ``pre``. The styles here, for ``parallelize_module``, make DTensors of
a module's parameters and of its input; :func:`channels_over` is for programs whose tensors are
plain parts, as Megatron's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, cast

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

import mhc_torch.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from mhc_core import sharding
from mhc_torch._dtensor import group_of
from mhc_torch.gated import is_matrix
from mhc_torch.nn import GatedConnection, GatedHead, HyperConnection, HyperHead

__all__ = ["ChannelParallel", "TokenParallel", "channels_over"]


@contextlib.contextmanager
def channels_over(group: distributed.ProcessGroup | None = None) -> Generator[None]:
    """Tell the ops inside that every process of a group has a part of the channels.

    Streams, layer inputs and outputs, norm weights, phi (``[m, n, C]`` sharded along C, then
    flattened) and, likewise, the weights of gates are then parts; mappings, scale and bias are the
    same in all processes, and so are their gradients. What the maths needs of the other parts is
    summed, in one all-reduce each: ``m + 1`` numbers a token in ``mappings``, ``pre`` and
    ``combine_pre``, and for the gradients of H_pre, H_post and H_res as many numbers as these have.
    Streams are never gathered. The ops are those in ``mhc_core.sharding.CHANNEL_OPS``, on the
    backends ``torch`` and ``torch-cuda``.

    DTensors need no block: their placements say it. The block is for eager code: torch.compile
    cannot look at it, and torch.vmap maps no sum over processes.

    ``torch.utils.checkpoint`` runs a function again in the backward pass, where this block is not
    open: open it inside that function. ``HyperConnectedStack`` does so itself. Without reentrance a
    block around the checkpoint is an error of PyTorch's, "A different number of tensors was saved",
    unless the backward pass is inside the block too; with reentrance it gives wrong gradients.

    Parameters
    ----------
    group
        The processes, each with a part of the same size; by default all.

    Raises
    ------
    ValueError
        From an op inside that takes no parts of the channels.
    """
    group = distributed.group.WORLD if group is None else group
    with sharding.channels_over(group_of([group])):
        yield


class _Style(ParallelStyle):
    """A style whose module takes its first argument as a DTensor, and returns one or a tensor."""

    def __init__(
        self,
        part: Placement,
        input_layouts: Placement | None,
        output_layouts: Placement | None,
        use_local_output: bool,
    ) -> None:
        super().__init__()
        self._part = part
        self._given = part if input_layouts is None else input_layouts
        self._returned = output_layouts
        self._use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module, device_mesh, self._distribute, self._take, cast("Any", self._return)
        )

    def _distribute(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            made = self._parameter(module, key, parameter, mesh)
            module.register_parameter(key, nn.Parameter(made, parameter.requires_grad))

    def _parameter(self, module: nn.Module, key: str, parameter: Any, mesh: DeviceMesh) -> DTensor:
        """Return a parameter that all devices have."""
        return distribute_tensor(parameter.data, mesh, [Replicate()])

    def _take(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        return (*(self._taken(one, mesh) for one in inputs[:1]), *inputs[1:])

    def _taken(self, array: Any, mesh: DeviceMesh) -> DTensor:
        if not isinstance(array, DTensor):
            array = DTensor.from_local(array, mesh, [self._given], run_check=False)
        return self._placed(array, self._part)

    def _return(self, module: nn.Module, outputs: Any, mesh: DeviceMesh) -> Any:
        if isinstance(outputs, tuple):
            return tuple(map(self._returned_as, cast("tuple[Any, ...]", outputs)))
        return self._returned_as(outputs)

    def _returned_as(self, array: Any) -> Any:
        if self._returned is not None:
            array = self._placed(array, self._returned)
        return array.to_local() if self._use_local_output else array

    def _placed(self, array: DTensor, placement: Placement) -> DTensor:
        if isinstance(placement, Shard):
            placement = Shard(placement.dim % array.ndim)
        return array.redistribute(placements=[placement])


class ChannelParallel(_Style):
    """Shard the channels of a module of :mod:`mhc_torch.nn` over the devices of a mesh.

    For ``parallelize_module``, on a :class:`~mhc_torch.nn.HyperConnectedStack`, a block, a
    connection, a head, or a module around them. phi is sharded with the streams, without a gather
    in either direction, and so are all weights of gated residuals; scale and bias are whole. Layers
    take and return DTensors with ``Shard(-1)``: style them before with
    ``RowwiseParallel(output_layouts=Shard(-1), use_local_output=False)`` and the like. Parameters
    that no style has made DTensors are replicated, and PyTorch's own operators then shard what they
    can.

    Parameters
    ----------
    input_layouts
        What the first argument is, if it is a plain tensor; ``Replicate()`` by default.
    output_layouts
        What the result is redistributed to; by default it stays as it is, ``Shard(-1)``.
    use_local_output
        Whether a plain tensor is returned: this device's part.

    Examples
    --------
    >>> from torch.distributed.tensor import Replicate
    >>> from mhc_torch.distributed import ChannelParallel
    >>> style = ChannelParallel(output_layouts=Replicate())
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        given = Replicate() if input_layouts is None else input_layouts
        super().__init__(Shard(-1), given, output_layouts, use_local_output)

    def _distribute(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if isinstance(module, (GatedConnection, GatedHead)):
            if not all(map(is_matrix, module.projections)):
                raise TypeError(
                    f"ChannelParallel: a projection of {name or 'the gates'} is quantised or has "
                    "an adapter or a hook; needs plain matrices, whose channels are sharded"
                )
            up = module.input_mix_weight_up
            for layer in (module.hc_norm, *module.projections):
                weight = layer.get_parameter("weight")
                made = _by_channels(weight, 0 if layer is up else -1, module, mesh)
                layer.register_parameter("weight", nn.Parameter(made, weight.requires_grad))
        super()._distribute(name, module, mesh)

    def _parameter(self, module: nn.Module, key: str, parameter: Any, mesh: DeviceMesh) -> DTensor:
        """Return phi with its channels sharded, and what is no phi on all devices."""
        if isinstance(module, (HyperConnection, HyperHead)) and parameter is module.projection[0]:
            return _by_channels(parameter, -1, module, mesh)
        return super()._parameter(module, key, parameter, mesh)


def _by_channels(weight: Tensor, dim: int, module: Any, mesh: DeviceMesh) -> DTensor:
    """Return a weight whose axis n C is sharded along C."""
    dim %= weight.ndim
    by_stream: Tensor = cast("Any", weight.data).unflatten(dim, (module.n, module.dims))
    sharded = distribute_tensor(by_stream, mesh, [Shard(dim + 1)])
    return cast("DTensor", sharded.flatten(dim, dim + 1))


class TokenParallel(_Style):
    """Shard the tokens of a module of :mod:`mhc_torch.nn` over the devices of a mesh.

    For ``parallelize_module``, as :class:`ChannelParallel`. Parameters are on all devices, and
    their gradients are sums over the devices (``Partial`` placements, which the optimizer or
    ``full_tensor()`` sums); nothing else is exchanged.

    Parameters
    ----------
    dim
        The dimension of the first argument that is sharded: 0 for the batch, 1 for the sequence of
        ``[batch, sequence, C]``.
    input_layouts
        What the first argument is, if it is a plain tensor; this device's part by default.
    output_layouts
        What the result is redistributed to; by default it stays sharded.
    use_local_output
        Whether a plain tensor is returned: this device's part.

    Examples
    --------
    >>> from mhc_torch.distributed import TokenParallel
    >>> style = TokenParallel(1)
    """

    def __init__(
        self,
        dim: int = 0,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__(Shard(dim), input_layouts, output_layouts, use_local_output)
