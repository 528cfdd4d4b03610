"""DeepSeek-V4 of mlx-vlm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.gradients import with_globals
from mhc_backends.mlx_nn.models.sublayers import (
    Call,
    Projection,
    check,
    deepseek,
    enter,
    enter_layer,
    few_stay,
    left,
    written,
)
from mhc_core import head

__all__ = ["CONNECTION", "FAMILY"]

v4: Any = import_module("mlx_vlm.models.deepseek_v4.language")


class Connection(v4.HyperConnection):
    """A hyper-connection on the uniform ops, without a loop over the tokens of a block."""

    @property
    def projection(self) -> Projection:
        """Return the projection's parameters for the ops."""
        variant = deepseek(self.norm_eps, self.hc_eps, self.sinkhorn_iters)
        return Projection(self.fn, self.scale, self.base, variant)

    def called(self, x: mx.array) -> Call:
        """Return the call that decides what is left to the library."""
        return self.projection.call(x)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the sublayer's input, H_post, and H_res transposed."""
        if left(self, x, self.called):
            return cast("Any", super().__call__(x))
        entered = enter(x, self.projection)
        return entered.h, entered.h_post, entered.h_res.swapaxes(-1, -2)


class Head(v4.HyperHead):
    """The collapse before the output, without a loop over the tokens of a block."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the hidden state ``[..., C]``."""
        projection = Projection(
            self.fn, self.scale, self.base, deepseek(self.norm_eps, self.hc_eps)
        )
        if left(self, x, functools.partial(projection.call, op="head")):
            return cast("Any", super().__call__(x))
        return head(x, *projection)


class Block(v4.DeepseekV4Block):
    """A layer: attention, then experts."""

    passes_on = True

    def __call__(
        self,
        h: Any,
        mask: mx.array | None,
        cache: Any,
        input_ids: mx.array,
        *args: Any,
        **state: Any,
    ) -> Any:
        """Return the streams, or the pending ones."""
        if left(self, h, self.attn_hc.called):
            return cast("Any", super().__call__(written(h), mask, cache, input_ids, *args, **state))
        attention = enter_layer(h, self.attn_hc.projection, self.attn_norm)
        y = self.attn(attention.h, mask, cache, *args, **state)
        experts = enter_layer(attention.finish(y), self.ffn_hc.projection, self.ffn_norm)
        pending = experts.finish(self.ffn(experts.h, input_ids))
        return pending if self.passes_on else pending.written()


class LastBlock(Block):
    """A layer that writes the streams."""

    passes_on = False


class Indexer(v4.Indexer):
    """An indexer whose choice is a constant of the gradient."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array | None:
        """Return the chosen entries, as the library does."""
        chosen = cast("mx.array | None", super().__call__(*args, **kwargs))
        return None if chosen is None else mx.stop_gradient(chosen)


def _constant_choice(select: Callable[..., Any], logits_at: int) -> Callable[..., Any]:
    """Make a compiled choice of experts a constant; their weights keep their gradient.

    The gradient comes from the library's function for given experts, which adds nothing to the
    weights.
    """

    def selected(*args: Any) -> tuple[mx.array, mx.array]:
        constants = [mx.stop_gradient(a) if isinstance(a, mx.array) else a for a in args]
        chosen, weights = select(*constants)
        table = chosen.reshape(-1, chosen.shape[-1])
        rows = mx.arange(table.shape[0]).reshape(chosen.shape[:-1])
        _, same = v4._hash_expert_select(rows, args[logits_at], table, *args[-3:])
        return chosen, weights + (same - mx.stop_gradient(same))

    return selected


def _of_constant_ids(input_ids: mx.array, *args: Any) -> Any:
    """Choose experts by tokens, which ``mx.checkpoint`` takes for variables."""
    return v4._hash_expert_select(mx.stop_gradient(input_ids), *args)


class Gate(v4.MoEGate):
    """A router whose choice of experts is a constant; their weights are not."""

    @property
    def tid2eid(self) -> mx.array:
        """Return the table of experts by token, as a constant."""
        return mx.stop_gradient(cast("mx.array", self["tid2eid"]))

    __call__ = with_globals(
        v4.MoEGate.__call__,
        _hash_expert_select=_of_constant_ids,
        _vision_expert_select=_constant_choice(v4._vision_expert_select, 0),
        _vision_hash_expert_select=_constant_choice(v4._vision_hash_expert_select, 1),
    )


def _check(path: str, connection: Any) -> None:
    check(path, connection, connection.hc_mult, "fn", "scale", "base")


CONNECTION = Swap(
    Connection,
    "runs on mhc-core's ops, without a loop over the tokens of a short block",
    _check,
)
"""Of every family that uses this class."""

FAMILY = Family(
    layers=Layers(
        original=v4.DeepseekV4Block,
        passing=Block,
        writing=LastBlock,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(),
    ),
    connections={
        v4.HyperConnection: CONNECTION,
        v4.HyperHead: Swap(
            Head, "runs on mhc-core's head, without a loop over the tokens of a short block"
        ),
    },
    trainable={
        v4.Indexer: Swap(Indexer, "the entries it chooses are constants of the gradient"),
        v4.MoEGate: Swap(
            Gate,
            "the experts it chooses are constants of the gradient, their weights are not; "
            "tid2eid, a table of integers, is frozen",
            freeze=("tid2eid",),
        ),
    },
    untrained={
        v4.Indexer: "it only chooses, so the gradients of all its parameters are zero",
        v4.MoEGate: "e_score_correction_bias and bias_vl only choose, so their gradients are zero",
    },
    left={},
)
