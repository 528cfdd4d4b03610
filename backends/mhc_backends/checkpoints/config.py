"""The entries of ``config.json`` that concern the hyper-connections of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from mhc_backends.checkpoints.families import BY_TYPE, OTHERS, Family
from mhc_backends.checkpoints.names import MOST_LAYERS, OWNER, printable
from mhc_core import checks
from mhc_core.variants import Variant

__all__ = ["Config", "config_in", "eps_of", "is_file", "read_config", "read_json", "variant_of"]

_NORM_EPS = 1e-6  # of Qwen4-Exp, as its config has it by default

_CHECKS: Mapping[str, checks.Check] = {"hc_sinkhorn_iters": checks.iterations}


class Config(NamedTuple):
    """A ``config.json``; without a file, every field is empty.

    ``family`` is that of ``model_type``, which may be missing or unknown.
    """

    file: Path | None
    fields: Mapping[str, Any]
    layers: int | None
    n: int | None
    model_type: str | None
    family: Family | None


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
        return Config(None, {}, None, None, None, None)
    return config_in(file)


def config_in(file: Path) -> Config:
    """Read a file with the content of a ``config.json``."""
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
    n = next((count(name) for name in ("hc_mult", "hc_count") if name in fields), None)
    types = [fields.get("model_type"), whole.get("model_type")]
    names = [name for name in types if isinstance(name, str)]
    for name in names:
        if name in OTHERS:
            raise ValueError(f"{OWNER}: {file} has model_type {name}, whose {OTHERS[name]}")
    model_type = next((name for name in names if name in BY_TYPE), names[0] if names else None)
    return Config(file, fields, layers, n, model_type, BY_TYPE.get(model_type or ""))


def variant_of(config: Config, family: Family) -> Variant:
    """Return the variant of a family with the constants of a config."""
    default = cast("Variant", family.variant)
    given = {
        field: _number(config, key)
        for field, key in family.constants.items()
        if key in config.fields
    }
    if family.clamp and default.sinkhorn_clamp:
        given["sinkhorn_clamp"] = checks.bounds(
            f"{OWNER}: {config.file}",
            " and ".join(family.clamp),
            [
                config.fields.get(key, bound)
                for key, bound in zip(family.clamp, default.sinkhorn_clamp, strict=True)
            ],
        )
    return replace(default, **given)


def eps_of(config: Config) -> float:
    """Return the norm_eps of a gated residual."""
    return _number(config, "rms_norm_eps") if "rms_norm_eps" in config.fields else _NORM_EPS


def _number(config: Config, key: str) -> Any:
    return _field(config.file, config.fields, key, _CHECKS.get(key, checks.non_negative))


def _field(file: Path | None, fields: Mapping[str, Any], name: str, check: checks.Check) -> Any:
    return check(f"{OWNER}: {file}", name, fields[name])
