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
    """A checkpoint with DeepSeek's names, some of it not ours."""
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
    """The names of mlx-lm and mlx-vlm."""
    for part in ("attn", "ffn"):
        weights = {name.replace(f".hc_{part}_", f".{part}_hc."): w for name, w in weights.items()}
    return {name.replace("hc_head_", "hc_head."): w for name, w in weights.items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {
        name if name.startswith("mtp.") else prefix + name: array for name, array in weights.items()
    }


def tensors(loaded: HyperConnections) -> Weights:
    """What was loaded, under the released names."""
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
    """A folder with our tensors over two shards, and a third that nobody can read."""
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
    """As in mlx-lm and mlx-vlm."""

    def __init__(self, connection: Callable[[], nn.Module] = Foreign) -> None:
        super().__init__()
        self.self_attn = nn.Linear(DIMS, DIMS)
        self.attn_hc = connection()
        self.ffn_hc = connection()


class Flat(nn.Module):
    """As in mlx-vlm's DeepSeek-V4.1: the parameters stand in the block itself."""

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
    """A model around it."""

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
