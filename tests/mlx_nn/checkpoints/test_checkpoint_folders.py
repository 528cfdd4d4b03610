"""load_hyper_connections: incomplete folders, and hostile or damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Weights, folder, layers, released, renamed, save, sharded, without

from mhc_core.mlx import load_hyper_connections

FOUR: dict[str, Any] = {"hc_mult": 4, "num_hidden_layers": 4}
INCOMPLETE: dict[str, tuple[Weights, Any, Any, str]] = {
    "config": (
        layers(0, 1),
        FOUR,
        None,
        r"layers\.2\.hc_attn_fn is .*config\.json has num_hidden_layers=4",
    ),
    "index": (layers(0, 1), None, layers(0, 1, 2), r"layers\.2\.hc_attn_fn is .*index.* lists it"),
    "head by index": (
        layers(0, 1),
        None,
        layers(0, 1, head=True),
        r"hc_head_fn is missing.*index.* lists it",
    ),
    "head by config": (
        layers(0, 1),
        {"model_type": "deepseek_v4"},
        None,
        r"hc_head_fn is missing.*has model_type deepseek_v4",
    ),
    "a shard": (
        layers(0, 1),
        FOUR,
        layers(0, 1) | dict.fromkeys(layers(2, 3), "model-2.safetensors"),
        r"model-2\.safetensors does not exist",
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


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", released())
    save(tmp_path / "b.safetensors", renamed(layers(0)))
    says = r"layers\.0\.(\w+)_hc\.(\w+) in \S*b\.safetensors duplicates layers\.0\.hc_\1_\2"
    with pytest.raises(ValueError, match=says):
        load_hyper_connections(tmp_path)
