"""load_hyper_connections: every name, every source, one tensor at a time, all or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn, utils

import mhc_core as mhc
from mhc_backends.mlx_nn import checkpoints
from mhc_core.mlx import (
    HyperConnectedBlock,
    HyperConnectedStack,
    HyperConnection,
    HyperConnections,
    HyperHead,
    load_hyper_connections,
)

DIMS, LAYERS = 6, 2
Weights = dict[str, Any]


def released(n: int = 4, head: bool = True, dtype: mx.Dtype = mx.float32) -> Weights:
    """Return a checkpoint with DeepSeek's names, some of it not ours."""
    mx.random.seed(4)
    m = n * n + 2 * n
    shapes = {
        f"layers.{k}.hc_{part}_{name}": shape
        for k in range(LAYERS)
        for part in ("attn", "ffn")
        for name, shape in {"fn": (m, n * DIMS), "base": (m,), "scale": (3,)}.items()
    }
    if head:
        shapes |= {"hc_head_fn": (n, n * DIMS), "hc_head_base": (n,), "hc_head_scale": (1,)}
    others = {
        "embed.weight": (8, DIMS),
        "layers.0.attn.wkv.weight": (DIMS, DIMS),
        "layers.1.ffn.gate.bias": (3,),
        "mtp.0.hc_attn_fn": (2, 2),
        "mtp.0.hc_head_base": (1,),
    }
    return {
        name: mx.random.normal(shape).astype(dtype) for name, shape in (shapes | others).items()
    }


def renamed(weights: Weights) -> Weights:
    """Return a checkpoint under the names of mlx-lm and mlx-vlm."""
    for part in ("attn", "ffn"):
        weights = {name.replace(f".hc_{part}_", f".{part}_hc."): w for name, w in weights.items()}
    return {name.replace("hc_head_", "hc_head."): w for name, w in weights.items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {
        name if name.startswith("mtp.") else prefix + name: array for name, array in weights.items()
    }


def tensors(loaded: HyperConnections) -> Weights:
    """Return the loaded tensors under the released names."""
    parts = {
        f"layers.{k}.hc_{part}": getattr(layer, part)
        for k, layer in enumerate(loaded.layers)
        for part in ("attn", "ffn")
    }
    if loaded.head is not None:
        parts["hc_head"] = loaded.head
    return {
        f"{start}_{name}": array
        for start, module in parts.items()
        for name, array in module.parameters().items()
    }


def check(loaded: HyperConnections, weights: Weights) -> None:
    got = tensors(loaded)
    assert set(got) == {name for name in weights if "hc_" in name and not name.startswith("mtp")}
    for name, array in got.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, weights[name].astype(mx.float32)), name


def save(path: Path, weights: Weights) -> Path:
    mx.save_safetensors(str(path), weights)
    return path


# ---- names and sources --------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.", "language_model.model."])
@pytest.mark.parametrize("names", [dict, renamed], ids=["released", "renamed"])
@pytest.mark.parametrize("head", [True, False], ids=["V4", "V4.1"])
def test_every_form_of_the_names_is_known(
    prefix: str, names: Callable[[Weights], Weights], head: bool, tmp_path: Path
) -> None:
    weights = released(head=head)
    named = prefixed(names(weights), prefix)
    check(load_hyper_connections(named), weights)
    check(load_hyper_connections(save(tmp_path / "w.safetensors", named)), weights)


