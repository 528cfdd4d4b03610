"""The hyper-connections of DeepSeek-V4 and V4.1 checkpoints, read tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]
import mlx.core as mx
from mlx import nn, utils
from numpy import ndarray
from safetensors import safe_open

from mhc_backends._mlx import from_host
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core.variants import DEEPSEEK_V4, Variant, check_variant

__all__ = ["ConnectedLayer", "HyperConnections", "load_hyper_connections"]

OWNER = "load_hyper_connections"
PARTS = ("attn", "ffn")
PARAMETERS = ("fn", "base", "scale")
DTYPES = ("float32", "bfloat16", "float16")  # what widens to float32 without a loss
IN_FILES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

PATTERN = re.compile(r"(?:layers\.(\d+)\.hc_(attn|ffn)|hc_(head))_(fn|base|scale)")
PREFIX = re.compile(r"(?:language_model\.)?(?:model\.)?")
ANY_PREFIX = re.compile(r"(?:.*\.)?(?=layers\.\d+\.hc_|hc_head_)")


class ConnectedLayer(NamedTuple):
    """The two connections of one transformer layer."""

    attn: HyperConnection
    ffn: HyperConnection


class HyperConnections(NamedTuple):
    """The hyper-connections of a checkpoint: one entry per layer, and V4's head or None."""

    layers: tuple[ConnectedLayer, ...]
    head: HyperHead | None


class Place(NamedTuple):
    """Where a tensor belongs: the layer, or -1 for the head, then part and parameter."""

    layer: int
    part: str
    parameter: str

    def __str__(self) -> str:
        layer = "" if self.layer < 0 else f"layers.{self.layer}."
        return f"{layer}hc_{self.part}_{self.parameter}"


