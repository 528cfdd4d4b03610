"""The hyper-connections of DeepSeek-V4 and V4.1 checkpoints, read tensor by tensor."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, cast

import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]
import mlx.core as mx
from mlx import nn, utils
from numpy import ndarray
from safetensors import safe_open

from mhc_backends.mlx_common import from_host
from mhc_backends.mlx_nn._names import (
    MOST_LAYERS,
    PARAMETERS,
    PARTS,
    Place,
    by_place,
    layer_places,
    place_in_model,
    shown,
)
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core import checks
from mhc_core.variants import DEEPSEEK_V4, Variant, check_variant

__all__ = ["ConnectedLayer", "HyperConnections", "load_hyper_connections"]

OWNER = "load_hyper_connections"
HEAD = [Place(-1, "head", name) for name in PARAMETERS]
INDEX = "model.safetensors.index.json"
DTYPES = ("float32", "bfloat16", "float16")  # what widens to float32 without a loss
IN_FILES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WITH_HEAD = "deepseek_v4"  # the model_type whose streams end in a head; V4.1 has none

_LISTED = 8  # names in an error


class ConnectedLayer(NamedTuple):
    """The two connections of one transformer layer."""

    attn: HyperConnection
    ffn: HyperConnection


class HyperConnections(NamedTuple):
    """The hyper-connections of a checkpoint: one entry per layer, and V4's head or None."""

    layers: tuple[ConnectedLayer, ...]
    head: HyperHead | None


class Tensor(NamedTuple):
    """A tensor that has not been read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], mx.array]


class Stored(NamedTuple):
    """The contents of a checkpoint: our tensors, other names of hyper-connections, and its path."""

    tensors: dict[Place, Tensor]
    unused: list[str]
    promised: dict[Place, str]  # by whom
    where: str


class Config(NamedTuple):
    """The entries of ``config.json`` on the hyper-connections."""

    file: Path | None
    fields: Mapping[str, Any]
    layers: int | None
    n: int | None
    has_head: bool


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
        A safetensors file, which is read alone; a folder with ``model.safetensors.index.json`` and
        its shards, or with safetensors files alone; or a mapping from names to arrays of MLX, NumPy
        or PyTorch. The names are those of DeepSeek's releases, ``layers.N.hc_attn_fn`` and
        ``hc_head_scale``, of transformers, mlx-lm and mlx-vlm, ``layers.N.attn_hc.fn`` and
        ``hc_head.hc_scale`` or ``hc_head.scale``, or of torchtitan, ``layers.N.hc_attn.fn``; after
        any of ``model.``, ``language_model.``, ``transformer.``, ``base_model.`` and ``module.``,
        with ``_orig_mod.`` wherever torch.compile put it, and also with ``.weight`` behind. Tensors
        for drafting are ignored: ``mtp``, ``nextn`` and ``draft``, and layers beyond those that
        ``config.json`` counts.
    model
        A model to load into, whose parameters have such names after any prefix, or that holds a
        :class:`HyperConnectedStack` of attention and MLP in turn.
    variant
        The constants of the modules. Left out, they come from the ``config.json`` beside the
        weights; where there is none, they are :data:`mhc_core.DEEPSEEK_V4`.
    allow_unused
        True ignores tensors whose names belong to hyper-connections, as they have a word ``hc``,
        ``mhc`` or ``hyper_connection``, but differ from the forms above.
    allow_missing
        True loads what a folder has, even if its ``config.json`` or index promise more, and leaves
        parameters of ``model`` unchanged that have no tensor. Each layer and head must still be
        complete, and all layers before it must be present.

    Returns
    -------
    HyperConnections
        Its modules share their arrays with ``model``, which has them all if it was given.

    Raises
    ------
    TypeError, ValueError
        Naming the tensor: one is missing, is there twice, has another shape than its fellows or
        the model, or another number of streams; has a dtype other than float32, bfloat16 and
        float16; holds NaN or infinity; has no place in the model; is of hyper-connections and not
        used; or is of a layer beyond 9999. Naming the file: it is damaged or of another kind, or
        it is an index that leads out of its folder. All is checked before anything is assigned,
        so the model is then as it was.
    FileNotFoundError
        For a file that is not there.

    Notes
    -----
    One tensor is in memory at a time beside those returned, and the large ones (experts,
    attention) are never read. float32 stays as it is; bfloat16 and float16 are widened.

    A folder promises the layers that ``config.json`` counts, a head if it is of ``deepseek_v4``,
    and what the index names. An index that names less than its files have does no harm.

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
    for name, value in (("allow_unused", allow_unused), ("allow_missing", allow_missing)):
        checks.boolean(OWNER, name, value)
    path = None if isinstance(weights, Mapping) else _path(weights)
    config = _config(path)
    variant = _variant(config) if variant is None else check_variant(OWNER, "variant", variant)
    if not variant.res_transposed:
        raise ValueError(f"{OWNER}: variant is {variant}; needs one with res_transposed, as stored")
    if isinstance(weights, Mapping):
        stored = _in_mapping(weights)
    else:
        stored = _in_files(cast("Path", path), config, allow_missing)
    placed = _placed(stored, allow_unused, allow_missing)
    n, dims = _checked_sizes(placed, config.n)
    targets = None if model is None else _targets(model, placed, allow_missing)
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


# ---- what must be there -------------------------------------------------------------------------


def _placed(stored: Stored, allow_unused: bool, allow_missing: bool) -> dict[Place, Tensor]:
    """Order the tensors; every layer up to the last must be complete, and so must a head."""
    tensors = stored.tensors
    if stored.unused and not allow_unused:
        raise ValueError(
            f"{OWNER}: {_listed(stored.unused)} in {stored.where}: of hyper-connections by name, "
            "in no form that is known; rename, or leave alone with allow_unused=True"
        )
    if not tensors:
        raise ValueError(
            f"{OWNER}: no tensor in {stored.where} is named as layers.0.hc_attn_fn or alike"
        )
    needed = layer_places(1 + max(place.layer for place in tensors))
    if any(place.part == "head" for place in tensors):
        needed += HEAD
    if not allow_missing:
        missing = [place for place in stored.promised if place not in tensors]
        if missing:
            raise ValueError(
                f"{OWNER}: {_missing(missing)} in {stored.where}, though "
                f"{stored.promised[missing[0]]}; allow_missing=True takes what is there"
            )
    missing = [place for place in needed if place not in tensors]
    if missing:
        raise ValueError(f"{OWNER}: {_missing(missing)} in {stored.where}")
    return {place: tensors[place] for place in needed}


def _missing(places: list[Place]) -> str:
    first, *others = map(str, places)
    if not others:
        return f"{first} is missing"
    return f"{first} is missing, and so {'is' if len(others) == 1 else 'are'} {_listed(others)},"


def _listed(names: list[str]) -> str:
    """Return names for an error, only some of them if there are many."""
    some = ", ".join(shown(name) for name in names[:_LISTED])
    return f"{some} and {len(names) - _LISTED} more" if len(names) > _LISTED else some


def _targets(
    model: nn.Module, placed: Mapping[Place, Tensor], allow_missing: bool
) -> dict[Place, str]:
    """Return the model's parameter for every tensor, after checking that the shapes agree."""
    found: dict[Place, tuple[str, Any]] = {}
    stacked = _of_stacks(model)
    flat = cast("list[tuple[str, Any]]", utils.tree_flatten(model.parameters()))
    for name, array in flat:
        place = stacked.get(name) or place_in_model(name)
        if place is None:
            continue
        if place in found:
            raise ValueError(f"{OWNER}: the model has {found[place][0]} and {name} for one tensor")
        found[place] = name, array
    for place, (name, _) in found.items():
        if place not in placed and not allow_missing:
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
    """Return the places of the parameters of stacks: attention and MLP in turn, then the head."""
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
    """Return n and dims, which all tensors must share, and check every shape and dtype."""
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


