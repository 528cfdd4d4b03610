"""The hyper-connections of DeepSeek-V4 and V4.1 checkpoints, read for any array library.

A library's ``load_hyper_connections`` tells :func:`read` how to make its arrays and which
parameters a model has. What a checkpoint must contain, and every error, is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from mhc_backends.checkpoints.config import read_config, variant_of
from mhc_backends.checkpoints.names import (
    HEAD,
    OWNER,
    PARAMETERS,
    SUBLAYERS,
    Key,
    layer_keys,
    model_key,
    printable,
)
from mhc_backends.checkpoints.sources import (
    DTYPES,
    Checkpoint,
    Tensor,
    checked_path,
    from_files,
    from_mapping,
)
from mhc_core import checks
from mhc_core.variants import Variant, check_variant

__all__ = ["Library", "Options", "Read", "keys_of_stack", "read"]

_LISTED = 8  # names in an error

Named = Iterable[tuple[str, tuple[int, ...], Key | None]]


class Options(NamedTuple):
    """The options of ``load_hyper_connections`` in every library."""

    variant: Variant | None
    allow_unused: bool
    allow_missing: bool


class Read(NamedTuple):
    """The hyper-connections of a checkpoint: float32 arrays of the caller's library.

    ``targets`` has the names of a model's parameters, if a model was given.
    """

    arrays: Mapping[Key, Any]
    targets: Mapping[Key, str]
    n: int
    dims: int
    variant: Variant

    def layers(self, made: Callable[[dict[str, Any]], Any]) -> list[list[Any]]:
        """Return what ``made`` makes of each connection's arrays: attention and MLP by layer."""
        count = 1 + max(key.layer for key in self.arrays)
        return [[made(self._of(k, one)) for one in SUBLAYERS] for k in range(count)]

    def head(self, made: Callable[[dict[str, Any]], Any]) -> Any:
        """Return what ``made`` makes of the head's arrays, or None if there is no head."""
        return made(self._of(-1, "head")) if HEAD[0] in self.arrays else None

    def _of(self, layer: int, sublayer: str) -> dict[str, Any]:
        return {name: self.arrays[Key(layer, sublayer, name)] for name in PARAMETERS}


class Library(NamedTuple):
    """The operations of an array library that the reader needs.

    Attributes
    ----------
    float32
        Makes a float32 array from one of NumPy, or from its own, of any dtype in ``DTYPES``.
    is_finite
        Whether all numbers of its float32 array are finite.
    own
        The type of its own arrays, if they are to be taken as they are, not by way of NumPy.
    """

    float32: Callable[[Any], Any]
    is_finite: Callable[[Any], bool]
    own: type[Any] | tuple[()] = ()


def read(
    library: Library,
    weights: Any,
    options: Options,
    parameters: Callable[[], Named] | None = None,
) -> Read:
    """Read a checkpoint, and check everything of it before a caller assigns anything.

    Parameters
    ----------
    library
        The library that the arrays are for.
    weights, options
        As ``load_hyper_connections`` received them.
    parameters
        The name, shape and key of every parameter of the model to load into, where the key may be
        None if the name tells it.
    """
    variant = options.variant
    for name in ("allow_unused", "allow_missing"):
        checks.boolean(OWNER, name, getattr(options, name))
    path = None if isinstance(weights, Mapping) else checked_path(weights)
    config = read_config(path)
    variant = variant_of(config) if variant is None else check_variant(OWNER, "variant", variant)
    if not variant.res_transposed:
        raise ValueError(
            f"{OWNER}: variant is {variant}; checkpoints need one with res_transposed=True"
        )
    if path is None:
        checkpoint = from_mapping(cast("Mapping[Any, Any]", weights))
    else:
        checkpoint = from_files(path, config, options.allow_missing)
    tensors = _complete(checkpoint, options)
    n, dims = _checked_sizes(tensors, config.n)
    targets: dict[Key, str] = {}
    if parameters is not None:
        targets = _targets(parameters(), tensors, options.allow_missing)
    arrays = {key: _read(library, tensor) for key, tensor in tensors.items()}
    return Read(arrays, targets, n, dims, variant)


def _read(library: Library, tensor: Tensor) -> Any:
    own = isinstance(tensor.own, library.own)
    array = library.float32(tensor.own if own else tensor.read())
    if not library.is_finite(array):
        raise ValueError(f"{OWNER}: {tensor.name} holds NaN or infinity")
    return array


def keys_of_stack(path: str, blocks: int) -> dict[str, Key]:
    """Return the keys of a stack's parameters: attention and MLP alternate, then the head."""
    start = f"{path}." if path else ""
    keys: dict[str, Key] = {}
    for name in PARAMETERS:
        for k in range(blocks):
            key = Key(k // 2, SUBLAYERS[k % 2], name)
            keys[f"{start}blocks.{k}.connection.{name}"] = key
        keys[f"{start}head.{name}"] = Key(-1, "head", name)
    return keys


# ---- what must be present -----------------------------------------------------------------------


def _complete(checkpoint: Checkpoint, options: Options) -> dict[Key, Tensor]:
    """Return the tensors in order; every layer up to the last, and a head, must be complete."""
    tensors, where = checkpoint.tensors, checkpoint.where
    if checkpoint.unsupported and not options.allow_unused:
        raise ValueError(
            f"{OWNER}: {_listed(checkpoint.unsupported)} in {where}: named like hyper-connections, "
            "but in no supported form; rename them, or ignore them with allow_unused=True"
        )
    if not tensors:
        raise ValueError(f"{OWNER}: no tensor in {where} has a name such as layers.0.hc_attn_fn")
    needed = layer_keys(1 + max(key.layer for key in tensors))
    if any(key.sublayer == "head" for key in tensors):
        needed += HEAD
    if not options.allow_missing:
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


# ---- the model ----------------------------------------------------------------------------------


def _targets(
    parameters: Named, tensors: Mapping[Key, Tensor], allow_missing: bool
) -> dict[Key, str]:
    """Return the model's parameter for every tensor, after checking that the shapes agree."""
    found: dict[Key, tuple[str, tuple[int, ...]]] = {}
    for name, shape, known in parameters:
        key = known or model_key(name)
        if key is None:
            continue
        if key in found:
            raise ValueError(f"{OWNER}: the model has {found[key][0]} and {name} for one tensor")
        found[key] = name, shape
    for key, (name, _) in found.items():
        if key not in tensors and not allow_missing:
            raise ValueError(f"{OWNER}: {key} is missing; the model needs it for {name}")
    for key, tensor in tensors.items():
        if key not in found:
            raise ValueError(f"{OWNER}: the model has no parameter for {tensor.name}")
        name, shape = found[key]
        if shape != tensor.shape:
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; {name} needs {shape}"
            )
    return {key: name for key, (name, _) in found.items()}
