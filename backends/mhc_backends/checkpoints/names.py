"""The names of hyper-connections in checkpoints and in models.

A layer's parameter is named ``layers.N.`` and then, depending on who wrote it,

- ``hc_attn_fn`` in DeepSeek's and GLM-5.3-Flash's releases, and by default from
  ``save_pretrained`` of transformers;
- ``attn_hc.fn`` in transformers 5.24 (``models/deepseek_v4/modeling_deepseek_v4.py`` and others),
  which ``save_original_format=False`` stores, and in mlx-lm and mlx-vlm;
- ``hc_attn.fn``, or ``hc_attn_pre.hc_fn``, in torchtitan (``models/deepseek_v4``);
- ``attn_hc.hc_fn`` in Xing4.0;
- ``hc_attn_layer.hc_pre.hc_fn`` and ``hc_mlp_layer.hc_pre.hc_fn`` in HY-V4, and
  ``hc_pre.hc_attn_layer.hc_fn`` from ``save_pretrained`` of transformers 5.24, which undoes its
  renaming of ``.hc_pre.hc_`` to ``.hc_`` (``conversion_mapping.py``) in the wrong place, as it does
  in the head: ``hc_pre.hc_head.hc_head_fn``, ``hc_head.hc_pre.hc_head_fn``;
- ``attn_hyper_connection.hc_norm.weight`` and ``mlp_hyper_connection.hc_norm.weight`` in
  Qwen4-Exp, whose head is ``hyper_connection_mixer``; MLX stores a quantised matrix as ``weight``,
  ``scales`` and ``biases``.

The head is ``hc_head_fn``, ``hc_head.fn``, ``hc_head.hc_fn``, or ``hc_head.hc_head_fn`` in HY-V4.
transformers renames DeepSeek's back only where the name has no prefix (``^hc_head_fn`` in its
``conversion_mapping.py``), so only for ``DeepseekV4Model``: ``DeepseekV4ForCausalLM`` stores
``model.hc_head.hc_fn`` beside ``model.layers.N.hc_attn_fn``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from mhc_backends.checkpoints.families import HUNYUAN, QWEN4, XING, Family

__all__ = [
    "MOST_LAYERS",
    "OWNER",
    "QUANTISED",
    "SUBLAYERS",
    "Key",
    "by_key",
    "family_of",
    "gated_name",
    "head_keys",
    "is_drafting",
    "layer_keys",
    "model_key",
    "printable",
    "unwrapped",
]

OWNER = "load_hyper_connections"  # errors begin with it
SUBLAYERS = ("attn", "ffn")
QUANTISED = ("scales", "biases")  # beside the weight of a quantised matrix
MOST_LAYERS = 10_000  # far above any model; a name alone must not make millions of modules

_LONGEST = 200  # characters of a name in an error

_IN_LAYER = r"layers\.(?P<layer>0|[1-9][0-9]*)\."
_MAPPED = r"(?P<parameter>fn|base|scale)(?:\.weight)?"
_OWN = r"(?P<parameter>phi|bias|alpha)"
_GATES = r"input_mix_weight_down|input_mix_weight_up"
_PART = rf"\.(?P<part>weight|{'|'.join(QUANTISED)})"
_NORM = r"hc_norm(?=\.weight\Z)"  # it is never quantised

# By an example of each: where a name may be, in checkpoints or only in models.
_FORMS = {
    "hc_attn_fn": _IN_LAYER + r"hc_(?P<sublayer>attn|ffn)(?:_pre)?[._](?:hc_)?" + _MAPPED,
    "attn_hc.fn": _IN_LAYER + r"(?P<sublayer>attn|ffn)_hc[._]" + _MAPPED,
    "attn_hc.hc_fn": _IN_LAYER + r"(?P<sublayer>attn|ffn)_hc[._]hc_" + _MAPPED,
    "hc_attn_layer.hc_fn": (
        _IN_LAYER + r"(?:hc_pre\.)?hc_(?P<sublayer>attn|mlp)_layer\.(?:hc_pre\.)?hc_" + _MAPPED
    ),
    "attn_hyper_connection.hc_norm": (
        _IN_LAYER + r"(?P<sublayer>attn|mlp)_hyper_connection\."
        rf"(?P<parameter>{_NORM}|{_GATES}|block_inject_weight){_PART}"
    ),
    "hc_head_fn": r"hc_head[._](?:hc_)?" + _MAPPED,
    "hc_head.hc_head_fn": r"(?:hc_pre\.)?hc_head\.(?:hc_pre\.)?hc_head_" + _MAPPED,
    "hyper_connection_mixer.hc_norm": (
        rf"hyper_connection_mixer\.(?P<parameter>{_NORM}|{_GATES}){_PART}"
    ),
}
_IN_MODELS = {
    **_FORMS,
    "attn_hc.phi": _IN_LAYER + r"(?P<sublayer>attn|ffn)_hc\." + _OWN,
    "hc_head.phi": r"hc_head\." + _OWN,
}
_WRITTEN_BY = {  # where a form tells the family
    "attn_hc.hc_fn": XING,
    "hc_attn_layer.hc_fn": HUNYUAN,
    "hc_head.hc_head_fn": HUNYUAN,
    "attn_hyper_connection.hc_norm": QWEN4,
    "hyper_connection_mixer.hc_norm": QWEN4,
}
_OWN_NAMES = {"phi": "fn", "bias": "base", "alpha": "scale"}  # and the key's parameter
_GATED_NAMES = {
    "hc_norm": "norm",
    "input_mix_weight_down": "down",
    "input_mix_weight_up": "up",
    "block_inject_weight": "inject",
}
_GATED_MODULES = {
    "attn": "attn_hyper_connection",
    "ffn": "mlp_hyper_connection",
    "head": "hyper_connection_mixer",
}
_PLAIN = _OWN_NAMES | _GATED_NAMES
_RELEASED = {plain: name for name, plain in _GATED_NAMES.items()}

_PREFIX = r"(?:(?:model|language_model|transformer|base_model|module)\.)*"
_STORED = {form: re.compile(_PREFIX + text) for form, text in _FORMS.items()}
_IN_MODEL = {form: re.compile(rf"(?:^|\.){text}\Z") for form, text in _IN_MODELS.items()}

# PyTorch's wrappers insert these anywhere in a name: torch.compile, FSDP and checkpoint_wrapper.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LIKE = re.compile(r"(?:^|[._])(?:m?hc|hyper_?connections?)(?=[._]|\Z)", re.IGNORECASE)
_DRAFTING = re.compile(r"(?:^|\.)(?:mtp|nextn|draft)(?:_\w+)?\.")
_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")


class Key(NamedTuple):
    """A tensor whatever its name: the layer (-1 for the head), the sublayer and the parameter.

    A parameter is one of a family's, or a part of a quantised one: ``down.scales``.
    """

    layer: int
    sublayer: str
    parameter: str

    def __str__(self) -> str:
        """Return the released name: Qwen4-Exp's for a gated residual, else DeepSeek's."""
        layer = "" if self.layer < 0 else f"layers.{self.layer}."
        if self.whole not in _RELEASED:
            return f"{layer}hc_{self.sublayer}_{self.parameter}"
        return f"{layer}{_GATED_MODULES[self.sublayer]}.{gated_name(self.parameter)}"

    @property
    def is_head(self) -> bool:
        """Return whether it is a parameter of the head."""
        return self.sublayer == "head"

    @property
    def whole(self) -> str:
        """Return the parameter that it is, or is a part of."""
        return self.parameter.partition(".")[0]

    @property
    def part(self) -> str:
        """Return which part of a quantised parameter it is; "" for the parameter itself."""
        return self.parameter.partition(".")[2]

    def beside(self, part: str) -> Key:
        """Return the key of a part that is stored beside a quantised parameter."""
        return self._replace(parameter=f"{self.whole}.{part}")


def gated_name(parameter: str) -> str:
    """Return the released name of a gated residual's parameter, within its module."""
    whole, _, part = parameter.partition(".")
    return f"{_RELEASED[whole]}.{part or 'weight'}"


