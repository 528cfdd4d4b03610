"""load_hyper_connections on checkpoints that mlx-vlm itself saves, family by family."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import small
from mlx import nn
from mlx.utils import tree_flatten
from test_families import MAKE, OTHER, quantized

from mhc_core.mlx import load_hyper_connections

SITES = {
    "glm5_next": ("attn_hc", "ffn_hc"),
    "hy_v4": ("hc_attn_layer", "hc_mlp_layer"),
    "qwen4_exp": ("attn_hyper_connection", "mlp_hyper_connection"),
    "xing4_0": ("attn_hc", "ffn_hc"),
}
PARAMETERS = ("hc", "hyper_connection")


def saved(model: Any, folder: Path) -> Path:
    """Save a model as mlx-vlm does."""
    utils = import_module("mlx_vlm.utils")
    utils.save_weights(folder, model)
    utils.save_config(dataclasses.asdict(model.config), folder / "config.json")
    return folder


def layers_of(model: Any) -> Any:
    return getattr(model, "language_model", model).model.layers


def mapped(name: str, theirs: Any, x: mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
    """Return h, H_post and H_res of the library's own connection, H_post as transformers has it."""
    if name == "qwen4_exp":
        h, _, h_post = theirs(x.flatten(-2))
        return h, h_post, None
    if name == "hy_v4":
        h, h_post = theirs(x)
        return h, h_post + OTHER[name]["hc_eps"], None  # which this library leaves out
    if name == "xing4_0":
        h_post, h_res, h = theirs(x)
        return h, h_post, h_res
    h, h_post, comb = theirs(x)
    return h, h_post, comb.swapaxes(-1, -2)


@pytest.mark.parametrize("name", MAKE)
def test_what_mlx_vlm_saves_is_what_it_computes(name: str, tmp_path: Path) -> None:
    model, other = MAKE[name](**OTHER[name]), MAKE[name](seed=1, **OTHER[name])
    before = dict(tree_flatten(other.parameters()))
    loaded = load_hyper_connections(saved(model, tmp_path), other)
    n = loaded.layers[0].attn.n
    x = mx.random.normal((2, 3, n, loaded.layers[0].attn.dims))
    for layer, theirs in zip(loaded.layers, layers_of(model), strict=True):
        for ours, site in zip(layer, SITES[name], strict=True):
            for got, want in zip(ours.pre(x), mapped(name, theirs[site], x), strict=True):
                assert got is want is None or small.apart(got, want) < 1e-5
    text = getattr(model, "language_model", model).model
    if name == "hy_v4":
        assert small.apart(loaded.head(x), text.hc_head(x)) < 1e-5
    elif name == "qwen4_exp":
        assert small.apart(loaded.head(x), text.hyper_connection_mixer(x.flatten(-2))) < 1e-5
    else:
        assert loaded.head is None
    wanted = dict(tree_flatten(model.parameters()))
    filled = 0
    for path, array in tree_flatten(other.parameters()):
        ours = any(word in path for word in PARAMETERS)
        assert mx.array_equal(array, wanted[path]) if ours else array is before[path], path
        filled += ours
    assert filled >= 8 * len(loaded.layers) - 4 * (name != "qwen4_exp")


def test_gates_that_mlx_vlm_quantised_are_what_it_computes(tmp_path: Path) -> None:
    """Load what it saves, and load that into a model quantised in the same way and a plain one."""
    make = MAKE["qwen4_exp"]
    model = quantized(make(hc_lowrank=32))
    site = layers_of(model)[0].attn_hyper_connection
    kinds = {type(layer) for layer in site.children().values()}
    assert nn.QuantizedLinear in kinds
    source = saved(model, tmp_path)
    loaded = load_hyper_connections(source)
    assert type(loaded.layers[0].attn.block_inject_weight) is nn.QuantizedLinear
    x = mx.random.normal((2, 3, loaded.layers[0].attn.n, loaded.layers[0].attn.dims))
    for layer, theirs in zip(loaded.layers, layers_of(model), strict=True):
        for ours, name in zip(layer, SITES["qwen4_exp"], strict=True):
            for got, want in zip(ours.pre(x), mapped("qwen4_exp", theirs[name], x), strict=True):
                assert got is want is None or small.apart(got, want) < 1e-5
    wanted = dict(tree_flatten(model.parameters()))
    same = quantized(make(seed=1, hc_lowrank=32))
    load_hyper_connections(source, same)
    for path, array in tree_flatten(same.parameters()):
        if "hyper_connection" in path:
            assert mx.array_equal(array, wanted[path]), path
    plain = make(seed=1, hc_lowrank=32)
    load_hyper_connections(source, plain)
    for theirs, other in zip(layers_of(model), layers_of(plain), strict=True):
        for name in SITES["qwen4_exp"]:
            found = (one[name](x.flatten(-2)) for one in (other, theirs))
            assert all(small.apart(got, want) < 1e-4 for got, want in zip(*found, strict=True))
