"""The names that hyper-connections have in checkpoints, and in models.

A layer's parameter is ``layers.N.`` and then, whoever wrote it,

- ``hc_attn_fn`` in DeepSeek's own releases and what ``save_pretrained`` of transformers makes of
  its names by default;
- ``attn_hc.fn`` in transformers 5.24 (``models/deepseek_v4/modeling_deepseek_v4.py``), which
  ``save_original_format=False`` stores, and in mlx-lm and mlx-vlm;
- ``hc_attn.fn``, or ``hc_attn_pre.hc_fn``, in torchtitan (``models/deepseek_v4``).

The head is ``hc_head_fn``, ``hc_head.fn`` or ``hc_head.hc_fn``. transformers renames it back only
where nothing stands before it (``^hc_head_fn`` in its ``conversion_mapping.py``), which is so in
``DeepseekV4Model`` alone: ``DeepseekV4ForCausalLM`` stores ``model.hc_head.hc_fn`` beside
``model.layers.N.hc_attn_fn``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = [
    "MOST_LAYERS",
    "PARAMETERS",
    "PARTS",
    "Place",
    "by_place",
    "is_drafting",
    "layer_places",
    "place_in_model",
    "shown",
]

OWNER = "load_hyper_connections"
PARTS = ("attn", "ffn")
PARAMETERS = ("fn", "base", "scale")
MOST_LAYERS = 10_000  # far above any model; a name alone must not make millions of modules

_SHOWN = 200  # characters of a name from a file, in an error

_AFTER_PREFIX = r"""
    (?: layers\.(?P<layer>0|[1-9][0-9]*)\.
        (?: hc_(?P<own>attn|ffn)(?:_pre)? | (?P<other>attn|ffn)_hc )
      | hc_head )
    [._](?:hc_)?(?P<parameter>fn|base|scale)(?:\.weight)?
"""
_PREFIX = r"(?:(?:model|language_model|transformer|base_model|module)\.)*"
_STORED = re.compile(_PREFIX + _AFTER_PREFIX, re.VERBOSE)
_IN_MODEL = re.compile(r"(?:^|\.)" + _AFTER_PREFIX + r"\Z", re.VERBOSE)

# What PyTorch's wrappers put anywhere into a name: torch.compile, FSDP and checkpoint_wrapper.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LIKE = re.compile(r"(?:^|[._])(?:m?hc|hyper_?connections?)(?=[._]|\Z)", re.IGNORECASE)
_DRAFTING = re.compile(r"(?:^|\.)(?:mtp|nextn|draft)(?:_\w+)?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")


class Place(NamedTuple):
    """The position of a tensor: the layer, or -1 for the head, then part and parameter."""

    layer: int
    part: str
    parameter: str

    def __str__(self) -> str:
        layer = "" if self.layer < 0 else f"layers.{self.layer}."
        return f"{layer}hc_{self.part}_{self.parameter}"


def layer_places(layers: int) -> list[Place]:
    """Return the places of that many layers."""
    return [Place(k, part, name) for k in range(layers) for part in PARTS for name in PARAMETERS]


def by_place(names: Iterable[str], layers: int | None) -> tuple[dict[Place, str], list[str]]:
    """Sort the names of a checkpoint by place, given its number of layers if that is known.

    Returns
    -------
    placed, unused
        The names of our tensors, and the other names of hyper-connections: those with a word
        ``hc``, ``mhc`` or ``hyper_connection`` between dots and underscores. Tensors for drafting
        are in neither: ``mtp``, ``nextn`` and ``draft``, and layers beyond those of the model.
    """
    placed: dict[Place, str] = {}
    unused: list[str] = []
    for name in names:
        if not _LIKE.search(name) or is_drafting(name) or _is_beyond(name, layers):
            continue
        match = _STORED.fullmatch(_WRAPPER.sub("", name))
        if match is None:
            unused.append(name)
            continue
        place = _place(match)
        if place in placed:
            raise ValueError(
                f"{OWNER}: {shown(name)} is there twice, as {shown(placed[place])} too"
            )
        placed[place] = name
    return placed, unused


def place_in_model(name: str) -> Place | None:
    """Return the place of a model's parameter, whatever prefix its name has."""
    match = None if is_drafting(name) else _IN_MODEL.search(name)
    return None if match is None else _place(match)


def is_drafting(name: str) -> bool:
    """Return whether a tensor belongs to a part that only drafts tokens, not the model itself."""
    return _DRAFTING.search(name) is not None


def shown(name: str) -> str:
    """Return a name from a file in a form fit for an error: printable, and of limited length."""
    if len(name) > _SHOWN:
        name = f"{name[:_SHOWN]}..."
    return name if name.isprintable() else repr(name)


def _place(match: re.Match[str]) -> Place:
    layer, own, other, parameter = match.group("layer", "own", "other", "parameter")
    if layer is None:
        return Place(-1, "head", parameter)
    return Place(int(layer), own or other, parameter)


def _is_beyond(name: str, layers: int | None) -> bool:
    """Return whether a name's layer is beyond those of the model, or too high for any name."""
    match = _LAYER.search(name)
    if match is None:
        return False
    digits = match.group(1).lstrip("0") or "0"
    if len(digits) > len(str(MOST_LAYERS)) or int(digits) >= MOST_LAYERS:
        raise ValueError(f"{OWNER}: {shown(name)} needs a layer below {MOST_LAYERS}")
    return layers is not None and int(digits) >= layers
