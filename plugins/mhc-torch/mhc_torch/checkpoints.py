"""The hyper-connections of released checkpoints, as ``torch.nn`` modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mhc_backends.checkpoints import Library, Options, Read, keys_of_stack, read
from mhc_backends.checkpoints.families import Family
from mhc_backends.checkpoints.names import OWNER, Key, model_key, unwrapped
from mhc_core.variants import Variant
from mhc_torch.nn import (
    GatedConnection,
    GatedHead,
    HyperConnectedStack,
    HyperConnection,
    HyperHead,
)
from mhc_torch.ops import from_host

__all__ = ["ConnectedLayer", "HyperConnections", "load_hyper_connections"]


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
    Qwen4-Exp. One reader serves PyTorch and MLX: the families, the forms of names, the files and
    folders, the checks and the errors are those of ``mhc_core.mlx.load_hyper_connections``.

    Parameters
    ----------
    weights
        A safetensors file; a folder with ``model.safetensors.index.json`` and its shards; a folder
        with safetensors files and no index; or a mapping from names to arrays of PyTorch, NumPy or
        MLX.
    model
        A model to load into, on any device but meta. Its parameters have such names after any
        prefix, or it contains a :class:`mhc_torch.nn.HyperConnectedStack` whose blocks alternate
        between attention and MLP. They keep their identity and device, and become float32; those of
        gated residuals (Qwen4-Exp) keep their dtype. Load before ``fully_shard``.
    variant
        The constants of the modules, of the family's layout. By default they come from the
        ``config.json`` beside the weights or, without one, from the family's variant, such as
        :data:`mhc_core.DEEPSEEK_V4`. Qwen4-Exp has none.
    allow_unused
        True ignores tensors that look like hyper-connections but whose names have no known form.
    allow_missing
        True loads what a folder has, even if its ``config.json`` or index promise more, and leaves
        parameters of ``model`` without a tensor unchanged. Every layer and head must still be
        complete, and no layer may be missing before the last one.

    Returns
    -------
    HyperConnections
        Modules of their own, on the default device; they share nothing with ``model`` and
        ``weights``.

    Raises
    ------
    TypeError, ValueError
        For a tensor that is missing, a duplicate, of a wrong shape or dtype, not finite, or unknown
        to the model, and for a damaged file; the error names the tensor or the file. After an error
        the model is unchanged.
    FileNotFoundError
        For a file that does not exist.

    Notes
    -----
    Gates that MLX quantised (Qwen4-Exp) are dequantised, in the dtype of their scales, or of the
    norm if the scales are 8 bits wide, since PyTorch has no such layer.

    Examples
    --------
    >>> import torch
    >>> from mhc_torch import load_hyper_connections
    >>> sizes = {"fn": (24, 32), "base": (24,), "scale": (3,)}
    >>> loaded = load_hyper_connections({
    ...     f"layers.0.hc_{sublayer}_{name}": torch.zeros(shape)
    ...     for sublayer in ("attn", "ffn") for name, shape in sizes.items()
    ... })
    >>> loaded.layers[0].attn.dims, loaded.head
    (8, None)
    """
    named = None if model is None else partial(_parameters, model)
    found = read(_LIBRARY, weights, Options(variant, allow_unused, allow_missing), named)
    if model is not None:
        own = dict(model.named_parameters(remove_duplicate=False))
        placed = [(found.targets[key], tensor) for key, tensor in found.arrays.items()]
        for name, _ in placed:
            _check_writable(name, own[name])
        for name, tensor in placed:
            if found.gated is None:
                own[name].data = own[name].data.float()  # itself, if it is float32
            own[name].data.copy_(tensor)
    layers = found.layers(lambda arrays: _made(found, HyperConnection, GatedConnection, arrays))
    head = found.head(lambda arrays: _made(found, HyperHead, GatedHead, arrays))
    return HyperConnections(tuple(ConnectedLayer(*layer) for layer in layers), head)


def _made(found: Read, mapped: Any, gated: Any, arrays: Mapping[str, Tensor]) -> Any:
    """Return a module with these arrays, which it owns from now on."""
    sizes = found.dims, found.n
    with torch.device("meta"):
        made = mapped(*sizes, found.variant) if found.gated is None else gated(*sizes, *found.gated)
    made.load_state_dict(dict(arrays), assign=True)
    return made


def _check_writable(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(f"{OWNER}: {name} is on the device meta; call to_empty(device=...) first")
    if hasattr(parameter, "full_tensor"):
        raise ValueError(f"{OWNER}: {name} is sharded; load before fully_shard")


def _float32(array: Any) -> Tensor:
    return from_host(array).float()


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(getattr(torch, dtype))


_LIBRARY = Library(_float32, _is_finite, _cast)


def _parameters(
    model: nn.Module, family: Family
) -> Iterator[tuple[str, tuple[int, ...], Key | None]]:
    in_stacks: dict[str, Key] = {}
    for path, module in cast("Iterable[tuple[str, nn.Module]]", model.named_modules()):
        if isinstance(module, HyperConnectedStack):
            in_stacks |= keys_of_stack(unwrapped(path), len(module.blocks), family)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = unwrapped(name)
        yield name, tuple(parameter.shape), in_stacks.get(plain) or model_key(plain, family)
