"""Xing4.0 (TeleChat4) of mlx-vlm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.sublayers import (
    Call,
    Projection,
    check,
    enter,
    enter_layer,
    few_stay,
    left,
    written,
)
from mhc_core import XING40, Variant

__all__ = ["FAMILY"]

xing_v3: Any = import_module("mlx_vlm.models.deepseek_v3.language")
xing: Any = import_module("mlx_vlm.models.xing4_0.language")

TIMES = 4  # in bfloat16 this library's own products are bfloat16, so they are slower only later


@functools.cache
def _variant(norm_eps: float, eps: float, iterations: int, clamp: tuple[float, float]) -> Variant:
    return replace(
        XING40,
        norm_eps=norm_eps,
        sinkhorn_eps=eps,
        sinkhorn_iterations=iterations,
        sinkhorn_clamp=clamp,
    )


class Connection(xing.HyperConnection):
    """A hyper-connection on the uniform ops."""

    @property
    def projection(self) -> Projection:
        """Return the projection's parameters for the ops."""
        config = self.config
        clamp = config.mhc_h_res_clamp_min, config.mhc_h_res_clamp_max
        variant = _variant(config.rms_norm_eps, config.hc_eps, config.hc_sinkhorn_iters, clamp)
        return Projection(self.hc_fn, self.hc_scale, self.hc_base, variant)

    def called(self, x: mx.array) -> Call:
        """Return the call that decides what is left to the library."""
        return self.projection.call(x)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return H_post, H_res and the sublayer's input."""
        if left(self, x, self.called, TIMES):
            return cast("Any", super().__call__(x))
        entered = enter(x, self.projection)
        return entered.h_post.astype(x.dtype), entered.h_res.astype(x.dtype), entered.h


class Block(xing.DecoderLayer):
    """A layer: attention, then the MLP."""

    passes_on = True

    def __call__(self, x: Any, mask: mx.array | None = None, cache: Any = None) -> Any:
        """Return the streams, or the pending ones."""
        if left(self, x, self.attn_hc.called, TIMES):
            return cast("Any", super().__call__(written(x), mask, cache))
        attention = enter_layer(x, self.attn_hc.projection, self.input_layernorm)
        y = self.self_attn(attention.h, mask, cache)
        mlp = enter_layer(
            attention.finish(y), self.ffn_hc.projection, self.post_attention_layernorm
        )
        pending = mlp.finish(self.mlp(mlp.h))
        return pending if self.passes_on else pending.written()


class LastBlock(Block):
    """A layer that writes the streams."""

    passes_on = False


def _check(path: str, connection: Any) -> None:
    check(path, connection, connection.config.hc_mult, "hc_fn", "hc_scale", "hc_base")


FAMILY = Family(
    layers=Layers(
        original=xing.DecoderLayer,
        passing=Block,
        writing=LastBlock,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(TIMES),
    ),
    connections={
        xing.HyperConnection: Swap(Connection, "runs on mhc-core's ops", _check),
    },
    trainable={},
    untrained={
        xing_v3.MoEGate: "e_score_correction_bias only chooses, so its gradient is zero",
    },
    left={},
)
