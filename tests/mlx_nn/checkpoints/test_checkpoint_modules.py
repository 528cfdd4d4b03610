"""load_hyper_connections: the modules that it returns, and models that it loads into."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoint_files import (
    DIMS,
    LAYERS,
    Decoder,
    Flat,
    Foreign,
    Model,
    Text,
    check,
    layers,
    ours,
    parameters,
    prefixed,
    released,
    renamed,
    save,
    stack,
    tensors,
)
from mlx import nn

import mhc_core as mhc
from mhc_core.mlx import HyperConnection, HyperHead, load_hyper_connections


def test_the_modules_compute_what_the_checkpoint_says() -> None:
    weights = released()
    loaded = load_hyper_connections(weights, variant=mhc.DEEPSEEK_V41)
    assert [type(m) for m in loaded.layers[1]] == [HyperConnection, HyperConnection]
    assert isinstance(loaded.head, HyperHead)
    x = mx.random.normal((3, 4, DIMS))
    start = "layers.1.hc_ffn_"
    arrays = [weights[start + name] for name in ("fn", "scale", "base")]
    want = mhc.mappings(x, *arrays, mhc.DEEPSEEK_V41)
    for one, other in zip(loaded.layers[1].ffn.mappings(x), want, strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_streams_are_counted_by_the_shapes(n: int) -> None:
    loaded = load_hyper_connections(released(n))
    assert (loaded.layers[0].attn.n, loaded.layers[0].attn.dims) == (n, DIMS)


@pytest.mark.parametrize("nested", [True, False])
def test_the_constants_come_from_the_config(nested: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "hc_mult": 4,
        "hc_sinkhorn_iters": 7,
        "hc_eps": 1e-5,
        "rms_norm_eps": 1e-20,
    }
    text = json.dumps({"text_config": config} if nested else config)
    (tmp_path / "config.json").write_text(text)
    file = save(tmp_path / "model.safetensors", released())
    want = replace(
        mhc.DEEPSEEK_V4, norm_eps=1e-20, pre_eps=1e-5, sinkhorn_eps=1e-5, sinkhorn_iterations=7
    )
    for source in (file, tmp_path):
        assert load_hyper_connections(source).layers[0].attn.variant == want
    given = load_hyper_connections(file, variant=mhc.DEEPSEEK_V41)
    assert given.layers[0].attn.variant == mhc.DEEPSEEK_V41


def test_without_a_config_they_are_those_of_v4() -> None:
    assert load_hyper_connections(released()).layers[0].attn.variant == mhc.DEEPSEEK_V4


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[str], str]]] = {
    "mlx-lm": (lambda: Text(), lambda name: next(iter(renamed({name: 0})))),
    "in a model": (
        lambda: Model(Text()),
        lambda name: next(iter(prefixed(renamed({name: 0}), "decoder."))),
    ),
    "flat": (
        lambda: Text(Flat),
        lambda name: name.replace("hc_head_", "hc_head."),
    ),
    "ours": (
        lambda: Text(lambda: Decoder(ours), HyperHead(DIMS, 4, mhc.DEEPSEEK_V4)),
        lambda name: next(iter(renamed({name: 0}))),
    ),
}


@pytest.mark.parametrize(("make", "name_in"), MODELS.values(), ids=MODELS)
def test_models_get_every_tensor_and_nothing_else_changes(
    make: Callable[[], nn.Module], name_in: Callable[[str], str]
) -> None:
    weights, model = released(), make()
    before = parameters(model)
    loaded = load_hyper_connections(weights, model)
    after = parameters(model)
    check(loaded, weights)
    own = tensors(loaded)
    places = {name_in(name): name for name in own}
    assert set(places) <= set(after)
    for path, array in after.items():
        assert array is (own[places[path]] if path in places else before[path])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Model(s)], ids=["alone", "in a model"])
@pytest.mark.parametrize("head", [True, False])
def test_a_stack_takes_attention_and_mlp_in_turn(
    wrap: Callable[[nn.Module], nn.Module], head: bool
) -> None:
    weights, target = released(head=head), stack(head)
    loaded = load_hyper_connections(weights, wrap(target))
    for k, block in enumerate(target.blocks):
        assert block.connection.fn is loaded.layers[k // 2][k % 2].fn
        assert mx.array_equal(
            block.connection.base, weights[f"layers.{k // 2}.{PARTS[k % 2]}_base"]
        )
    if head:
        assert mx.array_equal(target.head.fn, weights["hc_head_fn"])


PARTS = ("hc_attn", "hc_ffn")


SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": DIMS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "head_dim": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 2,
    "o_groups": 1,
    "o_lora_rank": 4,
    "moe_intermediate_size": 4,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "compress_ratios": (0,) * LAYERS,
}


def test_the_model_of_mlx_lm_gets_what_its_own_loader_gives_it() -> None:
    library = pytest.importorskip("mlx_lm.models.deepseek_v41", reason="needs mlx-lm==0.32.2")
    one, other = (library.Model(library.ModelArgs(**SIZES)) for _ in range(2))
    weights = {
        name: array
        for name, array in released(head=False).items()
        if "hc_" in name and not name.startswith("mtp")
    }
    one.load_weights(list(one.sanitize(weights).items()), strict=False)
    load_hyper_connections(weights, other)
    assert other.model.layers[1].ffn_hc.fn is not one.model.layers[1].ffn_hc.fn
    for k in range(LAYERS):
        for part in ("attn_hc", "ffn_hc"):
            for name in ("fn", "base", "scale"):
                got, want = (getattr(m.model.layers[k], part)[name] for m in (other, one))
                assert mx.array_equal(got, want)


def test_a_model_keeps_what_has_no_tensor_if_that_is_allowed() -> None:
    model = Text()
    before = parameters(model)
    load_hyper_connections(layers(0), model, allow_missing=True)
    after = parameters(model)
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {f"layers.0.{p}_hc.{n}" for p in ("attn", "ffn") for n in Foreign()}
