"""load_hyper_connections: mappings, files and folders; one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoint_files import (
    LAYERS,
    Text,
    Weights,
    check,
    prefixed,
    released,
    renamed,
    save,
    sharded,
    tensors,
)

from mhc_backends.mlx_nn.checkpoints import sources
from mhc_core.mlx import load_hyper_connections


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


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("as_path", [Path, str])
def test_a_folder_of_shards_opens_only_what_it_needs(
    index: bool, as_path: Callable[[Path], Any], tmp_path: Path
) -> None:
    weights = released()
    check(load_hyper_connections(as_path(sharded(tmp_path, weights, index))), weights)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("as_file", [True, False])
def test_half_precision_is_widened(dtype: mx.Dtype, as_file: bool, tmp_path: Path) -> None:
    weights = released(dtype=dtype)
    source: Any = save(tmp_path / "w.safetensors", weights) if as_file else weights
    model = Text()
    check(load_hyper_connections(source, model), weights)
    assert model.layers[0].attn_hc.fn.dtype == mx.float32


def test_numpy_arrays_are_accepted() -> None:
    weights = released()
    check(load_hyper_connections({name: np.array(w) for name, w in weights.items()}), weights)


def test_each_tensor_is_read_once_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = released()
    file = save(tmp_path / "w.safetensors", weights)
    read: list[str] = []
    opened = sources.open_safetensors

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

    monkeypatch.setattr(sources, "open_safetensors", Noting)
    check(load_hyper_connections(file), weights)
    assert sorted(read) == sorted(tensors(load_hyper_connections(weights)))


def test_layers_beyond_the_config_are_for_drafting(tmp_path: Path) -> None:
    weights = released()
    drafting = {name.replace("layers.1.", "layers.2."): array for name, array in weights.items()}
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    check(load_hyper_connections(save(tmp_path / "w.safetensors", weights | drafting)), weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_tensors_are_accepted(dtype: str) -> None:
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


@pytest.mark.parametrize("source", [None, 3, {1: mx.zeros((1,))}, "a\0b", "a" * 5000], ids=repr)
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match="load_hyper_connections"):
        load_hyper_connections(source)
