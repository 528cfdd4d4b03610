"""The hyper-connections of released checkpoints, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends.checkpoints import Library, Options, Read, keys_of_stack, read, sources
from mhc_backends.checkpoints.families import Family
from mhc_backends.checkpoints.names import Key
from mhc_backends.checkpoints.quantised import Packing, fitting
from mhc_backends.mlx_common import from_host
from mhc_backends.mlx_nn.gated import GatedConnection, GatedHead
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core.variants import Variant

__all__ = ["ConnectedLayer", "HyperConnections", "load_hyper_connections", "sources"]


class ConnectedLayer(NamedTuple):
    """The two connections of one transformer layer."""

    attn: HyperConnection | GatedConnection
    ffn: HyperConnection | GatedConnection


class HyperConnections(NamedTuple):
    """The hyper-connections of a checkpoint: one entry per layer, and the head or None.

    DeepSeek-V4, HY-V4 and Qwen4-Exp have a head. In GLM-5.3-Flash and Xing4.0 the streams end in
    their mean, ``mhc_core.contract(x, "mean")``; in DeepSeek-V4.1 the last H_pre collapses them.
    """

    layers: tuple[ConnectedLayer, ...]
    head: HyperHead | GatedHead | None


def load_hyper_connections(
    weights: str | Path | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    variant: Variant | None = None,
    allow_unused: bool = False,
    allow_missing: bool = False,
) -> HyperConnections:
    """Read only the hyper-connections of a released checkpoint.

    The families are DeepSeek-V4 and V4.1, GLM-5.3-Flash, Hunyuan HY-V4, Xing4.0 (TeleChat4) and
    Qwen4-Exp. The ``model_type`` in ``config.json`` tells which it is, or without one the names and
    the shapes: DeepSeek-V4 where they tell no other.

    Parameters
    ----------
    weights
        One of these:

        - a safetensors file, which is read by itself;
        - a folder with ``model.safetensors.index.json`` and its shards;
        - a folder with safetensors files and no index;
        - a mapping from names to arrays of MLX, NumPy or PyTorch.

        Names have one of these forms:

        - DeepSeek's and GLM's releases: ``layers.N.hc_attn_fn``, ``hc_head_scale``;
        - transformers, mlx-lm and mlx-vlm: ``layers.N.attn_hc.fn``, ``hc_head.hc_scale``,
          ``hc_head.scale``;
        - torchtitan: ``layers.N.hc_attn.fn``;
        - Xing4.0: ``layers.N.attn_hc.hc_fn``;
        - HY-V4: ``layers.N.hc_attn_layer.hc_pre.hc_fn``, ``hc_head.hc_head_fn``;
        - Qwen4-Exp: ``layers.N.attn_hyper_connection.hc_norm.weight``,
          ``hyper_connection_mixer.hc_norm.weight``.

        A name may begin with ``model.``, ``language_model.``, ``transformer.``, ``base_model.`` and
        ``module.``, end in ``.weight``, and contain torch.compile's ``_orig_mod.`` anywhere.
        Tensors for drafting are ignored: ``mtp``, ``nextn`` and ``draft``, and layers beyond
        ``num_hidden_layers`` in ``config.json``.
    model
        A model to load into. Its parameters have such names after any prefix, or it contains a
        :class:`HyperConnectedStack` whose blocks alternate between attention and MLP. Xing4.0's and
        HY-V4's layout is that of modules with ``phi``, ``alpha`` and ``bias``.
    variant
        The constants of the modules, of the family's layout. By default they come from the
        ``config.json`` beside the weights or, without one, from the family's variant, such as
        :data:`mhc_core.DEEPSEEK_V4`. Qwen4-Exp has none.
    allow_unused
        True ignores tensors that look like hyper-connections but whose names have none of the forms
        above: their names have a word ``hc``, ``mhc`` or ``hyper_connection``.
    allow_missing
        True loads what a folder has, even if its ``config.json`` or index promise more, and leaves
        parameters of ``model`` without a tensor unchanged. Every layer and head must still be
        complete, and no layer may be missing before the last one.

    Returns
    -------
    HyperConnections
        Its modules share their arrays with ``model``, if one was given.

    Raises
    ------
    TypeError, ValueError
        For a tensor that is missing or a duplicate; whose shape disagrees with the other tensors or
        the model; whose dtype is not float32, bfloat16 or float16; that has NaN or infinity; that
        belongs to a quantised matrix whose other parts do not fit; that the model has no parameter
        for; that looks like a hyper-connection but has an unsupported name; or whose layer is above
        9999. The error names the tensor.

        For a file that is damaged or of another format, and for an index that leads out of its
        folder. The error names the file.

        Everything is checked before anything is assigned, so after an error the model is unchanged.
    FileNotFoundError
        For a file that does not exist.

    Notes
    -----
    Beside the tensors that are returned, only one is in memory at a time, and large ones (experts,
    attention) are never read. float32 tensors keep their bits; bfloat16 and float16 are converted
    to float32, but for the weights of gated residuals, which keep their dtype.

    Gates that MLX quantised (``weight``, ``scales``, ``biases``) become ``nn.QuantizedLinear`` of
    the mode, the group size and the bits that their shapes tell. In a ``model`` whose gates are
    ``nn.Linear`` they are dequantised; quantise its gates in the same way before to keep them.

    HY-V4's H_post has ``hc_eps``, as in transformers; mlx-vlm 0.7.10 leaves it out.

    A folder promises as many layers as ``num_hidden_layers`` in its ``config.json``, a head if the
    models of its ``model_type`` have one, and every tensor that its index lists. Files may have
    more than their index lists.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import load_hyper_connections
    >>> sizes = {"fn": (24, 32), "base": (24,), "scale": (3,)}
    >>> loaded = load_hyper_connections({
    ...     f"layers.0.hc_{sublayer}_{name}": mx.zeros(shape)
    ...     for sublayer in ("attn", "ffn") for name, shape in sizes.items()
    ... })
    >>> loaded.layers[0].attn.dims, loaded.head
    (8, None)
    """
    named = None if model is None else partial(_parameters, model)
    options = Options(variant, allow_unused, allow_missing)
    found = read(_LIBRARY, weights, options, named)
    if model is not None:
        placed = [(found.targets[key], array) for key, array in found.arrays.items()]
        model.update(cast("dict[str, Any]", utils.tree_unflatten(placed)))

    layers = found.layers(lambda arrays: _made(found, HyperConnection, GatedConnection, arrays))
    head = found.head(lambda arrays: _made(found, HyperHead, GatedHead, arrays))
    return HyperConnections(tuple(ConnectedLayer(*layer) for layer in layers), head)


def _made(found: Read, mapped: Any, gated: Any, arrays: dict[str, mx.array]) -> Any:
    """Return a module with these arrays."""
    sizes = found.dims, found.n
    made = mapped(*sizes, found.variant) if found.gated is None else gated(*sizes, *found.gated)
    own = cast("dict[str, Any]", utils.tree_unflatten(list(arrays.items())))
    for name, its in own.items():
        if "scales" in its:
            made[name] = _quantised(made[name], its)
    return made.update(own)


def _quantised(layer: nn.Linear, arrays: dict[str, mx.array]) -> nn.QuantizedLinear:
    """Return a quantised layer, of a plain one's size, for these arrays."""
    outputs, inputs = layer.weight.shape
    shapes = arrays["weight"].shape, arrays["scales"].shape
    packing = cast("Packing", fitting(*shapes, inputs, "biases" in arrays))
    mode, group_size, bits = packing
    return nn.QuantizedLinear(inputs, outputs, False, group_size, bits, mode)


def _own(array: Any) -> mx.array:
    return array if isinstance(array, mx.array) else from_host(array)


def _float32(array: Any) -> mx.array:
    return _own(array).astype(mx.float32)


def _is_finite(array: mx.array) -> bool:
    return bool(mx.isfinite(array).all().item())


def _cast(array: mx.array, dtype: str) -> mx.array:
    return array.astype(getattr(mx, dtype))


_LIBRARY = Library(_float32, _is_finite, _cast, own=mx.array, integers=_own)


def _parameters(
    model: nn.Module, family: Family
) -> Iterator[tuple[str, tuple[int, ...], Key | None]]:
    in_stacks: dict[str, Key] = {}
    for path, module in cast("list[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, HyperConnectedStack):
            in_stacks |= keys_of_stack(path, len(module.blocks), family)
    for name, array in cast("list[tuple[str, Any]]", utils.tree_flatten(model.parameters())):
        yield name, tuple(array.shape), in_stacks.get(name)
