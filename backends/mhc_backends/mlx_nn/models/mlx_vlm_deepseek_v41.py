"""DeepSeek-V4.1 of mlx-vlm: the replacements of its classes.

Each class is a subclass of the library's, without parameters of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import mlx.core as mx

from mhc_backends.mlx_nn.models.family import Family, Layers, Swap
from mhc_backends.mlx_nn.models.gradients import (
    constant_choices,
    straight_through,
    with_globals,
    with_gradient,
)
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

__all__ = ["FAMILY"]

v41: Any = import_module("mlx_vlm.models.deepseek_v41.language")
engram: Any = import_module("mlx_vlm.models.deepseek_v41.engram")


def _names(sublayer: str) -> list[str]:
    return [f"hc_{sublayer}_{name}" for name in ("fn", "scale", "base")]


class Block(v41.DeepseekV41Block):
    """A layer in the single-pass order: each sublayer's input uses the previous H_pre."""

    passes_on = True

    def projection(self, sublayer: str) -> Projection:
        """Return the parameters of the projection before ``attn`` or ``ffn``, for the ops."""
        fn, scale, base = _names(sublayer)
        variant = deepseek(self.norm_eps, self.hc_eps, self.hc_sinkhorn_iters)
        return Projection(self[fn], self[scale], self[base], variant)

    def called(self, x: mx.array) -> Call:
        """Return the call that decides what is left to the library."""
        return self.projection("attn").call(x)

    def __call__(
        self, h: Any, pre_mix: mx.array, image_mask: mx.array | None, cache: Any
    ) -> tuple[Any, mx.array]:
        """Return the streams, or the pending ones, and the H_pre for the next sublayer's input."""
        if left(self, h, self.called):
            return cast("Any", super().__call__(written(h), pre_mix, image_mask, cache))
        attention = enter_layer(h, self.projection("attn"), self.attn_norm, pre_mix)
        y = self.attn(attention.h, cache)
        experts = enter_layer(
            attention.finish(y), self.projection("ffn"), self.ffn_norm, attention.h_pre
        )
        pending = experts.finish(self.ffn(experts.h, image_mask))
        return pending if self.passes_on else pending.written(), experts.h_pre


class WritingBlock(Block):
    """A layer that writes the streams, before an engram or the output."""

    passes_on = False


_fp8 = straight_through(v41.fake_quant_fp8_ue8m0)


def _rotary(x: mx.array, cos: mx.array, sin: mx.array, rope_dim: int) -> mx.array:
    """Rotate as the library does; the gradient is rotated in the opposite direction."""

    def rotated(x: mx.array, sin: mx.array) -> mx.array:
        return v41._apply_index_rotary(x, cos, sin, rope_dim)

    return with_gradient(lambda x: rotated(x, sin), lambda cotangent: rotated(cotangent, -sin))(x)


class Attention(v41.DeepseekV41Attention):
    """Attention with gradients through its roundings and rotations."""

    _attention = with_globals(v41.DeepseekV41Attention._attention, fake_quant_fp8_ue8m0=_fp8)
    _window_part = with_globals(v41.DeepseekV41Attention._window_part, fake_quant_fp8_ue8m0=_fp8)
    _compress_part = with_globals(
        v41.DeepseekV41Attention._compress_part,
        fake_quant_fp4_e4m3=straight_through(v41.fake_quant_fp4_e4m3),
        _apply_rope_at_positions=with_globals(
            v41._apply_rope_at_positions, _apply_index_rotary=_rotary
        ),
    )


class Indexer(v41.Indexer):
    """An indexer whose choice is a constant of the gradient."""

    __call__ = with_globals(v41.Indexer.__call__, mx=constant_choices)


class MLP(v41.DeepseekV41MLP):
    """A shared expert with gradients through its roundings."""

    __call__ = with_globals(v41.DeepseekV41MLP.__call__, fake_quant_fp8_ue8m0=_fp8)


class SwiGLU(v41.DeepseekV41SwiGLU):
    """The routed experts' activation with gradients through its rounding."""

    __call__ = with_globals(v41.DeepseekV41SwiGLU.__call__, fake_quant_fp8_ue8m0=_fp8)


class MoE(v41.DeepseekV41MoE):
    """Experts with gradients through the rounding of their input."""

    __call__ = with_globals(v41.DeepseekV41MoE.__call__, fake_quant_fp8_ue8m0=_fp8)


class Engram(engram.Engram):
    """An engram with gradients through the rounding of its rows."""

    __call__ = with_globals(engram.Engram.__call__, fake_quant_fp8_ue8m0=_fp8)


def _check(path: str, block: Any) -> None:
    for sublayer in ("attn", "ffn"):
        check(path, block, block.hc_mult, *_names(sublayer))


def _accepts_pending(block: Any) -> bool:
    return block.engram is None


_ROUNDING = "its rounding to fp8 has straight-through gradients"

FAMILY = Family(
    layers=Layers(
        original=v41.DeepseekV41Block,
        passing=Block,
        writing=WritingBlock,
        why="its hyper-connections run on mhc-core's ops; combine_pre writes the streams and reads "
        "them in one pass; " + few_stay(),
        accepts_pending=_accepts_pending,
        check=_check,
    ),
    connections={},
    trainable={
        v41.DeepseekV41Attention: Swap(
            Attention,
            "its roundings have straight-through gradients, its rotation a gradient",
        ),
        v41.Indexer: Swap(Indexer, "the entries it chooses are constants of the gradient"),
        v41.DeepseekV41MLP: Swap(MLP, _ROUNDING),
        v41.DeepseekV41SwiGLU: Swap(SwiGLU, _ROUNDING),
        v41.DeepseekV41MoE: Swap(MoE, _ROUNDING),
        engram.Engram: Swap(Engram, _ROUNDING),
    },
    untrained={
        v41.Indexer: "it only chooses, so the gradients of all its parameters are zero",
        v41.DeepseekV41MoEGate: "bias and bias_vl only choose, so their gradients are zero",
        engram.OffloadedEngramEmbedding: "it reads its rows from a file, which does not change",
        engram.QuantizedEngramEmbedding: "it is quantised, so it cannot be trained",
    },
    left={
        v41.LanguageModel: "it reads the streams once, after the last layer, by its own formula",
        engram.Engram: "it adds to the streams between two layers, so the layer before writes them",
    },
)
