"""Small checkpoints under several names, and models to load them into, for these tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn, utils

import mhc_core as mhc
from mhc_core.mlx import (
    HyperConnectedBlock,
    HyperConnectedStack,
    HyperConnection,
    HyperConnections,
    HyperHead,
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


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: array for key, array in weights.items() if key != name}


def having(name: str, array: Callable[[Any], Any]) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: array(weights.get(name))}


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