# ---- where tensors come from --------------------------------------------------------------------


def _in_mapping(weights: Mapping[Any, Any]) -> Stored:
    for name in weights:
        if not isinstance(name, str):
            raise TypeError(f"{OWNER}: a name is a {type(name).__name__}; needs strings")
    placed, unused = by_place(weights, None)
    tensors = {place: _of_array(name, weights[name]) for place, name in placed.items()}
    return Stored(tensors, unused, {}, "the mapping")


def _of_array(name: str, array: Any) -> Tensor:
    if _is_of_torch(array):
        dtype = str(array.dtype).removeprefix("torch.")
        return Tensor(shown(name), tuple(array.shape), dtype, lambda: _from_torch(name, array))
    if not isinstance(array, (mx.array, ndarray)):
        raise TypeError(
            f"{OWNER}: {shown(name)} is a {type(array).__name__}; needs a mlx.core.array, "
            "numpy.ndarray or torch.Tensor"
        )
    known = cast("Any", array)
    dtype = str(known.dtype).removeprefix("mlx.core.")
    own = isinstance(known, mx.array)
    return Tensor(
        shown(name), tuple(known.shape), dtype, lambda: known if own else from_host(known)
    )


def _is_of_torch(array: Any) -> bool:
    """Return whether it is a PyTorch tensor; does not import PyTorch, as its owner has done so."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _from_torch(name: str, tensor: Any) -> mx.array:
    """Convert a tensor from any device, by way of float32, since NumPy has no bfloat16."""
    try:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return mx.array(whole.detach().float().numpy(force=True))
    except Exception as error:  # one without values: of the device meta, or made while tracing
        raise ValueError(f"{OWNER}: {shown(name)} cannot be read: {error}") from error


def _in_files(path: Path, config: Config, allow_missing: bool) -> Stored:
    """Read the headers of the files that hold hyper-connections."""
    promised: dict[Place, str] = {}
    unused: list[str] = []
    if not path.is_dir():
        files = [path]
    elif _is_file(path / INDEX):
        shards = _weight_map(path / INDEX)
        indexed, unused = by_place(shards, config.layers)
        files = sorted({path / shards[name] for name in indexed.values()})
        if allow_missing:
            files = [file for file in files if _is_file(file)]
        promised = dict.fromkeys(indexed, f"{INDEX} names it")
    else:
        files = sorted(path.glob("*.safetensors"))
    if path.is_dir():
        promised |= _promised(config)
    if not files and not unused:
        raise FileNotFoundError(f"{OWNER}: {path} has no safetensors file with hyper-connections")
    tensors: dict[Place, Tensor] = {}
    for file in files:
        found, others = _in_file(file, config.layers)
        unused += others
        for place, tensor in found.items():
            if place in tensors:
                other = tensors[place].name
                raise ValueError(f"{OWNER}: {tensor.name} is there twice, as {other} too: {file}")
            tensors[place] = tensor
    return Stored(tensors, sorted(set(unused)), promised, str(path))


def _promised(config: Config) -> dict[Place, str]:
    layers = dict.fromkeys(
        layer_places(config.layers or 0), f"{config.file} counts {config.layers} layers"
    )
    head = dict.fromkeys(HEAD if config.has_head else [], f"{config.file} is of {WITH_HEAD}")
    return layers | head


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, every one of them a file below the index's folder.

    Only the names as written are checked. A symbolic link may lead anywhere: Hugging Face's cache
    consists of them.
    """
    shards: Any = _json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{OWNER}: {index} needs an object weight_map, from tensors to files")
    named = cast("dict[str, Any]", shards)
    if not all(isinstance(shard, str) for shard in named.values()):
        raise TypeError(f"{OWNER}: {index} needs the name of a file for each tensor in weight_map")
    for shard in sorted(set(named.values())):
        if not _is_below(shard):
            raise ValueError(
                f"{OWNER}: {index} names the file {shown(shard)}; needs one inside its folder"
            )
    return named