def sharded(folder: Path, weights: Weights, index: bool = True) -> Path:
    """Return a folder with our tensors in two shards, and a third shard that nobody can read."""
    ours = [name for name in weights if "hc_" in name]
    shards = {"a.safetensors": ours[::2], "b.safetensors": ours[1::2]}
    for file, names in shards.items():
        save(folder / file, {name: weights[name] for name in names})
    if index:
        others = [name for name in weights if "hc_" not in name]
        (folder / "c.safetensors").write_bytes(b"not to be opened")
        located = {name: file for file, names in shards.items() for name in names}
        located |= dict.fromkeys(others, "c.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": located}))
    return folder


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("kind", [Path, str])
def test_a_folder_of_shards_opens_only_what_it_needs(
    index: bool, kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    weights = released()
    check(load_hyper_connections(kind(sharded(tmp_path, weights, index))), weights)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("as_file", [True, False])
def test_half_precision_is_widened(dtype: mx.Dtype, as_file: bool, tmp_path: Path) -> None:
    weights = released(dtype=dtype)
    source: Any = save(tmp_path / "w.safetensors", weights) if as_file else weights
    model = Text()
    check(load_hyper_connections(source, model), weights)
    assert model.layers[0].attn_hc.fn.dtype == mx.float32


def test_numpy_arrays_are_taken_in() -> None:
    weights = released()
    check(load_hyper_connections({name: np.array(w) for name, w in weights.items()}), weights)


def test_each_tensor_is_read_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = released()
    file = save(tmp_path / "w.safetensors", weights)
    read: list[str] = []
    opened = checkpoints._opened

    class Noting:
        def __init__(self, path: Path) -> None:
            self.inner = opened(path)

        def __enter__(self) -> Any:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> Any:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(checkpoints, "_opened", Noting)
    check(load_hyper_connections(file), weights)
    assert sorted(read) == sorted(tensors(load_hyper_connections(weights)))


# ---- the modules --------------------------------------------------------------------------------


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


def test_layers_beyond_the_config_are_for_drafting(tmp_path: Path) -> None:
    weights = released()
    drafting = {name.replace("layers.1.", "layers.2."): array for name, array in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    check(load_hyper_connections(save(tmp_path / "w.safetensors", weights | drafting)), weights)


def test_without_a_config_they_are_those_of_v4() -> None:
    assert load_hyper_connections(released()).layers[0].attn.variant == mhc.DEEPSEEK_V4


# ---- into a model -------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A connection of another library, with parameters of the released shapes."""

    def __init__(self, rows: int = 24, scales: int = 3) -> None:
        super().__init__()
        self.fn = mx.zeros((rows, 4 * DIMS))
        self.base = mx.zeros((rows,))
        self.scale = mx.ones((scales,))


class Decoder(nn.Module):
    """A decoder as in mlx-lm and mlx-vlm."""

    def __init__(self, connection: Callable[[], nn.Module] = Foreign) -> None:
        super().__init__()
        self.self_attn = nn.Linear(DIMS, DIMS)
        self.attn_hc = connection()
        self.ffn_hc = connection()


class Flat(nn.Module):
    """A decoder as in mlx-vlm's DeepSeek-V4.1: the parameters are in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        for part in ("attn", "ffn"):
            for name, value in Foreign().parameters().items():
                setattr(self, f"hc_{part}_{name}", value)


class Text(nn.Module):
    """Layers and a head, under any name."""

    def __init__(self, layer: Callable[[], nn.Module] = Decoder, head: Any = None) -> None:
        super().__init__()
        self.layers = [layer() for _ in range(LAYERS)]
        self.hc_head = Foreign(4, 1) if head is None else head


class Model(nn.Module):
    """A model around a text model."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.decoder = text
        self.lm_head = nn.Linear(DIMS, 8)


def stack(head: bool = True) -> HyperConnectedStack:
    blocks = [
        HyperConnectedBlock(nn.Identity(), DIMS, 4, mhc.DEEPSEEK_V4) for _ in range(2 * LAYERS)
    ]
    last = HyperHead(DIMS, 4, mhc.DEEPSEEK_V4) if head else None
    return HyperConnectedStack(blocks, 4, single_pass=not head, head=last)


def ours() -> HyperConnection:
    return HyperConnection(DIMS, 4, mhc.DEEPSEEK_V4)


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(utils.tree_flatten(model.parameters()))


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


# ---- what is wrong is named, and the model is left alone ----------------------------------------


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: array for key, array in weights.items() if key != name}


def having(name: str, array: Callable[[Any], Any]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: array(weights.get(name))}


def holding(value: float) -> Callable[[mx.array], mx.array]:
    return lambda array: mx.where(mx.arange(array.size).reshape(array.shape) == 5, value, array)


FAULTS: dict[str, tuple[Callable[[Weights], Weights], type[Exception], str]] = {
    "missing": (without("layers.1.hc_ffn_base"), ValueError, "layers.1.hc_ffn_base is missing"),
    "missing head": (without("hc_head_scale"), ValueError, "hc_head_scale is missing"),
    "missing layer": (
        lambda w: {k: a for k, a in w.items() if not k.startswith("layers.0.hc_")},
        ValueError,
        "layers.0.hc_attn_fn is missing",
    ),
    "nothing": (
        lambda w: {"embed.weight": w["embed.weight"]},
        ValueError,
        "layers.0.hc_attn_fn or ali",
    ),
    "shape": (
        having("layers.1.hc_attn_fn", lambda a: a[:, 1:]),
        ValueError,
        "layers.1.hc_attn_fn has shape (24, 23); needs (24, 24)",
    ),
    "shape of the first": (
        having("layers.0.hc_attn_fn", lambda a: a[1:]),
        ValueError,
        "layers.0.hc_attn_fn has shape (23, 24); needs (n * n + 2 n, n * dims)",
    ),
    "flat": (
        having("layers.0.hc_attn_fn", lambda a: a.reshape(-1)),
        ValueError,
        "layers.0.hc_attn_fn has shape (576,)",
    ),
    "another n": (
        having("layers.1.hc_ffn_fn", lambda _: mx.zeros((8, 2 * DIMS))),
        ValueError,
        "layers.1.hc_ffn_fn has shape (8, 12); needs (24, 24), as layers.0.hc_attn_fn has n=4",
    ),
    "n of the head": (
        having("hc_head_fn", lambda _: mx.zeros((2, 24))),
        ValueError,
        "hc_head_fn has shape (2, 24); needs (4, 24)",
    ),
    "NaN": (
        having("layers.1.hc_ffn_fn", holding(float("nan"))),
        ValueError,
        "layers.1.hc_ffn_fn holds NaN or infinity",
    ),
    "infinity": (
        having("layers.0.hc_ffn_base", holding(float("inf"))),
        ValueError,
        "layers.0.hc_ffn_base holds NaN or infinity",
    ),
    "dtype": (
        having("layers.0.hc_ffn_fn", lambda a: a.astype(mx.int32)),
        TypeError,
        "layers.0.hc_ffn_fn has dtype",
    ),
    "twice": (
        having("model.layers.0.attn_hc.fn", lambda _: mx.zeros((24, 24))),
        ValueError,
        "model.layers.0.attn_hc.fn is there twice, as layers.0.hc_attn_fn too",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "says"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "mapping"])
def test_bad_weights_are_named_and_change_nothing(
    spoil: Callable[[Weights], Weights],
    error: type[Exception],
    says: str,
    as_file: bool,
    tmp_path: Path,
) -> None:
    weights: Mapping[str, Any] = spoil(released())
    source: Any = save(tmp_path / "w.safetensors", dict(weights)) if as_file else weights
    model = Text()
    before = parameters(model)
    with pytest.raises(error, match=re.escape(says)):
        load_hyper_connections(source, model)
    after = parameters(model)
    assert all(after[name] is before[name] for name in before)


UNFIT: dict[str, tuple[Callable[[], nn.Module], Callable[[Weights], Weights], str]] = {
    "more layers than the model": (
        Text,
        lambda w: w | {k.replace("layers.1.", "layers.2."): a for k, a in w.items()},
        "layers.2.hc_attn_fn has no place in the model",
    ),
    "fewer": (
        Text,
        lambda w: {k: a for k, a in w.items() if "layers.1.hc_" not in k},
        "layers.1.hc_attn_fn is missing, which the model needs as layers.1.attn_hc.fn",
    ),
    "a head too many": (
        lambda: stack(head=False),
        dict,
        "hc_head_fn has no place in the model",
    ),
    "a model of other sizes": (
        lambda: Text(lambda: Decoder(lambda: Foreign(rows=8))),
        dict,
        "layers.0.hc_attn_fn has shape (24, 24); layers.0.attn_hc.fn needs (8, 24)",
    ),
    "a model with the paper's layout": (
        lambda: HyperConnectedStack([HyperConnectedBlock(nn.Identity(), DIMS)] * 4),
        dict,
        "layers.0.hc_attn_fn has no place in the model",
    ),
    "two stacks": (
        lambda: nn.Sequential(stack(), stack()),
        dict,
        "the model has layers.0.blocks.0.connection.fn and layers.1.blocks.0.connection.fn for one",
    ),
}


@pytest.mark.parametrize(("make", "spoil", "says"), UNFIT.values(), ids=UNFIT)
def test_a_model_that_does_not_fit_is_left_alone(
    make: Callable[[], nn.Module], spoil: Callable[[Weights], Weights], says: str
) -> None:
    model = make()
    before = parameters(model)
    with pytest.raises(ValueError, match=re.escape(says)):
        load_hyper_connections(spoil(released()), model)
    after = parameters(model)
    assert all(after[name] is before[name] for name in before)


def test_float64_is_not_narrowed() -> None:
    weights: Weights = {name: np.array(w) for name, w in released().items()}
    weights["hc_head_fn"] = weights["hc_head_fn"].astype(np.float64)
    with pytest.raises(TypeError, match="hc_head_fn has dtype float64; needs float32, bfloat16"):
        load_hyper_connections(weights)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(TypeError, match="hc_head_base is a list; needs"):
        load_hyper_connections(released() | {"hc_head_base": [0.0] * 4})


def test_a_config_of_other_streams_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hc_mult": 2}))
    save(tmp_path / "model.safetensors", released())
    with pytest.raises(ValueError, match=r"hc_attn_fn has 4 streams; config\.json has 2"):
        load_hyper_connections(tmp_path)


def test_a_variant_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="needs one with res_transposed"):
        load_hyper_connections(released(), variant=mhc.PAPER)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is not there"):
        load_hyper_connections(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        load_hyper_connections(tmp_path)
    sharded(tmp_path, released())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is not there"):
        load_hyper_connections(tmp_path)


# ---- names that others write -------------------------------------------------------------------

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
    with pytest.raises(ValueError, match="no tensor in the mapping is named as"):
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
    pytest.importorskip("torch")
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_tensors_are_taken_in(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    weights = released()
    theirs = {
        name: torch.nn.Parameter(torch.tensor(np.array(w)).to(getattr(torch, dtype)))
        for name, w in weights.items()
    }
    theirs["layers.0.hc_attn_fn"] = theirs["layers.0.hc_attn_fn"].t().contiguous().t()
    rounded = {n: w.astype(getattr(mx, dtype)) for n, w in weights.items()}
    check(load_hyper_connections(theirs), rounded)
    with pytest.raises(TypeError, match="hc_head_fn has dtype float64"):
        load_hyper_connections(theirs | {"hc_head_fn": theirs["hc_head_fn"].double()})
    with pytest.raises(ValueError, match="hc_head_fn cannot be read"):
        load_hyper_connections(theirs | {"hc_head_fn": theirs["hc_head_fn"].to("meta")})


# ---- what is promised and did not come -----------------------------------------------------------


def layers(*which: int, head: bool = False) -> Weights:
    one = {n.removeprefix("layers.0."): a for n, a in released().items() if ".0.hc_" in n}
    found = {f"layers.{k}.{n}": a for k in which for n, a in one.items() if n.startswith("hc_")}
    return found | (
        {n: a for n, a in released().items() if n.startswith("hc_head")} if head else {}
    )


def folder(
    at: Path, stored: Weights, config: Any = None, index: Weights | dict[str, str] | None = None
) -> Path:
    save(at / "model.safetensors", stored)
    if config is not None:
        (at / "config.json").write_text(json.dumps(config))
    if index is not None:
        named = {
            name: f if isinstance(f, str) else "model.safetensors" for name, f in index.items()
        }
        (at / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return at


FOUR: dict[str, Any] = {"hc_mult": 4, "num_hidden_layers": 4}
INCOMPLETE: dict[str, tuple[Weights, Any, Any, str]] = {
    "config": (
        layers(0, 1),
        FOUR,
        None,
        r"layers\.2\.hc_attn_fn is .*config\.json counts 4 layers",
    ),
    "index": (layers(0, 1), None, layers(0, 1, 2), r"layers\.2\.hc_attn_fn is .*index.* names it"),
    "head by index": (
        layers(0, 1),
        None,
        layers(0, 1, head=True),
        r"hc_head_fn is missing.*index.* names it",
    ),
    "head by config": (
        layers(0, 1),
        {"model_type": "deepseek_v4"},
        None,
        r"hc_head_fn is missing.*is of deepseek_v4",
    ),
    "a shard": (
        layers(0, 1),
        FOUR,
        layers(0, 1) | dict.fromkeys(layers(2, 3), "model-2.safetensors"),
        r"model-2\.safetensors is not there",
    ),
}


@pytest.mark.parametrize(("stored", "config", "index", "says"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_what_a_folder_promises_must_be_there(
    stored: Weights, config: Any, index: Any, says: str, tmp_path: Path
) -> None:
    at = folder(tmp_path, stored, config, index)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        load_hyper_connections(at)
    for source in (at / "model.safetensors", at):
        loaded = load_hyper_connections(source, allow_missing=source == at)
        assert (len(loaded.layers), loaded.head) == (2, None)


COMPLETE: dict[str, tuple[Weights, Any, Any, int]] = {
    "a stale index": (layers(0, 1, 2, 3), None, layers(0, 1), 4),
    "a stale index beside a config": (layers(0, 1, 2, 3), FOUR, layers(0, 1), 4),
    "drafting layers in the index": (layers(0, 1, 2, 3), FOUR, layers(*range(6)), 4),
    "other names in the index": (layers(0, 1), None, renamed(layers(0, 1)), 2),
    "V4.1 has no head": (layers(0, 1), {"model_type": "deepseek_v41"}, None, 2),
}


@pytest.mark.parametrize(("stored", "config", "index", "count"), COMPLETE.values(), ids=COMPLETE)
def test_what_is_whole_is_taken(
    stored: Weights, config: Any, index: Any, count: int, tmp_path: Path
) -> None:
    assert len(load_hyper_connections(folder(tmp_path, stored, config, index)).layers) == count


@pytest.mark.parametrize("missing", ["layers.1.hc_ffn_fn", "layers.0.hc_attn_base", "hc_head_fn"])
def test_parts_are_never_taken_for_whole(missing: str, tmp_path: Path) -> None:
    stored = without(missing)(layers(0, 1, 2, head=True))
    at = folder(tmp_path, stored)
    for source in (at, at / "model.safetensors", stored):
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            load_hyper_connections(source, allow_missing=True)


def test_a_model_keeps_what_has_no_tensor_if_that_is_allowed() -> None:
    model = Text()
    before = parameters(model)
    load_hyper_connections(layers(0), model, allow_missing=True)
    after = parameters(model)
    changed = {name for name in before if after[name] is not before[name]}
    assert changed == {f"layers.0.{p}_hc.{n}" for p in ("attn", "ffn") for n in Foreign()}


# ---- hostile and damaged files -------------------------------------------------------------------

OUTSIDE = ("../s.safetensors", "/etc/passwd", "a/../../s", "..\\s", "C:s", "\\s", "", ".", "a/..")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_nowhere_outside_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(tmp_path / "s.safetensors", layers(0))
    for index in (dict.fromkeys(layers(0), name), layers(0) | {"embed.weight": name}):
        at = folder(tmp_path / "model", layers(0), None, index)
        with pytest.raises(ValueError, match=r"index\.json names the file .*inside its folder"):
            load_hyper_connections(at)


def test_links_are_followed_as_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "one").mkdir(parents=True)
    at = folder(tmp_path / "blobs", layers(0), {"num_hidden_layers": 1}, layers(0))
    for file in at.iterdir():
        (tmp_path / "snapshots" / "one" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(load_hyper_connections(tmp_path / "snapshots" / "one").layers) == 1


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "half": (lambda data: data[: len(data) // 2], "cannot be read as safetensors"),
    "empty": (lambda data: b"", "cannot be read as safetensors"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "page": (lambda data: b"<!DOCTYPE html><html>" * 9, "is a web page"),
    "dtype": (lambda data: data.replace(b"F32", b"F99"), "cannot be read as safetensors"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named(
    damage: Callable[[bytes], bytes], says: str, tmp_path: Path
) -> None:
    sharded(tmp_path, released())
    file = tmp_path / "b.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"b\.safetensors .*{says}"):
        load_hyper_connections(tmp_path)


CONFIGS: dict[str, str] = {
    "truncated": '{"hc_mult": 4,',
    "BOM": '\ufeff{"hc_mult": 4}',
    "deep": "[" * 100_000,
    "long number": '{"hc_mult": ' + "1" * 5000 + "}",
    "list": "[]",
    "null": '{"num_hidden_layers": null}',
    "null text": '{"text_config": null}',
    "null eps": '{"hc_eps": null}',
    "word": '{"rms_norm_eps": "1e-6"}',
    "beyond float": '{"rms_norm_eps": 1' + "0" * 400 + "}",
    "NaN": '{"hc_eps": NaN}',
    "boolean": '{"hc_mult": true}',
    "iterations": '{"hc_sinkhorn_iters": 1000000000}',
    "layers": '{"num_hidden_layers": 1000000000}',
    "no layers": '{"num_hidden_layers": 0}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_wrong_config_is_named(text: str, tmp_path: Path) -> None:
    folder(tmp_path, released())
    (tmp_path / "config.json").write_text(text)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises((TypeError, ValueError), match=rf"^{OWNER}: \S*config\.json"):
            load_hyper_connections(source)


OWNER = "load_hyper_connections"
INDEXES = ('{"metadata": {}}', "[]", '{"weight_map": []}', '{"weight_map": {"hc_head_fn": 3}}', "{")


@pytest.mark.parametrize("text", INDEXES)
def test_a_wrong_index_is_named(text: str, tmp_path: Path) -> None:
    folder(tmp_path, released())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises((TypeError, ValueError), match=rf"^{OWNER}: \S*index\.json"):
        load_hyper_connections(tmp_path)


@pytest.mark.parametrize("source", [None, 3, {1: mx.zeros((1,))}, "a\0b", "a" * 5000], ids=repr)
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=OWNER):
        load_hyper_connections(source)
