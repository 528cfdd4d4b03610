"""Hunyuan HY-V4 of mlx-vlm: the replacements of its classes.

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
    check_rows,
    constant,
    enter,
    enter_layer,
    few_stay,
    left,
    written,
)
from mhc_core import HY_V4, Variant, head

__all__ = ["FAMILY"]

hy: Any = import_module("mlx_vlm.models.hy_v4.language")
indexer: Any = import_module("mlx_vlm.models.hy_v4.indexer")
v32: Any = import_module("mlx_vlm.models.deepseek_v32.language")
connections: Any = import_module("mlx_vlm.models.hy_v4.hyper_connection")


@functools.cache
def _variant(norm_eps: float, eps: float, magnitude: float) -> Variant:
    """Return the variant of mlx-vlm, which does not add hc_eps to H_post."""
    return replace(HY_V4, norm_eps=norm_eps, pre_eps=eps, post_scale=magnitude, post_eps=0.0)


class Connection(connections.IdentityHyperConnectionPre):
    """The mappings of a hyper-connection on the uniform ops."""

    @property
    def projection(self) -> Projection:
        """Return the projection's parameters for the ops."""
        variant = _variant(self.norm_eps, self.hc_eps, float(self.hc_magnitude))
        return Projection(self.hc_fn, self.hc_scale, self.hc_base, variant)

    def called(self, x: mx.array) -> Call:
        """Return the call that decides what is left to the library."""
        return self.projection.call(x)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return the sublayer's input and H_post."""
        if left(self, x, self.called):
            return cast("Any", super().__call__(x))
        entered = enter(x, self.projection)
        return entered.h, entered.h_post


class Head(connections.IdentityHyperHead):
    """The collapse before the output."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the hidden state ``[..., C]``."""
        variant = _variant(self.norm_eps, self.hc_eps, HY_V4.post_scale)
        projection = Projection(self.hc_head_fn, self.hc_head_scale, self.hc_head_base, variant)
        if left(self, x, functools.partial(projection.call, op="head")):
            return cast("Any", super().__call__(x))
        return head(x, *projection)


class Indexer(indexer.HyV4Indexer):
    """An indexer whose choice is a constant of the gradient."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array | None:
        """Return the chosen entries, as the library does."""
        chosen = cast("mx.array | None", super().__call__(*args, **kwargs))
        return None if chosen is None else mx.stop_gradient(chosen)


class Block(hy.HyV4DecoderLayer):
    """A layer: attention, then experts."""

    passes_on = True

    def __call__(
        self,
        h: Any,
        mask: mx.array | None = None,
        cache: Any = None,
        prev_topk_indices: mx.array | None = None,
    ) -> Any:
        """Return the streams, or the pending ones, and the entries that attention chose."""
        if left(self, h, self.hc_attn_layer.hc_pre.called):
            return cast("Any", super().__call__(written(h), mask, cache, prev_topk_indices))
        prev_topk_indices = constant(prev_topk_indices)
        attention = enter_layer(h, self.hc_attn_layer.hc_pre.projection, self.input_layernorm)
        y, chosen = self.self_attn(attention.h, mask, cache, prev_topk_indices)
        mlp = enter_layer(
            attention.finish(y),
            self.hc_mlp_layer.hc_pre.projection,
            self.post_attention_layernorm,
        )
        pending = mlp.finish(self.mlp(mlp.h))
        return pending if self.passes_on else pending.written(), chosen


class LastBlock(Block):
    """A layer that writes the streams."""

    passes_on = False


def _check(path: str, connection: Any) -> None:
    n = connection.hc_mult
    check_rows(path, connection, n, 2 * n, 2, ("hc_fn", "hc_scale", "hc_base"))


FAMILY = Family(
    layers=Layers(
        original=hy.HyV4DecoderLayer,
        passing=Block,
        writing=LastBlock,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(),
    ),
    connections={
        connections.IdentityHyperConnectionPre: Swap(
            Connection,
            "runs on mhc-core's ops; H_post is this library's, without the hc_eps that "
            "transformers adds to it",
            _check,
        ),
        connections.IdentityHyperHead: Swap(Head, "runs on mhc-core's head"),
    },
    trainable={
        indexer.HyV4Indexer: Swap(Indexer, "the entries it chooses are constants of the gradient"),
    },
    untrained={
        indexer.HyV4Indexer: "it only chooses, so the gradients of all its parameters are zero",
        v32.MoEGate: "e_score_correction_bias only chooses, so its gradient is zero",
    },
    left={},
)
