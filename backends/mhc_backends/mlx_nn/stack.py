"""A stack of connected layers, from one hidden state to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx import nn

from mhc_backends.mlx_nn.block import HyperConnectedBlock
from mhc_backends.mlx_nn.hyper import HyperHead
from mhc_backends.mlx_nn.recompute import recomputed
from mhc_backends.nn_common import (
    Call,
    Recompute,
    calls,
    check_stack,
    checked_recompute,
    collapse,
    is_repeatable,
    received,
    run_sublayers,
    segment,
    sent,
)
from mhc_core import checks, gradients, sharding

__all__ = ["HyperConnectedStack"]


class HyperConnectedStack(nn.Module):
    """Run connected layers from one hidden state to the next: expand, run the layers, collapse.

    One :func:`mhc_core.combine_pre` between two layers reads the streams once, and kernels apply
    the next layer's ``nn.RMSNorm`` in it.

    Parameters
    ----------
    blocks
        :class:`HyperConnectedBlock`, one for each sublayer: attention, MLP, attention, and so on.
    n
        The streams; every block must have as many.
    single_pass
        False is the order of the paper and of DeepSeek-V4: each layer's input is computed with the
        H_pre of its own connection. True is that of DeepSeek-V4.1: the input is computed with the
        H_pre of the previous connection, the first layer reads stream 0, and the last H_pre
        collapses the output.
    recompute
        The size of a segment: in training, that many consecutive sublayers drop their activations
        and run again, layers included, for the gradients. ``"auto"`` is ``sqrt(n L / (n + 2))`` for
        L sublayers; False recomputes nothing.
    head
        A :class:`HyperHead` that collapses the streams; by default their mean does. The single-pass
        order has no head.
    first, last
        False for a stack that is a later, or an earlier, stage of a pipeline. A stage that is not
        the first begins with what the stage before returned: the streams, and in the single-pass
        order also H_pre, as a second argument. One that is not the last returns them.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    **Recomputation** (section 4.3.2 of arXiv:2512.24880). A sublayer keeps (n + 2) C numbers per
    token for its gradients: its streams, h and y. That is 6 L C for L sublayers and n = 4. With
    segments of R sublayers, each segment keeps its first streams and h, (n + 1) C, and one segment
    at a time keeps everything: about ``(n + 1) L / R + (n + 2) R`` times C. Activations inside a
    layer are dropped too. Each layer runs twice in training: one more forward pass.

    The gradients of the trainable parameters and of every array in the call are bit for bit those
    without recomputation. Under ``mx.compile``, which may fuse the two differently, they agree to
    rounding. Other arrays that a layer captures get no gradient, and a layer must not change state
    when it runs, such as running means.

    These calls are not recomputed:

    - in eval mode, or under :func:`mhc_core.no_grad`;
    - with arguments that are not arrays or plain data, such as a cache;
    - if an object that cannot be copied, such as a closure, refers to a submodule of the layer,
      because recomputation runs a copy of the layer;
    - of layers that draw random numbers (dropout), because MLX cannot draw the same numbers again.

    ``mx.vmap`` of a gradient needs ``recompute=False``.

    **Threads** may take gradients through one stack at the same time: traced arrays never enter its
    modules, and no lock is held while a layer runs.

    Sections 3 and 4.3 of arXiv:2512.24880.

    Examples
    --------
    >>> import mlx.core as mx, mlx.nn as nn
    >>> from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack
    >>> stack = HyperConnectedStack([HyperConnectedBlock(nn.Linear(8, 8), 8) for _ in range(6)])
    >>> stack(mx.ones((2, 8))).shape
    (2, 8)
    """

    def __init__(
        self,
        blocks: Sequence[HyperConnectedBlock],
        n: int = 4,
        single_pass: bool = False,
        recompute: Recompute = "auto",
        head: HyperHead | None = None,
        *,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.first = checks.boolean(owner, "first", first)
        self.last = checks.boolean(owner, "last", last)
        self.n = checks.positive_int(owner, "n", n)
        self.single_pass = checks.boolean(owner, "single_pass", single_pass)
        self.recompute: Recompute = checked_recompute(owner, recompute)
        self.blocks = list(blocks)
        kinds = HyperConnectedBlock, HyperHead
        check_stack(owner, self.blocks, self.n, head, single_pass, kinds, last)
        if head is not None:
            self.head = head

    @property
    def segment(self) -> int:
        """Return the number of sublayers in a segment; a single segment is not recomputed."""
        return segment(self.recompute, self.n, len(self.blocks))

    def __call__(
        self,
        h: mx.array,
        *args: Any,
        each: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run ``[..., dims]`` through all blocks, to ``[..., dims]``.

        Every layer gets ``args`` and ``kwargs`` after its input, and the layer of block k also gets
        the keyword arguments ``each[k]``.
        """
        count, size = len(self.blocks), self.segment
        more = received(self.first, self.single_pass) - 1
        state: tuple[mx.array, ...] = (h, *args[:more])
        args = args[more:]
        arguments_of = calls(type(self).__name__, count, args, each, kwargs)
        recompute = self.training and gradients.wanted() and size < count
        recompute = recompute and is_repeatable(arguments_of, (mx.array, mx.Dtype))
        axis = sharding.channel_axis()  # a recomputation runs after the caller's block
        for start in range(0, count, size):
            stop = min(start + size, count)
            arguments = (axis, start, arguments_of[start:stop], *state)
            blocks = self.blocks[start : stop + 1]
            if recompute:
                state = recomputed(self._run, blocks, self._used(start, stop), *arguments)
            else:
                state = self._run(blocks, *arguments)
        if not self.last:
            return sent(state, self.single_pass)
        head = self.head if "head" in self else None
        return collapse(state, self.single_pass, head)

    def _run(
        self,
        blocks: Sequence[HyperConnectedBlock],
        axis: sharding.Axis | None,
        start: int,
        calls: Sequence[Call],
        *state: mx.array,
    ) -> tuple[mx.array, ...]:
        """Run ``len(calls)`` sublayers of ``blocks``, or of copies of them, from ``start`` on."""
        with sharding.channels_over(axis):
            return run_sublayers(blocks, start, calls, state, self.single_pass, self.first)

    def _used(self, start: int, stop: int) -> list[nn.Module]:
        """Return the modules that :meth:`_run` uses: its end makes the next segment's first h."""
        layers = [block.layer for block in self.blocks[start:stop]]
        entered = self.blocks[start + (start > 0) : stop + 1]
        return [*layers, *(own for block in entered for own in (block.connection, block.norm))]
