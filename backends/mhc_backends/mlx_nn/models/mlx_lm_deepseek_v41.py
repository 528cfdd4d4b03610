"""DeepSeek-V4.1 of mlx-lm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.gradients import constant_choices, straight_through, with_globals
from mhc_backends.mlx_nn.models.sublayers import (
    Call,
    Projection,
    check,
    deepseek,
    enter_layer,
    few_stay,
    left,
    written,
)
from mhc_core import mappings

__all__ = ["FAMILY"]

v41: Any = import_module("mlx_lm.models.deepseek_v41")


class Connection(v41.HyperConnection):
    """A hyper-connection on the uniform ops."""

    @property
    def projection(self) -> Projection:
        """Return the projection's parameters for the ops."""
        variant = deepseek(self.norm_eps, self.hc_eps, self.iters)
        return Projection(self.fn, self.scale, self.base, variant)

    def called(self, x: mx.array) -> Call:
        """Return the call that decides what is left to the library."""
        return self.projection.call(x)

    def __call__(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return H_pre, H_post, and H_res transposed."""
        if left(self, streams, self.called):
            return cast("Any", super().__call__(streams))
        h_pre, h_post, h_res = mappings(streams, *self.projection)
        return h_pre, h_post, h_res.swapaxes(-1, -2)


class Layer(v41.DecoderLayer):
    """A layer in the single-pass order: each sublayer's input uses the previous H_pre."""

    passes_on = True

    def __call__(self, streams: Any, pre_mix: mx.array, **state: Any) -> tuple[Any, mx.array]:
        """Return the streams, or the pending ones, and the H_pre for the next sublayer's input."""
        if left(self, streams, self.attn_hc.called):
            return cast("Any", super().__call__(written(streams), pre_mix, **state))
        attention = enter_layer(streams, self.attn_hc.projection, self.input_layernorm, pre_mix)
        y = self.self_attn(attention.h, **state)
        experts = enter_layer(
            attention.finish(y),
            self.ffn_hc.projection,
            self.post_attention_layernorm,
            attention.h_pre,
        )
        pending = experts.finish(self.mlp(experts.h))
        return pending if self.passes_on else pending.written(), experts.h_pre


class LastLayer(Layer):
    """A layer that writes the streams."""

    passes_on = False


class Attention(v41.Attention):
    """Attention with gradients through the rounding of keys and values."""

    __call__ = with_globals(
        v41.Attention.__call__, _fake_quant_fp8=straight_through(v41._fake_quant_fp8)
    )
    _compress = with_globals(
        v41.Attention._compress, _fake_quant_fp4=straight_through(v41._fake_quant_fp4)
    )


class Indexer(v41.Indexer):
    """An indexer whose choice is a constant of the gradient."""

    __call__ = with_globals(v41.Indexer.__call__, mx=constant_choices)


class Router(v41.Router):
    """A router whose choice of experts is a constant; their weights are not."""

    __call__ = with_globals(v41.Router.__call__, mx=constant_choices)


def _check(path: str, connection: Any) -> None:
    check(path, connection, connection.hc, "fn", "scale", "base")


FAMILY = Family(
    layers=Layers(
        original=v41.DecoderLayer,
        passing=Layer,
        writing=LastLayer,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(),
    ),
    connections={
        v41.HyperConnection: Swap(Connection, "runs on mhc-core's ops", _check),
    },
    trainable={
        v41.Attention: Swap(
            Attention, "the rounding of its keys and values has straight-through gradients"
        ),
        v41.Indexer: Swap(Indexer, "the entries it chooses are constants of the gradient"),
        v41.Router: Swap(
            Router,
            "the experts it chooses are constants of the gradient; their weights are not",
        ),
    },
    untrained={
        v41.Indexer: "it only chooses, so the gradients of all its parameters are zero",
        v41.Router: "e_score_correction_bias only chooses, so its gradient is zero",
    },
    left={
        v41.TextModel: "it reads the streams once, after the last layer, by its own formula",
    },
)
