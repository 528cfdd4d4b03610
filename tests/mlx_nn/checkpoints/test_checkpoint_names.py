"""load_hyper_connections: the names that other projects write, and names like them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import LAYERS, Text, Weights, check, prefixed, released, save

from mhc_core.mlx import load_hyper_connections

HEADS = {
    "released": "hc_head_{}",
    "mlx": "hc_head.{}",
    "transformers": "hc_head.hc_{}",
    "with .weight": "hc_head.hc_{}.weight",
}
LAYERS_OF = {
    "released": ".hc_{}_{}",
    "mlx, transformers": ".{}_hc.{}",
    "torchtitan": ".hc_{}.{}",
    "torchtitan's modules": ".hc_{}_pre.hc_{}",
    "with .weight": ".{}_hc.{}.weight",
}
PREFIXES = (
    "model.language_model.",
    "language_model.model.",
    "transformer.",
    "base_model.model.",
    "base_model.model.model.",
    "module._orig_mod.model.",
    "_orig_mod.module.",
)


def spelled(weights: Weights, layer: str, head: str, prefix: str = "") -> Weights:
    """Return the same checkpoint under other names."""
    found: Weights = {}
    for name, array in weights.items():
        own = re.fullmatch(r"(layers\.\d+)\.hc_(attn|ffn)_(\w+)", name)
        if own:
            name = own[1] + layer.format(*own.groups()[1:])
        elif name.startswith("hc_head_"):
            name = head.format(name.removeprefix("hc_head_"))
        found |= prefixed({name: array}, prefix)
    return found


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layer", LAYERS_OF.values(), ids=LAYERS_OF)
def test_names_of_the_field_are_known(head: str, layer: str) -> None:
    weights = released()
    check(load_hyper_connections(spelled(weights, layer, head)), weights)
    model = Text()
    load_hyper_connections(spelled(weights, layer, head), model)
    assert mx.array_equal(model.hc_head.fn, weights["hc_head_fn"])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_the_field_are_known(prefix: str) -> None:
    weights = released()
    check(load_hyper_connections(spelled(weights, ".{}_hc.{}", "hc_head.hc_{}", prefix)), weights)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module"])
def test_wrappers_of_pytorch_are_known_anywhere(wrapper: str) -> None:
    weights = released()
    wrapped = {re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}.", n): a for n, a in weights.items()}
    check(load_hyper_connections(wrapped), weights)


UNKNOWN = (
    "decoder.hc_head_fn",
    "hc_head_gamma",
    "hc_head_fn.bias",
    "layers.0.hc_attn_fn.weight.scales",
    "layers.0.mhc.phi",
    "visual.layers.0.attn_hc.fn",
    "blk.0.hc_attn_fn.weight",
    "layers.00.hc_attn_fn",
    "layers.0.mlp_hc.fn",
    "layers.0.hyper_connection.alpha",
    "HC_HEAD_FN",
)


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "mapping"])
def test_what_would_be_lost_is_listed(name: str, as_file: bool, tmp_path: Path) -> None:
    weights = released()
    more = weights | {name: mx.zeros((4, 24)), "layers.0.attn.hca.weight": mx.zeros((1,))}
    source: Any = save(tmp_path / "w.safetensors", more) if as_file else more
    with pytest.raises(ValueError, match=rf"{re.escape(name)} in .*allow_unused=True"):
        load_hyper_connections(source)
    check(load_hyper_connections(source, allow_unused=True), weights)


def test_many_that_would_be_lost_are_counted() -> None:
    weights = {f"decoder.{name}": array for name, array in released().items()}
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.hc_attn_fn, .* and \d+ more in"):
        load_hyper_connections(weights)
    with pytest.raises(ValueError, match="no tensor in the mapping has a name such as"):
        load_hyper_connections(weights, allow_unused=True)


@pytest.mark.parametrize("name", ["mtp.0.hc_head.hc_fn", "model.mtp_layers.0.hc_attn_fn"])
def test_drafting_is_left_alone_under_any_name(name: str) -> None:
    weights = released()
    check(load_hyper_connections(weights | {name: mx.zeros((2, 2))}), weights)


def test_a_head_of_a_drafting_layer_is_left_alone(tmp_path: Path) -> None:
    """Check drafting layers: torchtitan's layers beyond the model's have one head each."""
    weights = released()
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    drafting = {f"layers.{LAYERS}.hc_head.hc_fn": mx.zeros((2, 2))}
    check(load_hyper_connections(save(tmp_path / "w.safetensors", weights | drafting)), weights)


@pytest.mark.parametrize("number", ["10000", "30000000", "9" * 5000])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "mapping"])
def test_a_layer_beyond_any_model_is_refused_at_once(
    number: str, as_file: bool, tmp_path: Path
) -> None:
    weights = released() | {f"layers.{number}.hc_attn_fn": mx.zeros((24, 24))}
    source: Any = save(tmp_path / "w.safetensors", weights) if as_file else weights
    with pytest.raises(ValueError, match=rf"layers\.{number[:100]}.* needs a layer below 10000"):
        load_hyper_connections(source)


def test_the_three_ways_of_transformers(tmp_path: Path) -> None:
    """Check files that ``save_pretrained`` itself writes; the head's numbers come back."""
    transformers = pytest.importorskip("transformers", minversion="5.24", reason="needs 5.24")
    pytest.importorskip("torch", reason="PyTorch is not installed, which transformers runs on")
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "head_dim": 8,
        "q_lora_rank": 4,
        "o_groups": 1,
        "o_lora_rank": 4,
        "moe_intermediate_size": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "index_n_heads": 1,
        "index_head_dim": 8,
    }
    config = transformers.DeepseekV4Config(**sizes)
    for k, (kind, original) in enumerate(
        [("ForCausalLM", True), ("ForCausalLM", False), ("Model", True), ("Model", False)]
    ):
        model = getattr(transformers, f"DeepseekV4{kind}")(config)
        model.save_pretrained(tmp_path / str(k), save_original_format=original)
        own = getattr(model, "model", model)
        for loaded in (
            load_hyper_connections(tmp_path / str(k)),
            load_hyper_connections(model.state_dict()),
        ):
            assert loaded.head is not None
            for got, want in [
                (loaded.head.fn, own.hc_head.hc_fn),
                (loaded.layers[1].ffn.fn, own.layers[1].ffn_hc.fn),
            ]:
                assert np.array_equal(np.array(got), want.detach().numpy())
