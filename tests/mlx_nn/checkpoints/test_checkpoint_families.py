"""load_hyper_connections on the families of released models, under the names of their checkpoints.

The weights are those of golden cases, so what is loaded must compute what the families' own code
computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import Weights, folder, having, parameters, save, without
from golden import problems, read_subset
from mlx import nn, utils

import mhc_core as mhc
from mhc_core.mlx import (
    GatedConnection,
    GatedHead,
    HyperConnectedBlock,
    HyperConnectedStack,
    HyperConnection,
    HyperHead,
    load_hyper_connections,
)

ALL = read_subset(Path(__file__).parents[2] / "data" / "families")
CASES = {case.variant.removesuffix(".model"): case for case in ALL if ".model" in case.variant}
STACKS = {
    case.variant.removesuffix(".stack"): case for case in ALL if case.variant[-6:] == ".stack"
}
GATES = {
    "norm": "hc_norm.weight",
    "down": "input_mix_weight_down.weight",
    "up": "input_mix_weight_up.weight",
    "inject": "block_inject_weight.weight",
}


class Names(NamedTuple):
    """The names of one writer, a parameter in each, and the keys of its config."""

    attn: str
    ffn: str
    head: str | None
    config: Mapping[str, str]
    fixed: Mapping[str, Any]  # entries of the config


SINKHORN = {"norm_eps": "rms_norm_eps", "hc_eps": "hc_eps", "iters": "hc_sinkhorn_iters"}
HY = {"norm_eps": "rms_norm_eps", "hc_eps": "hc_eps", "magnitude": "hc_magnitude"}
WRITERS: dict[str, tuple[str, Names]] = {
    "glm, released": (
        "glm",
        Names(
            "layers.0.hc_attn_{}", "layers.0.hc_ffn_{}", None, SINKHORN, {"model_type": "glm5_next"}
        ),
    ),
    "glm, mlx-vlm": (
        "glm",
        Names(
            "language_model.model.layers.0.attn_hc.{}",
            "language_model.model.layers.0.ffn_hc.{}",
            None,
            SINKHORN,
            {"text_config": {"model_type": "glm5_next_text"}, "model_type": "glm5_next"},
        ),
    ),
    "hyv4, released and mlx-vlm": (
        "hyv4",
        Names(
            "model.layers.0.hc_attn_layer.hc_pre.hc_{}",
            "model.layers.0.hc_mlp_layer.hc_pre.hc_{}",
            "model.hc_head.hc_head_{}",
            HY,
            {"model_type": "hy_v4"},
        ),
    ),
    "hyv4, transformers' save_pretrained": (
        "hyv4",
        Names(
            "model.layers.0.hc_pre.hc_attn_layer.hc_{}",
            "model.layers.0.hc_pre.hc_mlp_layer.hc_{}",
            "model.hc_pre.hc_head.hc_head_{}",
            HY,
            {"model_type": "hy_v4"},
        ),
    ),
    "hyv4, transformers' modules": (
        "hyv4",
        Names(
            "model.layers.0.attn_hc.{}",
            "model.layers.0.ffn_hc.{}",
            "model.hc_head.hc_{}",
            HY,
            {"model_type": "hy_v4_vl", "text_config": {"model_type": "hy_v4_vl_text"}},
        ),
    ),
    "xing, released": (
        "xing",
        Names(
            "model.layers.0.attn_hc.hc_{}",
            "model.layers.0.ffn_hc.hc_{}",
            None,
            SINKHORN,
            {"model_type": "xing4_0"},
        ),
    ),
    "qwen4, released": (
        "qwen4",
        Names(
            "model.language_model.layers.0.attn_hyper_connection.{}",
            "model.language_model.layers.0.mlp_hyper_connection.{}",
            "model.language_model.hyper_connection_mixer.{}",
            {"norm_eps": "rms_norm_eps"},
            {"model_type": "qwen4_exp", "hc_lowrank": 5},
        ),
    ),
}
FAMILIES = {family: writer for writer, (family, _) in reversed(WRITERS.items())}


def checkpoint(writer: str, case: Any = None) -> Weights:
    """Return the weights of a golden model, or another case, under the names of a writer."""
    family, names = WRITERS[writer]
    case = case or CASES[family]
    found: Weights = {"model.embed_tokens.weight": mx.zeros((4, 8))}
    starts = {"p0.": names.attn, "p1.": names.ffn, "head.": names.head}
    for name, array in case.role("in").items():
        part = next((part for part in starts if name.startswith(part)), None)
        parameter = name.removeprefix(part or "")
        form = starts.get(part or "")
        if form and parameter not in ("W", "norm_weight"):
            given = array.astype(np.float32)
            found[form.format(GATES.get(parameter, parameter))] = mx.array(given)
    return found


def config(writer: str, **other: Any) -> dict[str, Any]:
    """Return the config of a golden model, with other constants if some are given."""
    family, names = WRITERS[writer]
    attrs: dict[str, Any] = {**CASES[family].attrs, **other}
    fields = {key: attrs[name] for name, key in names.config.items()}
    if family == "xing":
        ends = "mhc_h_res_clamp_min", "mhc_h_res_clamp_max"
        fields |= dict(zip(ends, attrs["clamp"], strict=True))
    fields["num_hidden_layers"] = 1
    fields["hc_count" if family == "qwen4" else "hc_mult"] = attrs["n"]
    if "text_config" in names.fixed:
        return {**names.fixed, "text_config": {**names.fixed["text_config"], **fields}}
    return {**names.fixed, **fields}


def layer_of(case: Any, k: int) -> Callable[[mx.array], mx.array]:
    """Return the layer of a golden case: its norm, if it has one, and its toy layer."""
    given = {name: mx.array(a.astype(np.float32)) for name, a in case.role("in").items()}

    def layer(h: mx.array) -> mx.array:
        if f"p{k}.norm_weight" in given:
            h = mx.fast.rms_norm(h, given[f"p{k}.norm_weight"], case.attrs["norm_eps"])
        return mx.tanh(h @ given[f"p{k}.W"])

    return layer


def model(case: Any, run: Callable[[mx.array], mx.array]) -> list[str]:
    """Return where the output of ``run`` and its gradient differ from a golden model's."""
    given = {name: mx.array(a.astype(np.float32)) for name, a in case.role("in").items()}

    def whole(h0: mx.array) -> list[mx.array]:
        h = run(h0)
        if "norm_weight" in given:
            h = mx.fast.rms_norm(h, given["norm_weight"], case.attrs["norm_eps"])
        return [h]

    cotangent = mx.array(case.role("ct")["h"].astype(np.float32))
    (h,), (gradient,) = mx.vjp(whole, [given["h0"]], [cotangent])
    found = {"out.h": np.array(h), "grad.h0": np.array(gradient)}
    return [line for line in problems(case, found, "f32") if "not computed" not in line]


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_loaded_computes_what_the_family_computes(writer: str, tmp_path: Path) -> None:
    case = CASES[WRITERS[writer][0]]
    loaded = load_hyper_connections(folder(tmp_path, checkpoint(writer), config(writer)))
    (layer,) = loaded.layers

    def run(h0: mx.array) -> mx.array:
        x = mhc.expand(h0, layer.attn.n)
        x = layer.attn(x, layer_of(case, 0))
        x = layer.ffn(x, layer_of(case, 1))
        return mhc.contract(x, "mean") if loaded.head is None else loaded.head(x)

    assert not model(case, run)
    assert (loaded.head is None) == (WRITERS[writer][1].head is None)


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_between_layers_are_those_of_the_family(family: str, tmp_path: Path) -> None:
    """Check what the mean of the streams does not show: which way H_res is stored."""
    case, writer = STACKS[family], FAMILIES[family]
    fields = config(writer, **case.attrs)
    source = folder(tmp_path, checkpoint(writer, case), fields)
    loaded = load_hyper_connections(source, allow_missing=True)  # the case has no head
    (layer,) = loaded.layers
    x = given = mx.array(case.role("in")["x"].astype(np.float32))
    if family == "qwen4":
        x = x.reshape(*x.shape[:-1], layer.attn.n, layer.attn.dims)
    x = layer.ffn(layer.attn(x, layer_of(case, 0)), layer_of(case, 1))
    found = {"out.x_out": np.array(x.reshape(given.shape))}
    wrong = [line for line in problems(case, found, "f32") if "not computed" not in line]
    assert not wrong


