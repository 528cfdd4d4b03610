"""The drafter of DeepSeek-V4 in mlx-vlm that drafts a block at once: layers on a model's streams.

Each class is a subclass of the library's, without parameters of its own.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from operator import attrgetter
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models import mlx_vlm_deepseek_v4
from mhc_backends.mlx_nn.models.family import Layers
from mhc_backends.mlx_nn.models.sublayers import enter_layer, few_stay, left, written

__all__ = ["FAMILY"]

dspark: Any = import_module("mlx_vlm.speculative.drafters.deepseek_v4_dspark.deepseek_v4_dspark")


class Stage(dspark.DSparkStage):
    """A layer: attention to the model's hidden states, then experts."""

    passes_on = True

    def __call__(self, h: Any, main_x: mx.array, cache: Any) -> Any:
        """Return the streams, or the pending ones."""
        if left(self, h, self.attn_hc.called):
            return cast("Any", super().__call__(written(h), main_x, cache))
        attention = enter_layer(h, self.attn_hc.projection, self.attn_norm)
        y = self.attn(attention.h, main_x, cache)
        experts = enter_layer(attention.finish(y), self.ffn_hc.projection, self.ffn_norm)
        pending = experts.finish(self.ffn(experts.h, None))
        return pending if self.passes_on else pending.written()


class LastStage(Stage):
    """A layer that writes the streams."""

    passes_on = False


FAMILY = replace(
    mlx_vlm_deepseek_v4.FAMILY,
    order=attrgetter("stages"),
    layers=Layers(
        original=dspark.DSparkStage,
        passing=Stage,
        writing=LastStage,
        why="combine_pre writes its streams and reads them in one pass; " + few_stay(),
    ),
)
