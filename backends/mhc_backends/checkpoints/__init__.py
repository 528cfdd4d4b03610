"""The hyper-connections of released checkpoints, read for any array library.

A library's ``load_hyper_connections`` tells :func:`read` how to make its arrays and which
parameters a model has. What a checkpoint must contain, and every error, is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from mhc_backends.checkpoints.config import Config, eps_of, read_config, variant_of
from mhc_backends.checkpoints.families import BY_TYPE, DEEPSEEK, HUNYUAN, Family
from mhc_backends.checkpoints.names import (
    OWNER,
    QUANTISED,
    SUBLAYERS,
    Key,
    family_of,
    gated_name,
    head_keys,
    layer_keys,
    model_key,
    printable,
)
from mhc_backends.checkpoints.quantised import Packing, dequantised, parts, unpacked
from mhc_backends.checkpoints.sources import (
    DTYPES,
    INTEGERS,
    Checkpoint,
    Tensor,
    checked_path,
    from_files,
    from_mapping,
)
from mhc_backends.nn_common import names_of
from mhc_core import checks
from mhc_core.variants import Variant, check_variant

__all__ = ["Gated", "Library", "Options", "Read", "keys_of_stack", "read"]

_LISTED = 8  # names in an error

Named = Iterable[tuple[str, tuple[int, ...], Key | None]]


class Options(NamedTuple):
    """The options of ``load_hyper_connections`` in every library."""

    variant: Variant | None
    allow_unused: bool
    allow_missing: bool


class Gated(NamedTuple):
    """The sizes and the constant of a gated residual: the rank of its gates and norm_eps."""

    rank: int
    eps: float


class Read(NamedTuple):
    """The hyper-connections of a checkpoint: arrays of the caller's library.

    They are float32, and those of a gated residual in their own dtype, where a library keeps what
    is quantised, with its parts. ``targets`` has the names of a model's parameters, if a model was
    given. Of ``variant`` and ``gated`` one is None.
    """

    arrays: Mapping[Key, Any]
    targets: Mapping[Key, str]
    n: int
    dims: int
    family: Family
    variant: Variant | None
    gated: Gated | None

    def layers(self, made: Callable[[dict[str, Any]], Any]) -> list[list[Any]]:
        """Return what ``made`` makes of each connection's arrays: attention and MLP by layer.

        It gets them by the names that they have in this library's modules.
        """
        count = 1 + max(key.layer for key in self.arrays)
        names = self.family.layer_parameters
        return [[made(self._of(k, one, names)) for one in SUBLAYERS] for k in range(count)]

    def head(self, made: Callable[[dict[str, Any]], Any]) -> Any:
        """Return what ``made`` makes of the head's arrays, or None if there is no head."""
        names = self.family.head_parameters
        found = Key(-1, "head", names[0]) in self.arrays
        return made(self._of(-1, "head", names)) if found else None

    def _of(self, layer: int, sublayer: str, names: tuple[str, ...]) -> dict[str, Any]:
        own = gated_name if self.variant is None else _names(self.variant).__getitem__
        keys = [Key(layer, sublayer, name) for name in names]
        keys += [key.beside(part) for key in keys for part in QUANTISED]
        return {own(key.parameter): self.arrays[key] for key in keys if key in self.arrays}


def _names(variant: Variant) -> dict[str, str]:
    """Return the names of a connection's parameters in this library's modules."""
    return dict(zip(("fn", "scale", "base"), names_of(variant), strict=True))


class Library(NamedTuple):
    """The operations of an array library that the reader needs.

    Attributes
    ----------
    float32
        Makes a float32 array from one of NumPy, or from its own, of any dtype in ``DTYPES``.
    is_finite
        Whether all numbers of its float32 array are finite.
    cast
        Converts its float32 array to the dtype of a name in ``DTYPES``.
    own
        The type of its own arrays, if they are to be taken as they are, not by way of NumPy.
    integers
        Makes an array of unsigned integers; None if the library's modules have no quantised
        matrices, so that those of a checkpoint are dequantised.
    """

    float32: Callable[[Any], Any]
    is_finite: Callable[[Any], bool]
    cast: Callable[[Any, str], Any]
    own: type[Any] | tuple[()] = ()
    integers: Callable[[Any], Any] | None = None