def layer_keys(layers: int, family: Family) -> list[Key]:
    """Return the keys of the first ``layers`` layers."""
    names = family.layer_parameters
    return [Key(k, one, name) for k in range(layers) for one in SUBLAYERS for name in names]


def head_keys(family: Family) -> list[Key]:
    """Return the keys of the head, if the family can have one."""
    return [Key(-1, "head", name) for name in family.head_parameters]


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
        key = _stored_key(unwrapped(name))
        if key is None:
            unsupported.append(name)
            continue
        if key in supported:
            raise ValueError(f"{OWNER}: {printable(name)} duplicates {printable(supported[key])}")
        supported[key] = name
    return supported, unsupported


def family_of(name: str) -> Family | None:
    """Return the family whose checkpoints alone have such names, if there is one."""
    plain = unwrapped(name)
    forms = (form for form, pattern in _STORED.items() if pattern.fullmatch(plain))
    return _WRITTEN_BY.get(next(forms, ""))


def model_key(name: str, family: Family) -> Key | None:
    """Return the key of a model's parameter, with any prefix; None if it is not of the family."""
    if not is_drafting(name):
        for form, pattern in _IN_MODEL.items():
            if form in family.forms and (match := pattern.search(name)):
                return _key(match)
    return None


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


def _stored_key(name: str) -> Key | None:
    matches = (pattern.fullmatch(name) for pattern in _STORED.values())
    found = next((match for match in matches if match), None)
    return None if found is None else _key(found)


def _key(match: re.Match[str]) -> Key:
    groups = match.groupdict()
    parameter = _PLAIN.get(groups["parameter"], groups["parameter"])
    if groups.get("part") in QUANTISED:
        parameter += f".{groups['part']}"
    if groups.get("layer") is None:
        return Key(-1, "head", parameter)
    sublayer = "ffn" if groups["sublayer"] == "mlp" else groups["sublayer"]
    return Key(int(groups["layer"]), sublayer, parameter)


def _is_beyond(name: str, layers: int | None) -> bool:
    """Return whether a name's layer is beyond the model's; raise if no model has so many."""
    match = _LAYER.search(name)
    if match is None:
        return False
    digits = match.group(1).lstrip("0") or "0"
    if len(digits) > len(str(MOST_LAYERS)) or int(digits) >= MOST_LAYERS:
        raise ValueError(f"{OWNER}: {printable(name)} needs a layer below {MOST_LAYERS}")
    return layers is not None and int(digits) >= layers
