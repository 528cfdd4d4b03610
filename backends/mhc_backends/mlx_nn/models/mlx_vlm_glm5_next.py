"""GLM-5.3-Flash of mlx-vlm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own. Its hyper-connections are
DeepSeek-V4's, whose class they have too.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.mlx_vlm_deepseek_v4 import CONNECTION
from mhc_backends.mlx_nn.models.sublayers import constant, enter_layer, few_stay, left, written

__all__ = ["FAMILY"]

glm: Any = import_module("mlx_vlm.models.glm5_next.language")


class Indexer(glm.Glm5NextIndexer):
    """An indexer whose choice is a constant of the gradient."""

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array | None:
        """Return the chosen entries, as the library does."""
        chosen = cast("mx.array | None", super().__call__(*args, **kwargs))
        return None if chosen is None else mx.stop_gradient(chosen)


class Block(glm.DecoderLayer):
    """A layer: attention, linear or sparse, then experts."""

    passes_on = True

    def __call__(
        self,
        x: Any,
        mask: mx.array | None = None,
        cache: Any = None,
        prev_topk_indices: mx.array | None = None,
    ) -> Any:
        """Return the streams, or the pending ones, and the entries that attention chose."""
        if left(self, x, self.attn_hc.called):
            return cast("Any", super().__call__(written(x), mask, cache, prev_topk_indices))
        prev_topk_indices = constant(prev_topk_indices)
        attention = enter_layer(x, self.attn_hc.projection, self.input_layernorm)
        h, chosen = attention.h, prev_topk_indices
        if self.is_linear:
            y = self.self_attn(h, mask, cache)
        else:
            y, chosen = self.self_attn(h, mask, cache, prev_topk_indices)
        experts = enter_layer(
            attention.finish(y), self.ffn_hc.projection, self.post_attention_layernorm
        )
        pending = experts.finish(self.mlp(experts.h))
        return pending if self.passes_on else pending.written(), chosen


class LastBlock(Block):
    """A layer that writes the streams."""

    passes_on = False


FAMILY = Family(
    layers=Layers(
        original=glm.DecoderLayer,
        passing=Block,
        writing=LastBlock,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(),
    ),
    connections={glm.HyperConnection: CONNECTION},
    trainable={
        glm.Glm5NextIndexer: Swap(Indexer, "the entries it chooses are constants of the gradient"),
    },
    untrained={
        glm.Glm5NextIndexer: "it only chooses, so the gradients of all its parameters are zero",
        glm.MoEGate: "e_score_correction_bias only chooses, so its gradient is zero",
    },
    left={},
)
