"""Run mlx-lm's DeepSeek-V4.1 on mhc-core's hyper-connections, then train it.

python examples/accelerate_mlx_lm.py        needs: pip install mlx-lm==0.32.2

The model is a small one with random weights; one from ``mlx_lm.load`` is accelerated alike.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers, utils
from mlx_lm.generate import generate_step
from mlx_lm.models import deepseek_v41

import mhc_core as mhc
from mhc_core.mlx import accelerate

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "head_dim": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "compress_ratios": (0, 2, 2, 1, 1),
    "kv_source_layer_ids": (1, 3),
    "index_source_layer_ids": (1, 3, 4),
    "candidate_source_layer_id": 3,
    "candidate_topk_blocks": 3,
    "candidate_block_size": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
}


def random_model() -> deepseek_v41.Model:
    """Make a model whose hyper-connections have an effect: its own initial values are all zeros."""
    model = deepseek_v41.Model(deepseek_v41.ModelArgs(**SIZES))

    def random(path: str, array: mx.array) -> mx.array:
        if path.endswith("scale"):
            return mx.random.uniform(0.5, 1.5, array.shape)
        if "norm" in path:
            return array
        return mx.random.normal(array.shape) * array.shape[-1] ** -0.5

    model.update(utils.tree_map_with_path(random, model.parameters()))
    return model.eval()


def generate(model: nn.Module, prompt: mx.array, count: int) -> list[int]:
    """Return the most likely tokens after a prompt, generated one at a time."""
    with mhc.no_grad():
        return [int(token) for token, _ in generate_step(prompt, model, max_tokens=count)]


def main() -> None:
    """Compare the model before and after acceleration, then train it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=10)
    options = arguments.parse_args()

    mx.random.seed(0)
    model = random_model()
    prompt = mx.random.randint(0, SIZES["vocab_size"], (20,))
    logits, tokens = model(prompt[None]), generate(model, prompt, options.tokens)

    print(accelerate(model))
    away = mx.abs(model(prompt[None]) - logits).max() / mx.abs(logits).max()
    same = "the same" if generate(model, prompt, options.tokens) == tokens else "others"
    print(f"logits: {away.item():.0e} apart; {options.tokens} greedy tokens: {same}")

    print(accelerate(model, trainable=True))
    model.train()
    optimizer = optimizers.Adam(1e-3)
    text = mx.random.randint(0, SIZES["vocab_size"], (2, 17))

    def loss() -> mx.array:
        return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

    losses: list[float] = []
    for _ in range(options.steps):
        value, gradients = nn.value_and_grad(model, loss)()
        optimizer.update(model, gradients)
        losses.append(value.item())
    print(f"trained: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {options.steps} steps")


if __name__ == "__main__":
    main()