def read(
    library: Library,
    weights: Any,
    options: Options,
    parameters: Callable[[Family], Named] | None = None,
) -> Read:
    """Read a checkpoint, and check everything of it before a caller assigns anything.

    Parameters
    ----------
    library
        The library that the arrays are for.
    weights, options
        As ``load_hyper_connections`` received them.
    parameters
        Returns the name, shape and key of every parameter of the model to load into, for a family;
        the key may be None if the name tells it.
    """
    for name in ("allow_unused", "allow_missing"):
        checks.boolean(OWNER, name, getattr(options, name))
    path = None if isinstance(weights, Mapping) else checked_path(weights)
    config = read_config(path)
    if options.variant is not None:
        check_variant(OWNER, "variant", options.variant)
    if path is None:
        checkpoint = from_mapping(cast("Mapping[Any, Any]", weights))
    else:
        checkpoint = from_files(path, config, options.allow_missing)
    family = config.family or _family_by_names(config, checkpoint, options)
    constants = _constants(config, family, options.variant)
    checkpoint = _of_family(checkpoint, family)
    if path is not None and path.is_dir():
        checkpoint.promised.update(_promised(config, family))
    stored = _complete(checkpoint, family, options)
    tensors, packings = unpacked(stored)
    n, dims, rank = _checked_sizes(tensors, family, config)
    found = None if parameters is None else _in_model(parameters(family), family)
    kept = {
        key: parts(key, packing, stored)
        for key, packing in packings.items()
        if library.integers and (found is None or key.beside("scales") in found)
    }
    for own in kept.values():
        tensors.update(own)
    targets = {} if found is None else _targets(found, tensors, options.allow_missing)
    arrays: dict[Key, Any] = {}
    for key, tensor in tensors.items():
        if key in packings and key not in kept:
            own = parts(key, packings[key], stored)
            tensor = tensor._replace(read=_dequantised(library, packings[key], own), own=None)
        arrays[key] = _read(library, family, tensor)
    variant = constants if isinstance(constants, Variant) else None
    gated = None if isinstance(constants, Variant) else Gated(rank, constants)
    return Read(arrays, targets, n, dims, family, variant, gated)


def _dequantised(
    library: Library, packing: Packing, stored: Mapping[Key, Tensor]
) -> Callable[[], Any]:
    """Return what reads a quantised matrix in its own shape, after checking its parts."""
    for part in stored.values():
        if part.dtype in DTYPES.values():
            _float32(library, part)

    def read() -> Any:
        return dequantised(packing, *(part.read() for part in stored.values()))

    return read


def _read(library: Library, family: Family, tensor: Tensor) -> Any:
    if library.integers and tensor.dtype in INTEGERS.values():
        return library.integers(_given(library, tensor))
    array = _float32(library, tensor)
    return array if family.variant else library.cast(array, tensor.dtype)


def _float32(library: Library, tensor: Tensor) -> Any:
    array = library.float32(_given(library, tensor))
    if not library.is_finite(array):
        raise ValueError(f"{OWNER}: {tensor.name} holds NaN or infinity")
    return array


def _given(library: Library, tensor: Tensor) -> Any:
    return tensor.own if isinstance(tensor.own, library.own) else tensor.read()


