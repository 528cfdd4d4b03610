"""A stack of connected layers, from one hidden state to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import mlx.core as mx
from mlx import nn

import mhc_core as mhc
from mhc_backends.mlx_nn.block import HyperConnectedBlock
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.recompute import is_repeatable, recomputed
from mhc_core import checks, gradients

__all__ = ["HyperConnectedStack"]

Recompute = Literal["auto", False] | int
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one layer after h


class HyperConnectedStack(nn.Module):
    """Run connected layers from one hidden state to the next: expand, run the layers, collapse.

    One :func:`mhc_core.combine_pre` between two layers reads the streams once.

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
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.n = checks.positive_int(owner, "n", n)
        self.single_pass = checks.boolean(owner, "single_pass", single_pass)
        self.recompute = _checked_recompute(owner, recompute)
        self.blocks = _checked_blocks(owner, blocks, self.n)
        if head is not None:
            self.head = _checked_head(owner, head, self.blocks[0].connection, single_pass)

    @property
    def segment(self) -> int:
        """Return the number of sublayers in a segment; a single segment is not recomputed."""
        count = len(self.blocks)
        if isinstance(self.recompute, str):
            return max(1, round(math.sqrt(self.n * count / (self.n + 2))))
        return min(self.recompute or count, count)

    def __call__(
        self,
        h: mx.array,
        *args: Any,
        each: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> mx.array:
        """Run ``[..., dims]`` through all blocks, to ``[..., dims]``.

        Every layer gets ``args`` and ``kwargs`` after its input, and the layer of block k also gets
        the keyword arguments ``each[k]``.
        """
        calls = self._calls(args, each, kwargs)
        count, segment = len(self.blocks), self.segment
        recompute = self.training and gradients.wanted() and segment < count
        recompute = recompute and is_repeatable(calls)
        state: tuple[mx.array, ...] = (h,)
        for start in range(0, count, segment):
            stop = min(start + segment, count)
            arguments = (start, calls[start:stop], *state)
            blocks = self.blocks[start : stop + 1]
            if recompute:
                state = recomputed(self._run, blocks, self._used(start, stop), *arguments)
            else:
                state = self._run(blocks, *arguments)
        return self._collapsed(*state)

    def _calls(self, args: tuple[Any, ...], each: Any, kwargs: Mapping[str, Any]) -> list[Call]:
        count = len(self.blocks)
        each = cast("Sequence[Mapping[str, Any]]", [{}] * count if each is None else each)
        if len(each) != count:
            raise ValueError(
                f"{type(self).__name__}: each has {len(each)} entries; needs one for each of the "
                f"{count} blocks"
            )
        return [(args, {**kwargs, **own}) for own in each]

    def _run(
        self,
        blocks: Sequence[HyperConnectedBlock],
        start: int,
        calls: Sequence[Call],
        *state: mx.array,
    ) -> tuple[mx.array, ...]:
        """Run ``len(calls)`` sublayers, from number ``start`` on.

        ``blocks`` are the blocks of these sublayers and of the next one, or copies of them.
        """
        if start == 0:
            state = self._first_state(blocks[0].connection, *state)
        for k, (args, kwargs) in enumerate(calls):
            x, h, h_pre, h_post, h_res = state
            y = blocks[k].transform(h, *args, **kwargs)
            if k + 1 == len(blocks):
                return mhc.combine(x, y, h_post, h_res), h_pre
            following = blocks[k + 1].connection
            previous_h_pre = h_pre if self.single_pass else None
            state = following.combine_pre(x, y, h_post, h_res, previous_h_pre)
        return state

    def _first_state(self, first: HyperConnection, h: mx.array) -> tuple[mx.array, ...]:
        """Return the streams, the first layer's input and its mappings."""
        x = mhc.expand(h, self.n)
        h_pre, h_post, h_res = first.mappings(x)
        if not self.single_pass:
            h = mhc.aggregate(x, h_pre)
        return x, h, h_pre, h_post, h_res

    def _collapsed(self, x: mx.array, h_pre: mx.array) -> mx.array:
        if self.single_pass:
            return mhc.aggregate(x, h_pre)
        return self.head(x) if "head" in self else mhc.contract(x, "mean")

    def _used(self, start: int, stop: int) -> list[nn.Module]:
        """Return the modules that :meth:`_run` uses: its end maps for the next segment's start."""
        layers = [block.layer for block in self.blocks[start:stop]]
        norms = [block.norm for block in self.blocks[start:stop]]
        mapping = self.blocks[start + (start > 0) : stop + 1]
        return [*layers, *norms, *(block.connection for block in mapping)]


def _checked_recompute(owner: str, value: Any) -> Recompute:
    if value == "auto" or value is False:
        return value
    if isinstance(value, (bool, str)):
        raise ValueError(
            f"{owner}: recompute is {value!r}; needs 'auto', False or an integer of at least 1"
        )
    return checks.positive_int(owner, "recompute", value)


def _checked_blocks(owner: str, blocks: Any, n: int) -> list[HyperConnectedBlock]:
    blocks = list(blocks)
    if not blocks:
        raise ValueError(f"{owner}: blocks is empty; needs at least one HyperConnectedBlock")
    for k, block in enumerate(blocks):
        if not isinstance(block, HyperConnectedBlock):
            raise TypeError(
                f"{owner}: blocks[{k}] is a {type(block).__name__}; needs a HyperConnectedBlock"
            )
        _check_sizes(owner, f"blocks[{k}]", block.connection, n, blocks[0].connection.dims)
    return blocks


def _checked_head(owner: str, head: Any, first: HyperConnection, single_pass: bool) -> HyperHead:
    if not isinstance(head, HyperHead):
        raise TypeError(f"{owner}: head is a {type(head).__name__}; needs a HyperHead")
    if single_pass:
        raise ValueError(f"{owner}: head is given; the single-pass order has no head")
    _check_sizes(owner, "head", head, first.n, first.dims)
    return head


def _check_sizes(
    owner: str, name: str, module: HyperConnection | HyperHead, n: int, dims: int
) -> None:
    if (module.n, module.dims) != (n, dims):
        raise ValueError(
            f"{owner}: {name} has n={module.n} and dims={module.dims}; needs n={n} and dims={dims}"
        )
