"""mhc_torch.load_hyper_connections: what it loads, and the same errors as the loader of MLX."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mhc_core as mhc
from mhc_torch import load_hyper_connections
from mhc_torch.nn import HyperConnectedBlock, HyperConnectedStack, HyperConnection, HyperHead

DIMS, LAYERS = 6, 2
Weights = dict[str, Any]


def released(head: bool = True, dtype: torch.dtype = torch.float32) -> Weights:
    """Return a checkpoint with DeepSeek's names, some of it not ours."""
    torch.manual_seed(4)
    sizes = {"fn": (24, 4 * DIMS), "base": (24,), "scale": (3,)}
    shapes = {
        f"layers.{k}.hc_{part}_{name}": shape
        for k in range(LAYERS)
        for part in ("attn", "ffn")
        for name, shape in sizes.items()
    }
    if head:
        shapes |= {"hc_head_fn": (4, 4 * DIMS), "hc_head_base": (4,), "hc_head_scale": (1,)}
    shapes |= {"embed.weight": (8, DIMS), "mtp.0.hc_attn_fn": (2, 2)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIMS, DIMS)
        self.attn_hc = HyperConnection(DIMS, 4, mhc.DEEPSEEK_V4)
        self.ffn_hc = HyperConnection(DIMS, 4, mhc.DEEPSEEK_V4)


def decoder() -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Decoder() for _ in range(LAYERS)])
    model.hc_head = HyperHead(DIMS, 4, mhc.DEEPSEEK_V4)
    return model


def stack() -> nn.Module:
    blocks = [
        HyperConnectedBlock(nn.Identity(), DIMS, 4, mhc.DEEPSEEK_V4) for _ in range(2 * LAYERS)
    ]
    return nn.Sequential(HyperConnectedStack(blocks, head=HyperHead(DIMS, 4, mhc.DEEPSEEK_V4)))


def check(loaded: Any, weights: Weights) -> None:
    for k, layer in enumerate(loaded.layers):
        for part in ("attn", "ffn"):
            for name, parameter in getattr(layer, part).named_parameters():
                want = weights[f"layers.{k}.hc_{part}_{name}"]
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, torch.as_tensor(want).float())
    assert len(loaded.layers) == LAYERS
    for name, parameter in loaded.head.named_parameters():
        assert torch.equal(parameter, torch.as_tensor(weights[f"hc_head_{name}"]).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_and_mappings(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = released(dtype=dtype)
    check(load_hyper_connections(weights), weights)
    save_file(weights, tmp_path / "model.safetensors")
    config = {"num_hidden_layers": LAYERS, "hc_mult": 4, "rms_norm_eps": 1e-3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_hyper_connections(tmp_path)
    check(loaded, weights)
    assert loaded.head.variant.norm_eps == 1e-3
    numpy = {name: w.float().numpy() for name, w in weights.items()}
    check(load_hyper_connections(numpy), numpy)
    mx = pytest.importorskip("mlx.core", reason="reads MLX's arrays")
    check(load_hyper_connections({name: mx.array(w) for name, w in numpy.items()}), numpy)


@pytest.mark.parametrize("make", [decoder, stack, lambda: torch.compile(stack())])
def test_models_are_filled_in_place(make: Callable[[], Any]) -> None:
    model, weights = make(), released()
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        parameter.data = parameter.data.bfloat16()  # as a careless cast would
        parameter.kept = name
    check(load_hyper_connections(weights, model), weights)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in own.items())
    filled = [p for name, p in after.items() if "hc" in name or "connection" in name]
    filled += [p for name, p in after.items() if ".head." in name]
    assert {p.dtype for p in filled} == {torch.float32}
    sums = sorted(float(p.detach().sum()) for p in filled)
    ours = [w for name, w in weights.items() if "hc_" in name and not name.startswith("mtp")]
    assert sums == pytest.approx(sorted(float(w.sum()) for w in ours))


def test_a_model_that_cannot_be_written_is_left_alone() -> None:
    with torch.device("meta"):
        model = decoder()
    with pytest.raises(ValueError, match=r"layers\.0\.attn_hc\.fn is on the device meta"):
        load_hyper_connections(released(), model)
    with pytest.raises(ValueError, match="hc_head_fn cannot be read"):
        load_hyper_connections(released() | {"hc_head_fn": torch.empty(4, 24, device="meta")})


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda w: {key: array for key, array in w.items() if key != name}


def having(name: str, array: Any) -> Callable[[Weights], Weights]:
    return lambda w: w | {name: array}


FAULTS: dict[str, Callable[[Weights], Any]] = {
    "missing": without("layers.1.hc_ffn_base"),
    "nothing": lambda w: {"embed.weight": w["embed.weight"]},
    "shape": having("layers.1.hc_attn_fn", np.zeros((24, 23), np.float32)),
    "first shape": having("layers.0.hc_attn_fn", np.zeros((23, 24), np.float32)),
    "infinity": having("layers.0.hc_ffn_base", np.full(24, np.inf, np.float32)),
    "dtype": having("layers.0.hc_ffn_base", np.zeros(24, np.int32)),
    "float64": having("layers.0.hc_ffn_base", np.zeros(24)),
    "no array": having("layers.0.hc_ffn_base", [0.0]),
    "twice": having("model.layers.0.attn_hc.fn", np.zeros((24, 24), np.float32)),
    "unknown": having("layers.0.hyper_connection.gate", np.zeros(3, np.float32)),
    "no path": lambda w: 3,
    "no file": lambda w: "none.safetensors",
    "no variant": lambda w: (w, {"variant": mhc.PAPER}),
    "no boolean": lambda w: (w, {"allow_unused": 1}),
}


def test_errors_are_those_of_mlx() -> None:
    pytest.importorskip("mlx.core", reason="compares with MLX")
    from mhc_core import mlx as theirs

    weights = {name: w.numpy() for name, w in released().items()}
    for name, spoil in FAULTS.items():
        source: Any = spoil(weights)
        source, options = source if isinstance(source, tuple) else (source, {})
        errors = []
        for load in (load_hyper_connections, theirs.load_hyper_connections):
            with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught:
                load(source, **options)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1], name
        assert errors[0][1].startswith("load_hyper_connections: "), name
