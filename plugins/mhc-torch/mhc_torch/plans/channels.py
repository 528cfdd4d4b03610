"""The kernels on one process's part of the channels: sums over C cross the processes of a group.

The group is that of the block that is open (``mhc_core.sharding.channels_over``). A plan has an
all-reduce between its launches where the maths needs one; ops whose kernels need whole channels run
by formulas, as do tensors that a compiler traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mhc_backends.kernels.ops import OF_PARTS
from mhc_core import gradients, math
from mhc_core.sharding import Group, channel_axis, channels_over
from mhc_torch import _function
from mhc_torch.plans.replay import Replay

__all__ = ["Shared"]

Tensors = tuple[Tensor, ...]
Static = dict[str, Any]
Find = Callable[[str, str, Sequence[Sequence[Tensor]], Static, int], Replay]


class Shared(NamedTuple):
    """An op, and its vjp, on parts of the channels.

    ``find`` returns the plan for what it does (as for :func:`mhc_backends.kernels.plan.record`), an
    op, tensors in groups, static arguments and the number of processes; ``present`` takes out what
    is None, and says so in the static arguments; ``plain`` says whether tensors can be launched on,
    which a transform's cannot.
    """

    find: Find
    present: Callable[[Sequence[Tensor | None], Static], tuple[Tensors, Static]]
    plain: Callable[[Sequence[Tensor]], bool]

    def apply(self, op: str, arrays: Sequence[Tensor | None], static: Static) -> Any:
        """Return an op's outputs, as one node of autograd's graph."""
        there, asked = self.present(arrays, static)
        if op not in OF_PARTS or not self.plain(there):
            return _function.apply(op, tuple(arrays), static)
        graph = torch.is_grad_enabled() and any(one.requires_grad for one in there)
        if graph and gradients.wanted():
            results = cast("Any", _Op).apply(self, op, asked, *there)
        else:
            results = self.find("forward", op, (there,), asked, _group().size)(there)
        outputs = _function.filled(results, math.load(op).OP.kept(static))
        return outputs[0] if len(outputs) == 1 else outputs

    def pull_back(
        self,
        op: str,
        primals: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
        static: Static,
    ) -> tuple[Tensor | None, ...]:
        """Pull cotangents back; None for each primal that is None."""
        there = [one for one in (*primals, *cotangents) if one is not None]
        pull = self._pulled if op in OF_PARTS and self.plain(there) else None
        return _function.pull_back_parts(op, primals, cotangents, static, pull)

    def _pulled(
        self,
        op: str,
        primals: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
        static: Static,
    ) -> tuple[Tensor | None, ...]:
        there, asked = self.present(primals, static)
        given, _ = self.present(cotangents, {})
        pulled = self.find("vjp", op, (there, given), asked, _group().size)((*there, *given))
        return _function.filled(pulled, [one is not None for one in primals])


def _group() -> Group:
    return cast("Group", channel_axis())


class _Op(torch.autograd.Function):
    """An op on parts of the channels as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, shared: Shared, op: str, static: Static, *primals: Tensor) -> Tensors:
        group = _group()
        replay = shared.find("forward_with_saved", op, (primals,), static, group.size)
        results = replay(primals)
        ctx.given = shared, op, static, group, len(primals)
        ctx.save_for_backward(
            *primals, *[results[k] for k in replay.saved], *_function.witness(group, primals)
        )
        return tuple(results[: replay.outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        shared, op, static, group, count = ctx.given
        _function.refuse_second(op, group)
        *kept, _ = ctx.saved_tensors  # a checkpoint recomputes them at each access
        groups = tuple(kept[:count]), cotangents, tuple(kept[count:])
        find = shared.find("vjp", op, groups if groups[2] else groups[:2], static, group.size)
        with channels_over(group):  # a thread of autograd's has a context of its own
            return None, None, None, *find((*groups[0], *cotangents, *groups[2]))
