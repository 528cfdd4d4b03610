"""The entries of ``config.json`` that concern the hyper-connections of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from mhc_backends.checkpoints.names import MOST_LAYERS, OWNER, printable
from mhc_core import checks
from mhc_core.variants import DEEPSEEK_V4, Variant

__all__ = ["WITH_HEAD", "Config", "is_file", "read_config", "read_json", "variant_of"]

WITH_HEAD = "deepseek_v4"  # the model_type whose streams end in a head; V4.1 has none


class Config(NamedTuple):
    """A ``config.json``; without a file, every field is empty."""

    file: Path | None
    fields: Mapping[str, Any]
    layers: int | None
    n: int | None
    has_head: bool


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content: Any = json.loads(file.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        problem = printable(str(error))
        raise ValueError(f"{OWNER}: {file} cannot be read as JSON: {problem}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{OWNER}: {file} has a {type(content).__name__}; needs a JSON object")
    return cast("dict[str, Any]", content)


def is_file(path: Path) -> bool:
    """Return whether a path is a file, also for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_config(weights: Path | None) -> Config:
    """Read the ``config.json`` beside the weights, if there is one."""
    folder = weights if weights is None or weights.is_dir() else weights.parent
    file = None if folder is None else folder / "config.json"
    if file is None or not is_file(file):
        return Config(None, {}, None, None, has_head=False)
    whole = read_json(file)
    fields: Any = whole.get("text_config", whole)
    if not isinstance(fields, dict):
        raise ValueError(
            f"{OWNER}: {file}: text_config is a {type(fields).__name__}; needs an object"
        )
    fields = cast("dict[str, Any]", fields)

    def count(name: str) -> int | None:
        return _field(file, fields, name, checks.positive_int) if name in fields else None

    layers = count("num_hidden_layers")
    if layers is not None and layers > MOST_LAYERS:
        raise ValueError(f"{OWNER}: {file}: num_hidden_layers needs at most {MOST_LAYERS}")
    has_head = WITH_HEAD in (whole.get("model_type"), fields.get("model_type"))
    return Config(file, fields, layers, count("hc_mult"), has_head)


def variant_of(config: Config) -> Variant:
    """Return DeepSeek-V4's variant with the constants of a config."""

    def field(name: str, check: checks.Check, default: Any) -> Any:
        present = name in config.fields
        return _field(config.file, config.fields, name, check) if present else default

    eps = field("hc_eps", checks.non_negative, DEEPSEEK_V4.pre_eps)
    return replace(
        DEEPSEEK_V4,
        norm_eps=field("rms_norm_eps", checks.non_negative, DEEPSEEK_V4.norm_eps),
        pre_eps=eps,
        sinkhorn_eps=eps,
        sinkhorn_iterations=field(
            "hc_sinkhorn_iters", checks.iterations, DEEPSEEK_V4.sinkhorn_iterations
        ),
    )


def _field(file: Path | None, fields: Mapping[str, Any], name: str, check: checks.Check) -> Any:
    return check(f"{OWNER}: {file}", name, fields[name])