def _is_below(shard: str) -> bool:
    """Return whether a name leads below its folder, on any system."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return (
        bool(posix.name)
        and not (posix.is_absolute() or windows.drive or windows.root)
        and ".." not in posix.parts + windows.parts
    )


def _in_file(file: Path, layers: int | None) -> tuple[dict[Place, Tensor], list[str]]:
    """Return the tensors of a file, and the other names of hyper-connections."""
    if not _is_file(file):
        raise FileNotFoundError(f"{OWNER}: {shown(str(file))} is not there")
    with _errors_of(file):
        names: list[str] = _keys(file)
    placed, unused = by_place(names, layers)
    with _errors_of(file), _opened(file) as opened:
        slices = {place: (name, opened.get_slice(name)) for place, name in placed.items()}
        tensors = {place: _of_slice(file, *named) for place, named in slices.items()}
    return tensors, unused


def _keys(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())


def _of_slice(file: Path, name: str, part: Any) -> Tensor:
    def read() -> mx.array:
        with _errors_of(file), _opened(file) as opened:
            return from_host(opened.get_tensor(name))

    dtype = cast("str", part.get_dtype())
    return Tensor(shown(name), tuple(part.get_shape()), IN_FILES.get(dtype, dtype), read)


def _opened(file: Path) -> Any:
    """Open a file; safetensors asks NumPy for "bfloat16" by name, which ml_dtypes provides."""
    return safe_open(file, framework="numpy")


@contextmanager
def _errors_of(file: Path) -> Generator[None]:
    """Turn the various errors of safetensors and NumPy into one that names the file."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{OWNER}: {file} {_kind(file)}: {shown(str(error))}") from error


def _kind(file: Path) -> str:
    """Return a description of the usual mishaps with a file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64).lstrip()
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return "is only a pointer of Git LFS, and not the file (git lfs pull)"
    if start.startswith(b"<"):
        return "is a web page, and no safetensors file"
    return "cannot be read as safetensors"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name that no file can have
        return False


def _path(weights: Any) -> Path:
    if not isinstance(weights, (str, PathLike)):
        raise TypeError(
            f"{OWNER}: weights is a {type(weights).__name__}; needs a path, or a mapping from "
            "names to arrays"
        )
    path = Path(cast("str", weights))
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"{OWNER}: weights is no path: {error}") from error
    return path


# ---- config.json --------------------------------------------------------------------------------


def _json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content: Any = json.loads(file.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{OWNER}: {file} cannot be read as JSON: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{OWNER}: {file} needs an object, and has a {type(content).__name__}")
    return cast("dict[str, Any]", content)


def _config(path: Path | None) -> Config:
    """Read the ``config.json`` beside the weights, if there is one."""
    file = None if path is None else (path if path.is_dir() else path.parent) / "config.json"
    if file is None or not _is_file(file):
        return Config(None, {}, None, None, has_head=False)
    whole = _json(file)
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


def _field(file: Path | None, fields: Mapping[str, Any], name: str, check: checks.Check) -> Any:
    return check(f"{OWNER}: {file}", name, fields[name])


def _variant(config: Config) -> Variant:
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
