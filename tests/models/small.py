"""Small models of the real packages, with random weights, behind one interface."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 2,
}
V41 = {
    **COMMON,
    "index_topk": 4,
    "compress_ratios": [0, 2, 2, 1, 1],
    "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 4],
    "candidate_source_layer_id": 3,
    "candidate_topk_blocks": 3,
    "candidate_block_size": 2,
}
V4 = {
    **COMMON,
    "intermediate_size": 32,
    "compress_ratios": [0, 4, 4, 128, 0],
    "num_hash_layers": 1,
}
VLM_V41 = {
    **V41,
    "engram_layer_ids": [],
    "vision_num_layers": 1,
    "vision_hidden_size": 16,
    "vision_num_heads": 1,
    "vision_intermediate_size": 16,
    "image_token_id": 63,
}
# mlx-lm rounds in blocks of 16 and 32, and nothing of other sizes; mlx-vlm has a switch
UNROUNDED = {
    "num_attention_heads": 8,
    "head_dim": 24,
    "index_head_dim": 24,
    "qk_rope_head_dim": 8,
}
# every expert and every entry is chosen, so that no choice can turn over
SMOOTH = {"n_routed_experts": 2, "num_experts_per_tok": 2, "index_topk": 64}

LONG = 20  # tokens: more than the sliding window, and not a multiple of what is compressed


class Family(NamedTuple):
    """One kind of model: how to make it, and where its parts are."""

    package: str
    module: str  # with the classes of its layers
    make: Callable[..., Any]
    layers: str  # their path, before the number
    phi: str  # a parameter in a layer
    rounds: bool  # keys, values and more, to fp8 and fp4

    def known(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a configuration without the fields that this kind of model lacks."""
        return {k: v for k, v in config.items() if k != "num_hash_layers" or not self.rounds}


def random_weights(path: str, value: Any) -> mx.array:
    """Draw weights of a trained model's size, hyper-connections far from their initial values."""
    if value.dtype == mx.int32:
        return mx.random.randint(0, 2, value.shape)  # experts
    if path.endswith("scale"):
        return mx.random.uniform(0.5, 1.5, value.shape)
    if "norm" in path:
        return 1 + 0.1 * mx.random.normal(value.shape)
    if value.ndim == 1:
        return 0.3 * mx.random.normal(value.shape)
    return mx.random.normal(value.shape) * value.shape[-1] ** -0.5


def filled(model: Any, seed: int) -> Any:
    """Set all weights from the seed."""
    mx.random.seed(seed)
    model.update(tree_map_with_path(random_weights, model.parameters()))
    mx.eval(model.parameters())
    return model.eval()


def mlx_lm_v41(seed: int = 0, **config: Any) -> Any:
    """Return mlx-lm's DeepSeek-V4.1."""
    library = import_module("mlx_lm.models.deepseek_v41")
    return filled(library.Model(library.ModelArgs(**{**V41, **config})), seed)


def mlx_vlm_v4(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's DeepSeek-V4."""
    library = import_module("mlx_vlm.models.deepseek_v4")
    return filled(library.Model(library.ModelConfig(**{**V4, **config})), seed)


def mlx_vlm_v41(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's DeepSeek-V4.1."""
    library = import_module("mlx_vlm.models.deepseek_v41")
    return filled(library.Model(library.ModelConfig(**{**VLM_V41, **config})), seed)


GLM = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "deepseek_sparse_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "index_topk": 8,
    "index_kpool": 4,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "linear_head_dim": 32,
    "linear_num_heads": 2,
    "first_k_dense_replace": 1,
    "eos_token_id": 63,
}
GLM_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 1,
    "intermediate_size": 16,
    "out_hidden_size": 64,
    "projection_intermediate_size": 32,
}
HY = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 8,
}
QWEN4 = {
    "model_type": "qwen4_exp_text",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "qwen_sparse_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "hc_lowrank": 16,
    "indexer_n_heads": 2,
    "indexer_head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "rope_parameters": {
        "type": "default",
        "mrope_section": [2, 1, 1],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}