@pytest.mark.parametrize("writer", WRITERS)
def test_without_a_config_the_names_and_shapes_tell_the_family(writer: str) -> None:
    family = WRITERS[writer][0]
    loaded = load_hyper_connections(checkpoint(writer))
    if family == "qwen4":
        assert loaded.layers[0].attn.hc_norm.eps == 1e-6
        return
    defaults = {"glm": mhc.DEEPSEEK_V4, "hyv4": mhc.HY_V4, "xing": mhc.XING40}
    assert loaded.layers[0].ffn.variant == defaults[family]
    given = {"glm": mhc.GLM53_FLASH, "hyv4": mhc.HY_V4, "xing": mhc.XING40}[family]
    assert load_hyper_connections(checkpoint(writer), variant=given).layers[0].ffn.variant == given


@pytest.mark.parametrize("family", FAMILIES)
def test_every_constant_comes_from_the_config(family: str, tmp_path: Path) -> None:
    writer = FAMILIES[family]
    other = {"norm_eps": 1e-3, "hc_eps": 1e-2, "iters": 3, "magnitude": 1.5, "clamp": [-2, 0.5]}
    loaded = load_hyper_connections(folder(tmp_path, checkpoint(writer), config(writer, **other)))
    if family == "qwen4":
        assert {m.hc_norm.eps for m in (*loaded.layers[0], loaded.head)} == {1e-3}
        return
    sinkhorn: dict[str, Any] = {"norm_eps": 1e-3, "sinkhorn_eps": 1e-2, "sinkhorn_iterations": 3}
    want = {
        "glm": mhc.Variant(**sinkhorn, pre_eps=1e-2, res_transposed=True),
        "hyv4": mhc.Variant(
            norm_eps=1e-3, pre_eps=1e-2, post_eps=1e-2, post_scale=1.5, mixer="identity"
        ),
        "xing": mhc.Variant(
            **sinkhorn, sinkhorn_first="rows", sinkhorn_start="exp", sinkhorn_clamp=(-2, 0.5)
        ),
    }[family]
    parts = [*loaded.layers[0], *([] if loaded.head is None else [loaded.head])]
    assert [part.variant for part in parts] == [want] * len(parts)


