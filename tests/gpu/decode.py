"""Print the time of accelerated models of transformers over that of the plain ones.

python tests/gpu/decode.py [--hidden 4096] [--layers 4] [--steps 50] [--device cuda] [--train T]

Models with random weights in bfloat16, called in turn: one more token each, with a cache that holds
64, or with --train the forward and the backward of T tokens. Three ratios: of the medians of the
steps' time; as the noise, of that of two plain models; and of the time of a step's kernels
together, by PyTorch's profiler. In training also the ratio of the peaks of memory, each without
what was there before. A family that the installed transformers lacks, or that fails, is one line.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mhc_torch
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "num_attention_heads": 32,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "q_lora_rank": 1024,
    "index_head_dim": 64,
    "index_n_heads": 8,
    "index_topk": 64,
    "hc_mult": 4,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    **COMMON,
    "intermediate_size": 4096,
    "kv_lora_rank": 512,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
}
LINEAR: dict[str, Any] = {"linear_head_dim": 128, "linear_num_heads": 32}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {
            **COMMON,
            "head_dim": 128,
            "o_groups": 4,
            "o_lora_rank": 512,
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        },
    ),
    "glm5_next": (
        "Glm5NextTextModel",
        "Glm5NextTextConfig",
        {
            **LATENT,
            **LINEAR,
            "num_key_value_heads": 32,
            "index_kpool": 2,
            "layer_types": ["linear_attention", "deepseek_sparse_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "hy_v4": ("HYV4ForCausalLM", "HYV4Config", {**LATENT, "qk_rope_head_dim": 64}),
    "qwen4_exp": (
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        {
            "vocab_size": 1024,
            "layer_types": ["linear_attention", "indexed_attention"],
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "linear_num_value_heads": 32,
            "linear_num_key_heads": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 1024,
            "moe_intermediate_size": 1024,
            "indexer_n_heads": 8,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 128,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
}
PER_LAYER = ("layer_types", "mlp_layer_types")


def made(family: str, hidden: int, layers: int, device: str) -> Any:
    """Return a model with random weights."""
    cls, config, sizes = CONFIGS[family]
    sizes = {**sizes, "hidden_size": hidden, "num_hidden_layers": layers}
    for name in PER_LAYER:
        if name in sizes:
            sizes[name] = [sizes[name][k % 2] for k in range(layers)]
    library: Any = transformers
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = getattr(library, cls)(getattr(library, config)(**sizes)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def decoding(model: Any, device: str) -> Callable[[], Any]:
    """Return a function that decodes one more token after a prompt of 64."""
    ids = torch.arange(64, device=device)[None] % 1000 + 3
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    held, one = {name: model(ids, use_cache=True).past_key_values}, ids[:, :1]

    def step() -> None:
        model(one, **held, use_cache=True)

    return step


def training(model: Any, tokens: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return functions that run a model forward, and forward and back, on so many tokens."""
    ids = torch.arange(tokens, device=device)[None] % 1000 + 3

    def forward() -> Tensor:
        return model(ids, use_cache=False)[0]  # the logits, or the last hidden state

    def step() -> None:
        forward().float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return {"forward": forward, "forward and backward": step}


def peak(step: Callable[[], Any]) -> int:
    """Return the most bytes that a step adds to what is allocated."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds(step: Callable[[], Any], device: str) -> float:
    """Return the time of a step, kernels included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def kernels(step: Callable[[], Any], steps: int = 5) -> float:
    """Return the time of a step's kernels in seconds."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in found.key_averages()) / steps / 1e6


def row(family: str, args: argparse.Namespace, everywhere: bool) -> str:
    """Return the ratios of a family."""
    models = [made(family, args.hidden, args.layers, args.device) for _ in range(3)]
    report = mhc_torch.accelerate(models[2], everywhere=everywhere)
    if args.train:
        every = [training(model.train(), args.train, args.device) for model in models]
        parts = [f"{name} {ratios([one[name] for one in every], args)}" for name in every[0]]
        if args.device == "cuda":
            most = [peak(one["forward and backward"]) for one in (every[0], every[2])]
            parts.append(f"memory {most[1] / most[0]:.2f} ({most[0] / 2**30:.2f} GiB)")
    else:
        with torch.no_grad():
            parts = [ratios([decoding(model, args.device) for model in models], args)]
    return "; ".join([*parts, f"replaced {len(report.replaced)}, left {len(report.left)}"])


def ratios(steps: Sequence[Callable[[], Any]], args: argparse.Namespace) -> str:
    """Return the ratios of the third step, and of the second, to the first."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(5):
        for step in steps:
            step()
    for k in range(args.steps):
        for at in range(len(steps)):
            side = (k + at) % len(steps)
            times[side].append(seconds(steps[side], args.device))
    own, noise, ours = map(statistics.median, times)
    text = f"{ours / own:.2f} ({1e3 * own:.2f} ms), plain {noise / own:.2f}"
    if args.device == "cuda":
        launched = [kernels(steps[0]), kernels(steps[2])]
        text += f", kernels {launched[1] / launched[0]:.2f} ({1e6 * launched[0]:.0f} us)"
    return text


def main() -> None:
    """Print one line per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(CONFIGS))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--train", type=int, default=0, metavar="T", help="tokens of a step")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for family in args.families.split(","):
        for everywhere in (False, True) if family == "qwen4_exp" else (False,):
            name = family + ", everywhere" * everywhere
            try:
                print(f"{name}: {row(family, args, everywhere)}", flush=True)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            if args.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