QWEN4_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
XING = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 1,
}


def mlx_vlm_glm5_next(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's GLM-5.3-Flash."""
    library = import_module("mlx_vlm.models.glm5_next")
    made = library.ModelConfig(text_config={**GLM, **config}, vision_config=GLM_VISION)
    return filled(library.Model(made), seed)


def mlx_vlm_hy_v4(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's Hunyuan HY-V4."""
    library = import_module("mlx_vlm.models.hy_v4")
    return filled(library.Model(library.ModelConfig(**{**HY, **config})), seed)


def mlx_vlm_qwen4_exp(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's Qwen4-Exp."""
    library = import_module("mlx_vlm.models.qwen4_exp")
    made = library.ModelConfig.from_dict(
        {
            "model_type": "qwen4_exp",
            "text_config": {**QWEN4, **config},
            "vision_config": {"model_type": "qwen4_exp", **QWEN4_VISION},
        }
    )
    return filled(library.Model(made), seed)


def mlx_vlm_xing4_0(seed: int = 0, **config: Any) -> Any:
    """Return mlx-vlm's Xing4.0."""
    library = import_module("mlx_vlm.models.xing4_0")
    return filled(library.Model(library.ModelConfig(**{**XING, **config})), seed)


FAMILIES = {
    "mlx-lm V4.1": Family(
        package="mlx-lm",
        module="mlx_lm.models.deepseek_v41",
        make=mlx_lm_v41,
        layers="model.layers",
        phi="attn_hc.fn",
        rounds=True,
    ),
    "mlx-vlm V4": Family(
        package="mlx-vlm",
        module="mlx_vlm.models.deepseek_v4.language",
        make=mlx_vlm_v4,
        layers="language_model.model.layers",
        phi="attn_hc.fn",
        rounds=False,
    ),
    "mlx-vlm V4.1": Family(
        package="mlx-vlm",
        module="mlx_vlm.models.deepseek_v41.language",
        make=mlx_vlm_v41,
        layers="language_model.layers",
        phi="hc_attn_fn",
        rounds=True,
    ),
}


MAKE: dict[str, Callable[..., Any]] = {
    **{name: family.make for name, family in FAMILIES.items()},
    "GLM-5.3-Flash": mlx_vlm_glm5_next,
    "HY-V4": mlx_vlm_hy_v4,
    "Qwen4-Exp": mlx_vlm_qwen4_exp,
    "Xing4.0": mlx_vlm_xing4_0,
}
"""Every family in every library: what makes a small model of it."""


class Drafter(NamedTuple):
    """A drafter of mlx-vlm: its configuration, how it drafts, and what makes a model for it."""

    config: dict[str, Any]
    draft_kind: str
    make: Callable[..., Any]


DRAFTERS = {
    "deepseek_v4_mtp": Drafter({"text_config": V4, "block_size": 3}, "mtp", mlx_vlm_v4),
    "deepseek_v4_dspark": Drafter(
        {
            "text_config": V4,
            "n_mtp_layers": 2,
            "target_layer_ids": [1, 3],
            "mask_token_id": 62,
            "markov_rank": 8,
            "block_size": 4,
            "runtime_block_size": 4,
        },
        "dflash",
        mlx_vlm_v4,
    ),
    "qwen4_exp_mtp": Drafter({"text_config": QWEN4, "block_size": 3}, "mtp", mlx_vlm_qwen4_exp),
    "glm5_next_mtp": Drafter({"text_config": GLM, "block_size": 2}, "mtp", mlx_vlm_glm5_next),
    "hy_v4_mtp": Drafter({"text_config": HY, "block_size": 2}, "mtp", mlx_vlm_hy_v4),
}


def drafter(name: str, seed: int = 1) -> Any:
    """Return a small drafter of mlx-vlm with random weights."""
    library = import_module(f"mlx_vlm.speculative.drafters.{name}")
    return filled(library.Model(library.ModelConfig.from_dict(DRAFTERS[name].config)), seed)


def drafted(model: Any, name: str, drafter: Any, count: int) -> tuple[list[int], list[Any]]:
    """Generate with a drafter; return the tokens, and all blocks that it drafted."""
    generate: Any = import_module("mlx_vlm.generate").generate_step
    blocks: list[Any] = []
    draft = drafter.draft_block

    def recorded(*args: Any, **kwargs: Any) -> Any:
        blocks.append(draft(*args, **kwargs))
        return blocks[-1]

    object.__setattr__(drafter, "draft_block", recorded)
    steps = generate(
        tokens(1, LONG),
        model,
        None,
        None,
        max_tokens=count,
        temperature=0.0,
        draft_model=drafter,
        draft_kind=DRAFTERS[name].draft_kind,
    )
    made = [int(token) for token, _ in steps]
    return made, [block.tolist() for block in blocks]


def tokens(*shape: int, seed: int = 7) -> mx.array:
    """Return token ids, without those that mean an image."""
    return mx.random.randint(0, 60, shape, key=mx.random.key(seed))


def logits(model: Any, ids: mx.array, cache: Any = None) -> mx.array:
    """Return the logits of a model of either package."""
    out = model(ids, cache=cache)
    return getattr(out, "logits", out)


def greedy(model: Any, prompts: mx.array, count: int = 64) -> list[list[int]]:
    """Generate for several prompts at once, with the model's own cache."""
    cache = getattr(model, "language_model", model).make_cache()
    chosen, ids = [], prompts
    for _ in range(count):
        ids = mx.argmax(logits(model, ids, cache)[:, -1:], axis=-1)
        chosen.append(ids)
    return mx.concatenate(chosen, axis=1).tolist()


def loss(model: Any, ids: mx.array) -> mx.array:
    """Return the cross-entropy of the next token."""
    predicted = logits(model, ids[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(predicted, ids[:, 1:]).mean()


def gradients(model: Any, ids: mx.array) -> tuple[mx.array, Any]:
    """Return the loss and its gradients, evaluated."""
    value, gradient = nn.value_and_grad(model, lambda ids: loss(model, ids))(ids)
    mx.eval(value, gradient)
    return value, gradient


def apart(a: mx.array, b: mx.array) -> float:
    """Return the largest difference, relative to the largest value."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def equal(a: mx.array, b: mx.array) -> bool:
    """Return whether two arrays have the same bits; zeros have a sign, NaN equals nothing."""
    return a.dtype == b.dtype and bool(mx.array_equal(a, b).item())


def only_connections(layer: Any) -> Any:
    """Disable a layer's attention, experts and norms, so that its connections are tested alone."""
    kept = ("attn_hc", "ffn_hc", "engram")
    for name in [name for name in layer.children() if name not in kept]:
        layer.pop(name)
        object.__setattr__(layer, name, lambda h, *_, **__: h)
    return layer


def call_layer(layer: Any, h: Any, mixes: mx.array) -> tuple[Any, ...]:
    """Call a layer of any kind; return what it returns, V4.1's mixes included."""
    module = type(layer).__module__
    if module.endswith("mlx_vlm_deepseek_v4"):
        return (layer(h, None, None, None),)
    return layer(h, mixes) if "mlx_lm_" in module else layer(h, mixes, None, None)


def classes(model: Any) -> dict[str, type[Any]]:
    """Return the class of every module by its path."""
    return {path: type(module) for path, module in model.named_modules()}


VIEWS = {
    "AsStrided",
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}


def nodes(*outputs: mx.array) -> int:
    """Return how many nodes MLX has to compute for some arrays: a launch each, on a GPU."""
    with NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs)
        text = Path(file.name).read_text()
    names = re.findall(r'label ="(\w+)", shape=rectangle', text)
    return sum(name not in VIEWS for name in names)