class Layer(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            self[name] = make()


def ours(family: str) -> nn.Module:
    """Return a model of this library's modules for a family."""
    text = nn.Module()
    if family == "qwen4":
        names = "attn_hyper_connection", "mlp_hyper_connection"
        text.layers = [Layer(lambda: GatedConnection(8, 4, 5), names)]
        text.hyper_connection_mixer = GatedHead(8, 4, 5)
        return text
    variant = {"glm": mhc.GLM53_FLASH, "hyv4": mhc.HY_V4, "xing": mhc.XING40}[family]
    text.layers = [Layer(lambda: HyperConnection(8, 4, variant), ("attn_hc", "ffn_hc"))]
    if family == "hyv4":
        text.hc_head = HyperHead(8, 4, variant)
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_our_modules_are_filled(family: str) -> None:
    weights = checkpoint(FAMILIES[family])
    text = ours(family)
    loaded = load_hyper_connections(weights, text)
    layer = list(text.layers[0].values())
    ends = [value for name, value in text.items() if name != "layers"]
    assert len(ends) == (loaded.head is not None)
    for one, other in zip([*layer, *ends], [*loaded.layers[0], loaded.head], strict=False):
        for name, array in utils.tree_flatten(one.parameters()):
            assert array is dict(utils.tree_flatten(other.parameters()))[name]
    for name in [name for name in weights if "layers.0" in name][::3]:
        assert any(mx.array_equal(weights[name], a) for a in parameters(text).values()), name
    elsewhere = ours("xing" if family == "glm" else "glm")
    before = parameters(elsewhere)
    with pytest.raises(ValueError, match=r"the model has no parameter for|needs \(24, 32\)"):
        load_hyper_connections(weights, elsewhere)
    assert all(array is before[name] for name, array in parameters(elsewhere).items())


@pytest.mark.parametrize("family", ["glm", "hyv4", "xing"])
def test_a_stack_computes_what_the_family_computes(family: str, tmp_path: Path) -> None:
    case, writer = CASES[family], FAMILIES[family]
    source = folder(tmp_path, checkpoint(writer), config(writer))
    variant = load_hyper_connections(source).layers[0].attn.variant

    class Toy(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.k = k

        def __call__(self, h: mx.array) -> mx.array:
            return layer_of(case, self.k)(h)

    blocks = [HyperConnectedBlock(Toy(k), 8, 4, variant) for k in range(2)]
    head = HyperHead(8, 4, variant) if family == "hyv4" else None
    stack = HyperConnectedStack(blocks, head=head)
    load_hyper_connections(source, nn.Sequential(stack))
    assert not model(case, stack)


def test_gates_keep_their_dtype() -> None:
    weights = {name: a.astype(mx.bfloat16) for name, a in checkpoint(FAMILIES["qwen4"]).items()}
    text = ours("qwen4")
    loaded = load_hyper_connections(weights, text)
    assert {a.dtype for a in parameters(text).values()} == {mx.bfloat16}
    x = mx.ones((2, 4, 8), mx.bfloat16)
    assert loaded.layers[0].attn(x, mx.tanh).dtype == mx.bfloat16
    assert loaded.head(x).dtype == mx.bfloat16


# ---- what cannot be loaded -----------------------------------------------------------------------

HALF = {"glm": "ffn", "hyv4": "mlp", "xing": "ffn", "qwen4": "mlp"}
LAST = {"glm": "_scale", "hyv4": "hc_scale", "xing": "hc_scale", "qwen4": "inject_weight.weight"}


def named(family: str, start: str, end: str) -> str:
    return next(n for n in checkpoint(FAMILIES[family]) if start in n and n.endswith(end))


def spoilt(family: str) -> dict[str, tuple[Weights, str]]:
    """Return bad weights of a family, and what the error must say."""
    weights = checkpoint(FAMILIES[family])
    last = named(family, HALF[family], LAST[family])
    shown = {"glm": "hc_ffn_scale", "hyv4": "hc_ffn_scale", "xing": "hc_ffn_scale"}
    shown["qwen4"] = "mlp_hyper_connection.block_inject_weight.weight"
    second = {name.replace("layers.0.", "layers.2."): array for name, array in weights.items()}
    unused = {name for name in second if "layers.2." in name}
    return {
        "missing": (without(last)(weights), f"layers.0.{shown[family]} is missing"),
        "missing layer": (
            weights | {name: second[name] for name in unused},
            "layers.1.",
        ),
        "shape": (
            having(last, lambda a: mx.zeros((*a.shape[:-1], a.shape[-1] + 1)))(weights),
            f"{last} has shape",
        ),
        "unused": (
            weights | {f"{last}.more": mx.zeros((1,))},
            f"{last}.more in the mapping: named like hyper-connections",
        ),
        "NaN": (having(last, lambda a: a + mx.nan)(weights), f"{last} holds NaN"),
        "dtype": (having(last, lambda a: a.astype(mx.int32))(weights), f"{last} has dtype"),
        "twice": (weights | {f"module.{last}": weights[last]}, f"module.{last} duplicates {last}"),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_bad_weights_are_named_and_change_nothing(family: str) -> None:
    for fault, (weights, says) in spoilt(family).items():
        text = ours(family)
        before = parameters(text)
        with pytest.raises((TypeError, ValueError), match=re.escape(says)) as caught:
            load_hyper_connections(weights, text)
        assert fault != "missing layer" or " is missing" in str(caught.value)
        assert all(array is before[name] for name, array in parameters(text).items()), fault


@pytest.mark.parametrize("family", FAMILIES)
def test_incomplete_folders_are_refused(family: str, tmp_path: Path) -> None:
    writer = FAMILIES[family]
    wanted = {**config(writer)}
    fields = wanted.get("text_config", wanted)
    fields["num_hidden_layers"] = 2
    source = folder(tmp_path, checkpoint(writer), wanted)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ is missing.* num_hidden_layers=2"):
        load_hyper_connections(source)
    load_hyper_connections(source, allow_missing=True)
    fields["num_hidden_layers"] = 1
    start = {"hyv4": "hc_head", "qwen4": "hyper_connection_mixer"}.get(family)
    if start is None:  # and a head is not loaded where the family has none
        head = {f"hc_head_{n}": mx.zeros(s) for n, s in (("fn", (4, 32)), ("base", (4,)))}
        source = folder(tmp_path, checkpoint(writer) | head, wanted)
        with pytest.raises(ValueError, match=r"hc_head_base, hc_head_fn in .*allow_unused=True"):
            load_hyper_connections(source)
        assert load_hyper_connections(source, allow_unused=True).head is None
        return
    bare = {name: array for name, array in checkpoint(writer).items() if start not in name}
    with pytest.raises(ValueError, match=r"is missing.* has model_type \w+, which has a head"):
        load_hyper_connections(folder(tmp_path, bare, wanted))


def test_names_of_two_families_are_refused() -> None:
    glm, xing = checkpoint(FAMILIES["glm"]), checkpoint(FAMILIES["xing"])
    both = glm | {name.replace("layers.0", "layers.1"): array for name, array in xing.items()}
    with pytest.raises(ValueError, match=r"are names of different families of models"):
        load_hyper_connections(both)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_variant_of_another_layout_is_refused(family: str) -> None:
    wrong = mhc.XING40 if family == "glm" else mhc.DEEPSEEK_V4
    needs = {
        "glm": "need one with res_transposed=True and mixer='sinkhorn'",
        "hyv4": "need one with res_transposed=False and mixer='identity'",
        "xing": "need one with res_transposed=False and mixer='sinkhorn'",
        "qwen4": "Qwen4-Exp has gated residuals, without one",
    }[family]
    with pytest.raises(ValueError, match=needs):
        load_hyper_connections(checkpoint(FAMILIES[family]), variant=wrong)


def test_other_models_are_refused_by_their_type(tmp_path: Path) -> None:
    weights = checkpoint(FAMILIES["glm"])
    for fields, says in (
        ({"model_type": "kimi_k3"}, "attention residuals are not hyper-connections"),
        ({"model_type": "glm6", "hc_mult": 4}, r"glm6, whose hyper-connections are not known .*xi"),
        ({"model_type": "qwen4_exp"}, r"hc_attn_base, .*: named like hyper-connections"),
    ):
        source = folder(tmp_path, weights, fields)
        with pytest.raises(ValueError, match=says):
            load_hyper_connections(source)
    known = folder(tmp_path, weights, {"model_type": "glm6"})
    assert load_hyper_connections(known, variant=mhc.GLM53_FLASH).layers[0].attn.n == 4
    gates = folder(tmp_path, checkpoint(FAMILIES["qwen4"]), {"hc_count": 2})
    with pytest.raises(ValueError, match=r"has 4 streams; config\.json has 2"):
        load_hyper_connections(gates)


def test_wrong_bounds_of_a_clamp_are_named(tmp_path: Path) -> None:
    source = save(tmp_path / "model.safetensors", checkpoint(FAMILIES["xing"]))
    for low in (30.5, "-30", None, float("nan"), [1]):
        fields = {"model_type": "xing4_0", "mhc_h_res_clamp_min": low}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises((TypeError, ValueError), match=r"config\.json: mhc_h_res_clamp_min and"):
            load_hyper_connections(source)


def test_a_gated_head_alone_is_refused() -> None:
    weights = {n: a for n, a in checkpoint(FAMILIES["qwen4"]).items() if "layers" not in n}
    with pytest.raises(ValueError, match="needs a layer"):
        load_hyper_connections(weights)