def keys_of_stack(path: str, blocks: int, family: Family) -> dict[str, Key]:
    """Return the keys of a stack's parameters: attention and MLP alternate, then the head."""
    if family.variant is None:
        return {}  # a stack has no gated residuals
    start = f"{path}." if path else ""
    keys: dict[str, Key] = {}
    for name, own in _names(family.variant).items():
        for k in range(blocks):
            key = Key(k // 2, SUBLAYERS[k % 2], name)
            keys[f"{start}blocks.{k}.connection.{own}"] = key
        keys[f"{start}head.{own}"] = Key(-1, "head", name)
    return keys


# ---- the family ---------------------------------------------------------------------------------


def _family_by_names(config: Config, checkpoint: Checkpoint, options: Options) -> Family:
    """Return the family that names and shapes tell: DeepSeek-V4 if they tell no other."""
    if config.model_type is not None and options.variant is None:
        raise ValueError(
            f"{OWNER}: {config.file} has model_type {printable(config.model_type)}, whose "
            f"hyper-connections are not known (known are {', '.join(BY_TYPE)}); give their variant="
        )
    layers = {key: one for key, one in checkpoint.tensors.items() if not key.is_head}
    telling = (layers or checkpoint.tensors).values()
    found = {family_of(tensor.name): tensor.name for tensor in telling}
    if len(found) > 1:
        raise ValueError(
            f"{OWNER}: {' and '.join(list(found.values())[:2])} are names of different families of "
            "models; needs those of one"
        )
    family = next(iter(found), None)
    scales = [one.shape for key, one in layers.items() if key.parameter == "scale"]
    if family is None and scales and set(scales) == {(2,)}:
        return HUNYUAN  # under the names that transformers gives its modules
    return family or DEEPSEEK


def _constants(config: Config, family: Family, variant: Variant | None) -> Variant | float:
    """Return the variant of the modules, or the eps of gated residuals."""
    own = family.variant
    if own is None:
        if variant is not None:
            raise ValueError(
                f"{OWNER}: variant is {variant}; {family.title} has gated residuals, without one"
            )
        return eps_of(config)
    if variant is None:
        return variant_of(config, family)
    if (variant.mixer, variant.res_transposed) != (own.mixer, own.res_transposed):
        raise ValueError(
            f"{OWNER}: variant is {variant}; checkpoints of {family.title} need one with "
            f"res_transposed={own.res_transposed} and mixer={own.mixer!r}"
        )
    return variant


def _of_family(checkpoint: Checkpoint, family: Family) -> Checkpoint:
    """Return the checkpoint in which tensors that the family does not have are unsupported."""
    names = {False: family.layer_parameters, True: family.head_parameters if family.head else ()}
    tensors: dict[Key, Tensor] = {}
    unsupported = list(checkpoint.unsupported)
    for key, tensor in checkpoint.tensors.items():
        if key.whole in names[key.is_head]:
            tensors[key] = tensor
        else:
            unsupported.append(tensor.name)
    promised = {
        key: clause
        for key, clause in checkpoint.promised.items()
        if key.whole in names[key.is_head]
    }
    return Checkpoint(tensors, sorted(unsupported), promised, checkpoint.where)


def _promised(config: Config, family: Family) -> dict[Key, str]:
    """Return the tensors that ``config.json`` says are there."""
    layers = dict.fromkeys(
        layer_keys(config.layers or 0, family),
        f"{config.file} has num_hidden_layers={config.layers}",
    )
    head = dict.fromkeys(
        head_keys(family) if config.family and family.head else [],
        f"{config.file} has model_type {config.model_type}, which has a head",
    )
    return layers | head


# ---- what must be present -----------------------------------------------------------------------


def _complete(checkpoint: Checkpoint, family: Family, options: Options) -> dict[Key, Tensor]:
    """Return the tensors in order; every layer up to the last, and a head, must be complete."""
    tensors, where = checkpoint.tensors, checkpoint.where
    if checkpoint.unsupported and not options.allow_unused:
        raise ValueError(
            f"{OWNER}: {_listed(checkpoint.unsupported)} in {where}: named like hyper-connections, "
            "but in no supported form; rename them, or ignore them with allow_unused=True"
        )
    if not tensors:
        example = next(iter(layer_keys(1, family)))
        raise ValueError(f"{OWNER}: no tensor in {where} has a name such as {example}")
    needed = layer_keys(1 + max(key.layer for key in tensors), family)
    if any(key.is_head for key in tensors):
        needed += head_keys(family)
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
    beside = [key for key in tensors if key.part]
    return {key: tensors[key] for key in (*needed, *beside)}


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


def _checked_sizes(
    tensors: Mapping[Key, Tensor], family: Family, config: Config
) -> tuple[int, int, int]:
    """Return n, dims and the gates' rank, and check every shape and dtype.

    All tensors must share n, dims and the rank, which is 0 without gates.
    """
    n, first = _streams(tensors, family)
    columns, rank = first.shape[1], 0
    if config.n not in (None, n):
        raise ValueError(f"{OWNER}: {first.name} has {n} streams; config.json has {config.n}")
    if family.variant is None:
        rank = _rank(tensors)
        layer = {"norm": (columns,), "down": (rank, columns), "up": (columns, rank)}
        head, layer = layer, {**layer, "inject": (n, columns)}
    else:
        m, scales = family.variant.columns(n), family.variant.parts(n)
        layer = {"fn": (m, columns), "base": (m,), "scale": (scales,)}
        head = {"fn": (n, columns), "base": (n,), "scale": (1,)}
    for key, tensor in tensors.items():
        need = (head if key.is_head else layer)[key.parameter]
        if tensor.shape != need:
            sizes = f"n={n} and dims={columns // n}"
            raise ValueError(
                f"{OWNER}: {tensor.name} has shape {tensor.shape}; needs {need}, as {first.name} "
                f"has {sizes}"
            )
        if tensor.dtype not in DTYPES.values():
            raise TypeError(
                f"{OWNER}: {tensor.name} has dtype {tensor.dtype}; needs "
                f"{', '.join(DTYPES.values())}"
            )
    return n, columns // n, rank


def _streams(tensors: Mapping[Key, Tensor], family: Family) -> tuple[int, Tensor]:
    """Return n, and the tensor whose shape tells it: the first fn or inject."""
    first = next((tensor for key, tensor in tensors.items() if key.parameter in _TELLS_N), None)
    if first is None:  # a gated head alone
        names = ", ".join(tensor.name for tensor in tensors.values())
        raise ValueError(f"{OWNER}: {names} do not tell the number of streams; needs a layer")
    shape = first.shape
    if len(shape) == 2 and shape[0] and shape[1]:
        n = _from_rows(shape[0], family)
        if n and shape[1] % n == 0:
            return n, first
    rows = {None: "n", "identity": "2 n"}.get(
        family.variant and family.variant.mixer, "n * n + 2 n"
    )
    raise ValueError(
        f"{OWNER}: {first.name} has shape {shape}; needs ({rows}, n * dims) for n streams"
    )


_TELLS_N = ("fn", "inject")


def _from_rows(rows: int, family: Family) -> int | None:
    """Return the n for which a connection has so many rows, if there is one."""
    if family.variant is None:
        return rows
    n = math.isqrt(rows + 1) - 1 if family.variant.mixes else rows // 2
    return n if n >= 1 and family.variant.columns(n) == rows else None


def _rank(tensors: Mapping[Key, Tensor]) -> int:
    down = next(tensor for key, tensor in tensors.items() if key.parameter == "down")
    if len(down.shape) != 2 or not down.shape[0]:
        raise ValueError(
            f"{OWNER}: {down.name} has shape {down.shape}; needs (rank, n * dims) for n streams"
        )
    return down.shape[0]


# ---- the model ----------------------------------------------------------------------------------


def _in_model(parameters: Named, family: Family) -> dict[Key, tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a model's hyper-connections."""
    found: dict[Key, tuple[str, tuple[int, ...]]] = {}
    for name, shape, known in parameters:
        key = known or model_key(name, family)
        if key is None:
            continue
        if key in found:
            raise ValueError(f"{OWNER}: the model has {found[key][0]} and {name} for one tensor")
        found[key] = name, shape
    return found


def _targets(
    found: Mapping[Key, tuple[str, tuple[int, ...]]],
    tensors: Mapping[Key, Tensor],
    allow_missing: bool,
) -> dict[Key, str]:
    """Return the model's parameter for every tensor, after checking that the shapes agree."""
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