class Tensor(NamedTuple):
    """A tensor that has not been read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], mx.array]


def load_hyper_connections(
    weights: str | Path | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    variant: Variant | None = None,
) -> HyperConnections:
    """Read the hyper-connections of a DeepSeek-V4 or V4.1 checkpoint, and of it nothing else.

    Parameters
    ----------
    weights
        A safetensors file; a folder with ``model.safetensors.index.json`` and its shards, or with
        safetensors files alone; or a mapping from names to arrays. The names are the released
        ones, ``layers.N.hc_attn_fn``, ``hc_ffn_base``, ``hc_head_scale``, or those of mlx-lm and
        mlx-vlm, ``layers.N.attn_hc.fn``, ``hc_head.scale``, after ``model.``, ``language_model.``,
        both or neither. All others are left alone; so is what is for drafting, ``mtp`` and layers
        beyond those that ``config.json`` counts.
    model
        A model to load into, whose parameters have such names after any prefix, or that holds a
        :class:`HyperConnectedStack` of attention and MLP in turn.
    variant
        The constants of the modules. Left out, they come from the ``config.json`` beside the
        weights; where there is none, they are :data:`mhc_core.DEEPSEEK_V4`.

    Returns
    -------
    HyperConnections
        Its modules share their arrays with ``model``, which has them all if it was given.

    Raises
    ------
    TypeError, ValueError
        Naming the tensor: one is missing, is there twice, has another shape than its fellows or
        the model, or another number of streams; has a dtype other than float32, bfloat16 and
        float16; holds NaN or infinity; or has no place in the model. All is checked before
        anything is assigned, so the model is then as it was.
    FileNotFoundError
        For a file that is not there.

    Notes
    -----
    One tensor is in memory at a time beside those returned, and the large ones (experts,
    attention) are never read. float32 stays as it is; bfloat16 and float16 are widened.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import load_hyper_connections
    >>> sizes = {"fn": (24, 32), "base": (24,), "scale": (3,)}
    >>> loaded = load_hyper_connections({
    ...     f"layers.0.hc_{part}_{name}": mx.zeros(shape)
    ...     for part in ("attn", "ffn") for name, shape in sizes.items()
    ... })
    >>> loaded.layers[0].attn.dims, loaded.head
    (8, None)
    """
    config: dict[str, Any] = {}
    if isinstance(weights, Mapping):
        tensors = _in_mapping(weights)
    else:
        tensors, config = _in_files(Path(weights)), _config(Path(weights))
    variant = _of_config(config) if variant is None else check_variant(OWNER, "variant", variant)
    if not variant.res_transposed:
        raise ValueError(f"{OWNER}: variant is {variant}; needs one with res_transposed, as stored")
    placed = _placed(tensors, config.get("num_hidden_layers", math.inf))
    n, dims = _checked_sizes(placed, config.get("hc_mult"))
    targets = None if model is None else _targets(model, placed)
    arrays = {place: _read(tensor) for place, tensor in placed.items()}
    if model is not None and targets is not None:
        named = [(targets[place], array) for place, array in arrays.items()]
        model.update(cast("dict[str, Any]", utils.tree_unflatten(named)))
    return _modules(arrays, n, dims, variant)


def _modules(
    arrays: Mapping[Place, mx.array], n: int, dims: int, variant: Variant
) -> HyperConnections:
    def filled(module: Any, layer: int, part: str) -> Any:
        return module.update({name: arrays[Place(layer, part, name)] for name in PARAMETERS})

    layers = tuple(
        ConnectedLayer(*(filled(HyperConnection(dims, n, variant), k, part) for part in PARTS))
        for k in range(1 + max(place.layer for place in arrays))
    )
    has_head = any(place.part == "head" for place in arrays)
    return HyperConnections(
        layers, filled(HyperHead(dims, n, variant), -1, "head") if has_head else None
    )


# ---- names --------------------------------------------------------------------------------------


def _place(name: str, prefix: re.Pattern[str] = PREFIX) -> Place | None:
    """Say where a tensor of that name belongs; None for what is no hyper-connection."""
    released = re.sub(r"\b(attn|ffn)_hc\.", r"hc_\1_", name).replace("hc_head.", "hc_head_")
    start = prefix.match(released)
    match = PATTERN.fullmatch(released, start.end()) if start else None
    if match is None:
        return None
    layer, part, head, parameter = match.groups()
    return Place(int(layer) if layer else -1, part or head, parameter)


def _placed(tensors: Iterable[Tensor], layers: float) -> dict[Place, Tensor]:
    """Sort the tensors by layer; every layer up to the last must be whole, and so must a head.

    What stands in layers beyond those of the config is for drafting, as ``mtp`` is.
    """
    placed: dict[Place, Tensor] = {}
    for tensor in tensors:
        place = _place(tensor.name)
        if place is None or place.layer >= layers:
            continue
        if place in placed:
            raise ValueError(f"{OWNER}: {tensor.name} is there twice, as {placed[place].name} too")
        placed[place] = tensor
    count = 1 + max((place.layer for place in placed), default=-1)
    needed = [Place(k, part, name) for k in range(count) for part in PARTS for name in PARAMETERS]
    if not needed:
        raise ValueError(f"{OWNER}: no tensor is named as layers.0.hc_attn_fn or alike")
    if any(place.part == "head" for place in placed):
        needed += [Place(-1, "head", name) for name in PARAMETERS]
    for place in needed:
        if place not in placed:
            raise ValueError(f"{OWNER}: {place} is missing")
    return {place: placed[place] for place in needed}


def _targets(model: nn.Module, placed: Mapping[Place, Tensor]) -> dict[Place, str]:
    """Find the model's parameter for every tensor, and see that they are of one shape."""
    found: dict[Place, tuple[str, Any]] = {}
    stacked = _of_stacks(model)
    flat = cast("list[tuple[str, Any]]", utils.tree_flatten(model.parameters()))
    for name, array in flat:
        place = stacked.get(name) or _place(name, ANY_PREFIX)
        if place is None:
            continue
        if place in found:
            raise ValueError(f"{OWNER}: the model has {found[place][0]} and {name} for one tensor")
        found[place] = name, array
    for place, (name, _) in found.items():
        if place not in placed:
            raise ValueError(f"{OWNER}: {place} is missing, which the model needs as {name}")
    for place, tensor in placed.items():
        if place not in found:
            raise ValueError(f"{OWNER}: {tensor.name} has no place in the model")
        name, array = found[place]
        if tuple(array.shape) != tensor.shape:
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; {name} needs {array.shape}"
            )
    return {place: name for place, (name, _) in found.items()}


