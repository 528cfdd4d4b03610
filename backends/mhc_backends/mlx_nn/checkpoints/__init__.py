"""The hyper-connections of DeepSeek-V4 and V4.1 checkpoints, read tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx import nn, utils

from mhc_backends.mlx_nn.checkpoints.config import read_config, variant_of
from mhc_backends.mlx_nn.checkpoints.names import (
    HEAD,
    OWNER,
    PARAMETERS,
    SUBLAYERS,
    Key,
    layer_keys,
    model_key,
    printable,
)
from mhc_backends.mlx_nn.checkpoints.sources import (
    DTYPES,
    Checkpoint,
    Tensor,
    checked_path,
    from_files,
    from_mapping,
)
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core import checks
from mhc_core.variants import Variant, check_variant

__all__ = ["ConnectedLayer", "HyperConnections", "load_hyper_connections"]

_LISTED = 8  # names in an error


class ConnectedLayer(NamedTuple):
    """The two connections of one transformer layer."""

    attn: HyperConnection
    ffn: HyperConnection


class HyperConnections(NamedTuple):
    """The hyper-connections of a checkpoint: one entry per layer, and V4's head or None."""

    layers: tuple[ConnectedLayer, ...]
    head: HyperHead | None


def load_hyper_connections(
    weights: str | Path | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    variant: Variant | None = None,
    allow_unused: bool = False,
    allow_missing: bool = False,
) -> HyperConnections:
    """Read only the hyper-connections of a DeepSeek-V4 or V4.1 checkpoint.

    Parameters
    ----------
    weights
        One of these:

        - a safetensors file, which is read by itself;
        - a folder with ``model.safetensors.index.json`` and its shards;
        - a folder with safetensors files and no index;
        - a mapping from names to arrays of MLX, NumPy or PyTorch.

        Names have one of these forms:

        - DeepSeek's releases: ``layers.N.hc_attn_fn``, ``hc_head_scale``;
        - transformers, mlx-lm and mlx-vlm: ``layers.N.attn_hc.fn``, ``hc_head.hc_scale``,
          ``hc_head.scale``;
        - torchtitan: ``layers.N.hc_attn.fn``.

        A name may begin with ``model.``, ``language_model.``, ``transformer.``, ``base_model.`` and
        ``module.``, end in ``.weight``, and contain torch.compile's ``_orig_mod.`` anywhere.
        Tensors for drafting are ignored: ``mtp``, ``nextn`` and ``draft``, and layers beyond
        ``num_hidden_layers`` in ``config.json``.
    model
        A model to load into. Its parameters have such names after any prefix, or it contains a
        :class:`HyperConnectedStack` whose blocks alternate between attention and MLP.
    variant
        The constants of the modules. By default they come from the ``config.json`` beside the
        weights or, without one, from :data:`mhc_core.DEEPSEEK_V4`.
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
        the model has no parameter for; that looks like a hyper-connection but has an unsupported
        name; or whose layer is above 9999. The error names the tensor.

        For a file that is damaged or of another format, and for an index that leads out of its
        folder. The error names the file.

        Everything is checked before anything is assigned, so after an error the model is unchanged.
    FileNotFoundError
        For a file that does not exist.

    Notes
    -----
    Beside the tensors that are returned, only one is in memory at a time, and large ones (experts,
    attention) are never read. float32 tensors keep their bits; bfloat16 and float16 are converted
    to float32.

    A folder promises as many layers as ``num_hidden_layers`` in its ``config.json``, a head if its
    ``model_type`` is ``deepseek_v4``, and every tensor that its index lists. Files may have more
    than their index lists.

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
    for name, value in (("allow_unused", allow_unused), ("allow_missing", allow_missing)):
        checks.boolean(OWNER, name, value)
    path = None if isinstance(weights, Mapping) else checked_path(weights)
    config = read_config(path)
    variant = variant_of(config) if variant is None else check_variant(OWNER, "variant", variant)
    if not variant.res_transposed:
        raise ValueError(
            f"{OWNER}: variant is {variant}; checkpoints need one with res_transposed=True"
        )
    if isinstance(weights, Mapping):
        checkpoint = from_mapping(weights)
    else:
        checkpoint = from_files(cast("Path", path), config, allow_missing)
    tensors = _complete(checkpoint, allow_unused, allow_missing)
    n, dims = _checked_sizes(tensors, config.n)
    targets = None if model is None else _targets(model, tensors, allow_missing)
    arrays = {key: _read(tensor) for key, tensor in tensors.items()}
    if model is not None and targets is not None:
        named = [(targets[key], array) for key, array in arrays.items()]
        model.update(cast("dict[str, Any]", utils.tree_unflatten(named)))
    return _modules(arrays, n, dims, variant)


def _modules(
    arrays: Mapping[Key, mx.array], n: int, dims: int, variant: Variant
) -> HyperConnections:
    def filled(module: Any, layer: int, sublayer: str) -> Any:
        return module.update({name: arrays[Key(layer, sublayer, name)] for name in PARAMETERS})

    layers = tuple(
        ConnectedLayer(*(filled(HyperConnection(dims, n, variant), k, one) for one in SUBLAYERS))
        for k in range(1 + max(key.layer for key in arrays))
    )
    has_head = any(key.sublayer == "head" for key in arrays)
    return HyperConnections(
        layers, filled(HyperHead(dims, n, variant), -1, "head") if has_head else None
    )


# ---- what must be present -----------------------------------------------------------------------


def _complete(checkpoint: Checkpoint, allow_unused: bool, allow_missing: bool) -> dict[Key, Tensor]:
    """Return the tensors in order; every layer up to the last, and a head, must be complete."""
    tensors, where = checkpoint.tensors, checkpoint.where
    if checkpoint.unsupported and not allow_unused:
        raise ValueError(
            f"{OWNER}: {_listed(checkpoint.unsupported)} in {where}: named like hyper-connections, "
            "but in no supported form; rename them, or ignore them with allow_unused=True"
        )
    if not tensors:
        raise ValueError(f"{OWNER}: no tensor in {where} has a name such as layers.0.hc_attn_fn")
    needed = layer_keys(1 + max(key.layer for key in tensors))
    if any(key.sublayer == "head" for key in tensors):
        needed += HEAD
    if not allow_missing:
        missing = [key for key in checkpoint.promised if key not in tensors]
        if missing:
            raise ValueError(
                f"{OWNER}: {_missing(missing)} in {where}, but {checkpoint.promised[missing[0]]}; "
                "allow_missing=True loads the rest"
            )
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise ValueError(f"{OWNER}: {_missing(missing)} in {where}")
    return {key: tensors[key] for key in needed}


def _missing(keys: list[Key]) -> str:
    first, *others = map(str, keys)
    if not others:
        return f"{first} is missing"
    return f"{first} is missing, and so {'is' if len(others) == 1 else 'are'} {_listed(others)},"


def _listed(names: list[str]) -> str:
    """Return names for an error, only some of them if there are many."""
    some = ", ".join(printable(name) for name in names[:_LISTED])
    return f"{some} and {len(names) - _LISTED} more" if len(names) > _LISTED else some


# ---- sizes and values ---------------------------------------------------------------------------


def _checked_sizes(tensors: Mapping[Key, Tensor], config_n: Any) -> tuple[int, int]:
    """Return n and dims, which all tensors must share, and check every shape and dtype."""
    first = next(iter(tensors.values()))
    n = _streams(first)
    if config_n not in (None, n):
        raise ValueError(f"{OWNER}: {first.name} has {n} streams; config.json has {config_n}")
    m, columns = n * n + 2 * n, first.shape[1]
    for key, tensor in tensors.items():
        rows, scales = (n, 1) if key.sublayer == "head" else (m, 3)
        need = {"fn": (rows, columns), "base": (rows,), "scale": (scales,)}[key.parameter]
        if tensor.shape != need:
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; needs {need}, as {first.name} "
                f"has n={n} and dims={columns // n}"
            )
        if tensor.dtype not in DTYPES.values():
            raise TypeError(
                f"{OWNER}: {tensor.name} has dtype {tensor.dtype}; needs "
                f"{', '.join(DTYPES.values())}"
            )
    return n, columns // n


def _streams(fn: Tensor) -> int:
    """Return n, from the shape of the first fn, ``[n * n + 2 n, n * dims]``."""
    if len(fn.shape) == 2:
        n = math.isqrt(fn.shape[0] + 1) - 1
        if n >= 1 and n * n + 2 * n == fn.shape[0] and fn.shape[1] and fn.shape[1] % n == 0:
            return n
    raise ValueError(
        f"{OWNER}: {fn.name} has shape {fn.shape}; needs (n * n + 2 n, n * dims) for n streams"
    )


def _read(tensor: Tensor) -> mx.array:
    array = tensor.read().astype(mx.float32)
    if not mx.isfinite(array).all().item():
        raise ValueError(f"{OWNER}: {tensor.name} holds NaN or infinity")
    return array


# ---- the model ----------------------------------------------------------------------------------


def _targets(
    model: nn.Module, tensors: Mapping[Key, Tensor], allow_missing: bool
) -> dict[Key, str]:
    """Return the model's parameter for every tensor, after checking that the shapes agree."""
    found: dict[Key, tuple[str, Any]] = {}
    in_stacks = _keys_of_stacks(model)
    flat = cast("list[tuple[str, Any]]", utils.tree_flatten(model.parameters()))
    for name, array in flat:
        key = in_stacks.get(name) or model_key(name)
        if key is None:
            continue
        if key in found:
            raise ValueError(f"{OWNER}: the model has {found[key][0]} and {name} for one tensor")
        found[key] = name, array
    for key, (name, _) in found.items():
        if key not in tensors and not allow_missing:
            raise ValueError(f"{OWNER}: {key} is missing; the model needs it for {name}")
    for key, tensor in tensors.items():
        if key not in found:
            raise ValueError(f"{OWNER}: the model has no parameter for {tensor.name}")
        name, array = found[key]
        if tuple(array.shape) != tensor.shape:
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; {name} needs {array.shape}"
            )
    return {key: name for key, (name, _) in found.items()}


def _keys_of_stacks(model: nn.Module) -> dict[str, Key]:
    """Return the keys of the parameters of stacks: attention and MLP alternate, then the head."""
    keys: dict[str, Key] = {}
    named = cast("list[tuple[str, nn.Module]]", model.named_modules())
    for path, module in named:
        if isinstance(module, HyperConnectedStack):
            start = f"{path}." if path else ""
            for name in PARAMETERS:
                for k in range(len(module.blocks)):
                    key = Key(k // 2, SUBLAYERS[k % 2], name)
                    keys[f"{start}blocks.{k}.connection.{name}"] = key
                keys[f"{start}head.{name}"] = Key(-1, "head", name)
    return keys
