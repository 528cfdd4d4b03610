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
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what one layer is called with beside h


class HyperConnectedStack(nn.Module):
    """Take a hidden state through many connected layers: expand it, run them, collapse.

    Between two layers stands one :func:`mhc_core.combine_pre`, which reads the streams once.

    Parameters
    ----------
    blocks
        :class:`HyperConnectedBlock`, one for each sublayer: attention, MLP, attention, and so on.
    n
        The streams; every block must have as many.
    single_pass
        False is the order of the paper and of DeepSeek-V4: each layer reads the streams by its own
        H_pre. True is that of DeepSeek-V4.1: it reads them by the H_pre of the connection before,
        the first one reads stream 0, and the H_pre of the last one collapses the output.
    recompute
        How many sublayers in a row drop their activations in training and run again, with their
        layers, for the gradients. ``"auto"`` takes ``sqrt(n L / (n + 2))`` of L sublayers, False
        none.
    head
        A :class:`HyperHead` to collapse the streams; without one it is their mean. The single-pass
        order has none.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong kind or size, naming them.

    Notes
    -----
    **Recomputation** (section 4.3.2 of arXiv:2512.24880). A sublayer keeps (n + 2) C numbers per
    token for its gradients: its streams, h and y; that makes 6 L C for n = 4. With parts of R
    sublayers, each part keeps its first streams and h, (n + 1) C, and one part at a time keeps all
    of its own: about ``(n + 1) L / R + (n + 2) R`` times C. Each layer runs twice in training,
    which costs one more forward pass; activations inside a layer are dropped with the rest.

    Gradients of the trainable parameters, and of every array that the stack is called with, are bit
    for bit those without recomputation; under ``mx.compile``, which may fuse the two differently,
    they agree to rounding. Other arrays that a layer captures get no gradient, and a layer must not
    change any state when it runs, such as running means. So a call is not recomputed if it is
    passed anything but arrays and plain data, such as a cache; nor in eval mode or under
    :func:`mhc_core.no_grad`; nor if an object that cannot be copied, such as a closure, refers to a
    part of the layer, since a copy is run again. Layers that draw random numbers (dropout) keep
    their activations, since MLX cannot repeat the numbers. ``mx.vmap`` of a gradient needs
    ``recompute=False``.

    **Threads** may take gradients through one stack at once: nothing that is traced is ever put
    into its modules, and no lock is held while a layer runs.

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
    def part(self) -> int:
        """Return how many sublayers drop their activations together; with all of them none do."""
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

        Every layer is called with ``args`` and ``kwargs`` beside its input, and the layer of block
        k with the keyword arguments ``each[k]`` too.
        """
        calls = self._calls(args, each, kwargs)
        count, part = len(self.blocks), self.part
        again = self.training and gradients.wanted() and part < count and is_repeatable(calls)
        state: tuple[mx.array, ...] = (h,)
        for start in range(0, count, part):
            stop = min(start + part, count)
            given = (start, calls[start:stop], *state)
            blocks = self.blocks[start : stop + 1]
            if again:
                state = recomputed(self._run, blocks, self._used(start, stop), *given)
            else:
                state = self._run(blocks, *given)
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
        """Run the sublayers from ``start`` on, as many as there are calls.

        ``blocks`` are those of the sublayers and the next one, or copies of them.
        """
        if start == 0:
            state = self._begun(blocks[0].connection, *state)
        for k, (args, kwargs) in enumerate(calls):
            x, h, h_pre, h_post, h_res = state
            y = blocks[k].transform(h, *args, **kwargs)
            if k + 1 == len(blocks):
                return mhc.combine(x, y, h_post, h_res), h_pre
            following = blocks[k + 1].connection
            given = h_pre if self.single_pass else None
            state = following.combine_pre(x, y, h_post, h_res, given)
        return state

    def _begun(self, first: HyperConnection, h: mx.array) -> tuple[mx.array, ...]:
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
        """Return the modules that :meth:`_run` uses: a part maps for the next one's first layer."""
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
        raise ValueError(f"{owner}: head is given; the single-pass order has none")
    _check_sizes(owner, "head", head, first.n, first.dims)
    return head


def _check_sizes(
    owner: str, name: str, module: HyperConnection | HyperHead, n: int, dims: int
) -> None:
    if (module.n, module.dims) != (n, dims):
        raise ValueError(
            f"{owner}: {name} has n={module.n} and dims={module.dims}; needs n={n} and dims={dims}"
        )
