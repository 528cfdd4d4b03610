"""Qwen4-Exp of mlx-vlm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own. Its streams, side by side
in the last axis, are not mixed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import mlx.core as mx
from mlx import nn

import mhc_core
from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.sublayers import Call, few_stay, left

__all__ = ["CONNECTION", "FAMILY"]

mhc: Any = mhc_core  # the arrays here are those of any library
qwen4: Any = import_module("mlx_vlm.models.qwen4_exp.language")

TIMES = float("inf")  # this library compiles its own gates: on a CPU the formulas never gain


class Connection(qwen4.Qwen4ExpGatedResidual):
    """A gated residual on the uniform ops, while its projections are plain matrices."""

    @property
    def plain(self) -> bool:
        """Return whether the projections are plain matrices, not quantised and not adapted."""
        modules: Any = self
        return all(type(modules[name]) is nn.Linear for name in PROJECTIONS if name in modules)

    def called(self, hyper_input: mx.array) -> Call:
        """Return the call on these streams."""
        modules: Any = self
        norm = self.hc_norm
        x = hyper_input.reshape(*hyper_input.shape[:-1], self.hc_count, self.hidden_size)
        weights = [modules[name].weight for name in PROJECTIONS if name in modules]
        op = "gated_pre" if len(weights) == len(PROJECTIONS) else "gated_head"
        return Call(op, (x, norm.weight, *weights), {"eps": norm.eps})

    def __call__(self, hyper_input: mx.array) -> Any:
        """Return the sublayer's input, the streams and H_post; the last mixer, its input alone."""
        if not self.plain or left(self, hyper_input, self.called, TIMES):
            return cast("Any", super().__call__(hyper_input))
        op, arrays, static = self.called(hyper_input)
        if op == "gated_head":
            return mhc.gated_head(*arrays, **static)
        h, h_post = mhc.gated_pre(*arrays, **static)
        return h, hyper_input, h_post.astype(hyper_input.dtype)


PROJECTIONS = ("input_mix_weight_down", "input_mix_weight_up", "block_inject_weight")


class Indexer(qwen4.Qwen4ExpQSAIndexer):
    """An indexer whose choice is a constant of the gradient."""

    def select_from_projected(self, *args: Any, **kwargs: Any) -> Any:
        """Return the chosen blocks, as the library does."""
        chosen: Any = super()
        selection: Any = chosen.select_from_projected(*args, **kwargs)
        if selection is not None:
            selection.selected_blocks = mx.stop_gradient(selection.selected_blocks)
        return selection


class Block(qwen4.Qwen4ExpDecoderLayer):
    """A layer: attention, linear or sparse, then experts."""

    def called(self, x: mx.array) -> Call:
        """Return a call of combine on these streams."""
        streams = x.reshape(*x.shape[:-1], self.attn_hyper_connection.hc_count, -1)
        return Call("combine", (streams, streams[..., 0, :], streams[..., 0]), {})

    def __call__(
        self,
        hidden_states: mx.array,
        input_ids: mx.array,
        mask: mx.array | None,
        cache: Any,
        position_ids: mx.array | None,
    ) -> mx.array:
        """Return the streams."""
        x = hidden_states
        if left(self, x, self.called, TIMES):
            return cast("Any", super().__call__(x, input_ids, mask, cache, position_ids))
        if "ple" in self:
            x = x + self.ple(x, input_ids, cache, mask)
        h, x, h_post = self.attn_hyper_connection(x)
        if self.is_linear:
            y = self.linear_attn(h, mask=mask, cache=cache)
        else:
            y = self.self_attn(h, mask=mask, cache=cache, position_ids=position_ids)
        h, x, h_post = self.mlp_hyper_connection(_written(x, y, h_post))
        return _written(x, self.mlp(h), h_post)


def _written(x: mx.array, y: mx.array, h_post: mx.array) -> mx.array:
    streams = x.reshape(*x.shape[:-1], h_post.shape[-1], y.shape[-1])
    return mhc.combine(streams, y, h_post, None).reshape(x.shape)


CONNECTION = Swap(Connection, "runs on mhc-core's ops while its projections are not quantised")
FAMILY = Family(
    layers=Layers(
        original=qwen4.Qwen4ExpDecoderLayer,
        passing=Block,
        writing=Block,
        why="combine writes its streams in one pass; " + few_stay(TIMES),
    ),
    connections={qwen4.Qwen4ExpGatedResidual: CONNECTION},
    trainable={
        qwen4.Qwen4ExpQSAIndexer: Swap(
            Indexer, "the blocks it chooses are constants of the gradient"
        ),
    },
    untrained={
        qwen4.Qwen4ExpQSAIndexer: "it only chooses, so the gradients of all its parameters are zero"
    },
    left={},
)