def _of_stacks(model: nn.Module) -> dict[str, Place]:
    """Give the places of the parameters of stacks: attention and MLP in turn, then the head."""
    places: dict[str, Place] = {}
    named = cast("list[tuple[str, nn.Module]]", model.named_modules())
    for path, module in named:
        if isinstance(module, HyperConnectedStack):
            start = f"{path}." if path else ""
            for name in PARAMETERS:
                for k in range(len(module.blocks)):
                    place = Place(k // 2, PARTS[k % 2], name)
                    places[f"{start}blocks.{k}.connection.{name}"] = place
                places[f"{start}head.{name}"] = Place(-1, "head", name)
    return places


# ---- checks -------------------------------------------------------------------------------------


def _checked_sizes(placed: Mapping[Place, Tensor], config_n: Any) -> tuple[int, int]:
    """Give n and dims, which all tensors must share, and check every shape and dtype."""
    first = next(iter(placed.values()))
    n = _streams(first)
    if config_n not in (None, n):
        raise ValueError(f"{OWNER}: {first.name} has {n} streams; config.json has {config_n}")
    m, width = n * n + 2 * n, first.shape[1]
    for place, tensor in placed.items():
        rows, scales = (n, 1) if place.part == "head" else (m, 3)
        need = {"fn": (rows, width), "base": (rows,), "scale": (scales,)}[place.parameter]
        if tensor.shape != need:
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; needs {need}, as {first.name} "
                f"has n={n} and dims={width // n}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{OWNER}: {tensor.name} has dtype {tensor.dtype}; needs {', '.join(DTYPES)}"
            )
    return n, width // n


def _streams(fn: Tensor) -> int:
    """Read n off the first fn, ``[n * n + 2 n, n * dims]``."""
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


# ---- where tensors come from --------------------------------------------------------------------


def _in_mapping(weights: Mapping[str, Any]) -> list[Tensor]:
    return [_of_array(name, array) for name, array in weights.items() if _place(name)]


def _of_array(name: str, array: Any) -> Tensor:
    if not isinstance(array, (mx.array, ndarray)):
        raise TypeError(
            f"{OWNER}: {name} is a {type(array).__name__}; needs a mlx.core.array or numpy.ndarray"
        )
    known = cast("Any", array)
    dtype = str(known.dtype).removeprefix("mlx.core.")
    own = isinstance(known, mx.array)
    return Tensor(name, tuple(known.shape), dtype, lambda: known if own else from_host(known))


def _in_files(path: Path) -> list[Tensor]:
    """Look into the headers of the files that hold hyper-connections."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = cast("dict[str, str]", json.loads(index.read_text())["weight_map"])
        files = sorted({path / shard for name, shard in shards.items() if _place(name)})
    else:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{OWNER}: {path} has no safetensors file with hyper-connections")
    return [tensor for file in files for tensor in _in_file(file)]


def _in_file(file: Path) -> list[Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{OWNER}: {file} is not there")
    with _opened(file) as opened:
        names = [name for name in opened.keys() if _place(name)]  # noqa: SIM118  no mapping
        slices = {name: opened.get_slice(name) for name in names}
        return [_of_slice(file, name, part) for name, part in slices.items()]


def _of_slice(file: Path, name: str, part: Any) -> Tensor:
    def read() -> mx.array:
        with _opened(file) as opened:
            return from_host(opened.get_tensor(name))

    dtype = cast("str", part.get_dtype())
    return Tensor(name, tuple(part.get_shape()), IN_FILES.get(dtype, dtype), read)


def _opened(file: Path) -> Any:
    """Open a file; it asks NumPy for "bfloat16" by name, which ml_dtypes brings."""
    return safe_open(file, framework="numpy")


def _config(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = cast("dict[str, Any]", json.loads(file.read_text()) if file.is_file() else {})
    return cast("dict[str, Any]", config.get("text_config", config))


def _of_config(config: Mapping[str, Any]) -> Variant:
    eps = config.get("hc_eps", DEEPSEEK_V4.pre_eps)
    return replace(
        DEEPSEEK_V4,
        norm_eps=config.get("rms_norm_eps", DEEPSEEK_V4.norm_eps),
        pre_eps=eps,
        sinkhorn_eps=eps,
        sinkhorn_iterations=config.get("hc_sinkhorn_iters", DEEPSEEK_V4.sinkhorn_iterations),
    )
