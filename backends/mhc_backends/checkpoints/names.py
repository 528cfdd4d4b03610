"""The names of hyper-connections in checkpoints and in models.

A layer's parameter is named ``layers.N.`` and then, depending on who wrote it,

- ``hc_attn_fn`` in DeepSeek's own releases, and by default from ``save_pretrained`` of
  transformers;
- ``attn_hc.fn`` in transformers 5.24 (``models/deepseek_v4/modeling_deepseek_v4.py``), which
  ``save_original_format=False`` stores, and in mlx-lm and mlx-vlm;
- ``hc_attn.fn``, or ``hc_attn_pre.hc_fn``, in torchtitan (``models/deepseek_v4``).

The head is ``hc_head_fn``, ``hc_head.fn`` or ``hc_head.hc_fn``. transformers renames it back only
where the name has no prefix (``^hc_head_fn`` in its ``conversion_mapping.py``), so only for
``DeepseekV4Model``: ``DeepseekV4ForCausalLM`` stores ``model.hc_head.hc_fn`` beside
``model.layers.N.hc_attn_fn``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "HEAD",
    "MOST_LAYERS",
    "OWNER",
    "PARAMETERS",
    "SUBLAYERS",
    "Key",
    "by_key",
    "is_drafting",
    "layer_keys",
    "model_key",
    "printable",
    "unwrapped",
]

OWNER = "load_hyper_connections"  # errors begin with it
SUBLAYERS = ("attn", "ffn")
PARAMETERS = ("fn", "base", "scale")
MOST_LAYERS = 10_000  # far above any model; a name alone must not make millions of modules

_LONGEST = 200  # characters of a name in an error

_AFTER_PREFIX = r"""
    (?: layers\.(?P<layer>0|[1-9][0-9]*)\.
        (?: hc_(?P<own>attn|ffn)(?:_pre)? | (?P<other>attn|ffn)_hc )
      | hc_head )
    [._](?:hc_)?(?P<parameter>fn|base|scale)(?:\.weight)?
"""
_PREFIX = r"(?:(?:model|language_model|transformer|base_model|module)\.)*"
_STORED = re.compile(_PREFIX + _AFTER_PREFIX, re.VERBOSE)
_IN_MODEL = re.compile(r"(?:^|\.)" + _AFTER_PREFIX + r"\Z", re.VERBOSE)

# PyTorch's wrappers insert these anywhere in a name: torch.compile, FSDP and checkpoint_wrapper.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LIKE = re.compile(r"(?:^|[._])(?:m?hc|hyper_?connections?)(?=[._]|\Z)", re.IGNORECASE)
_DRAFTING = re.compile(r"(?:^|\.)(?:mtp|nextn|draft)(?:_\w+)?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")


class Key(NamedTuple):
    """A tensor whatever its name: the layer (-1 for the head), the sublayer and the parameter."""

    layer: int
    sublayer: str
    parameter: str

    def __str__(self) -> str:
        layer = "" if self.layer < 0 else f"layers.{self.layer}."
        return f"{layer}hc_{self.sublayer}_{self.parameter}"


HEAD = [Key(-1, "head", name) for name in PARAMETERS]


def layer_keys(layers: int) -> list[Key]:
    """Return the keys of the first ``layers`` layers."""
    return [Key(k, one, name) for k in range(layers) for one in SUBLAYERS for name in PARAMETERS]


def by_key(names: Iterable[str], layers: int | None) -> tuple[dict[Key, str], list[str]]:
    """Find the hyper-connections among a checkpoint's names; ``layers`` is None if unknown.

    Returns
    -------
    supported, unsupported
        The names in a supported form, and the other names that look like hyper-connections: those
        with a word ``hc``, ``mhc`` or ``hyper_connection`` between dots and underscores. Tensors
        for drafting are in neither: ``mtp``, ``nextn`` and ``draft``, and layers beyond the
        model's.
    """
    supported: dict[Key, str] = {}
    unsupported: list[str] = []
    for name in names:
        if not _LIKE.search(name) or is_drafting(name) or _is_beyond(name, layers):
            continue
        match = _STORED.fullmatch(unwrapped(name))
        if match is None:
            unsupported.append(name)
            continue
        key = _key(match)
        if key in supported:
            raise ValueError(f"{OWNER}: {printable(name)} duplicates {printable(supported[key])}")
        supported[key] = name
    return supported, unsupported


def model_key(name: str) -> Key | None:
    """Return the key of a model's parameter, with any prefix; None if it is not one of ours."""
    match = None if is_drafting(name) else _IN_MODEL.search(name)
    return None if match is None else _key(match)


def unwrapped(name: str) -> str:
    """Return a name without what PyTorch's wrappers insert in it."""
    return _WRAPPER.sub("", name)


def is_drafting(name: str) -> bool:
    """Return whether a tensor belongs to a module that only drafts tokens."""
    return _DRAFTING.search(name) is not None


def printable(name: str) -> str:
    """Return a name from a file for an error: without control characters, of limited length."""
    if len(name) > _LONGEST:
        name = f"{name[:_LONGEST]}..."
    return name if name.isprintable() else repr(name)


def _key(match: re.Match[str]) -> Key:
    layer, own, other, parameter = match.group("layer", "own", "other", "parameter")
    if layer is None:
        return Key(-1, "head", parameter)
    return Key(int(layer), own or other, parameter)


def _is_beyond(name: str, layers: int | None) -> bool:
    """Return whether a name's layer is beyond the model's; raise if no model has so many."""
    match = _LAYER.search(name)
    if match is None:
        return False
    digits = match.group(1).lstrip("0") or "0"
    if len(digits) > len(str(MOST_LAYERS)) or int(digits) >= MOST_LAYERS:
        raise ValueError(f"{OWNER}: {printable(name)} needs a layer below {MOST_LAYERS}")
    return layers is not None and int(digits) >= layers
