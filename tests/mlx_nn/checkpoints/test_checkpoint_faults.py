"""load_hyper_connections: an error names the wrong tensor, and the model does not change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import (
    DIMS,
    Decoder,
    Foreign,
    Text,
    Weights,
    having,
    parameters,
    released,
    save,
    sharded,
    stack,
    without,
)
from mlx import nn

import mhc_core as mhc
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, load_hyper_connections


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
        "has a name such as layers.0.hc_attn_fn",
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
        "model.layers.0.attn_hc.fn duplicates layers.0.hc_attn_fn",
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
        "the model has no parameter for layers.2.hc_attn_fn",
    ),
    "fewer": (
        Text,
        lambda w: {k: a for k, a in w.items() if "layers.1.hc_" not in k},
        "layers.1.hc_attn_fn is missing; the model needs it for layers.1.attn_hc.fn",
    ),
    "a head too many": (
        lambda: stack(head=False),
        dict,
        "the model has no parameter for hc_head_fn",
    ),
    "a model of other sizes": (
        lambda: Text(lambda: Decoder(lambda: Foreign(rows=8))),
        dict,
        "layers.0.hc_attn_fn has shape (24, 24); layers.0.attn_hc.fn needs (8, 24)",
    ),
    "a model with the paper's layout": (
        lambda: HyperConnectedStack([HyperConnectedBlock(nn.Identity(), DIMS)] * 4),
        dict,
        "the model has no parameter for layers.0.hc_attn_fn",
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
    with pytest.raises(ValueError, match="need one with res_transposed"):
        load_hyper_connections(released(), variant=mhc.PAPER)


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        load_hyper_connections(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="has no safetensors file"):
        load_hyper_connections(tmp_path)
    sharded(tmp_path, released())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors does not exist"):
        load_hyper_connections(tmp_path)
