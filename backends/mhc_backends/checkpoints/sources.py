"""Where the tensors of a checkpoint come from: a mapping, a file, or a folder of files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, cast

import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]
from numpy import ndarray
from safetensors import safe_open

from mhc_backends.checkpoints.config import Config, is_file, read_json
from mhc_backends.checkpoints.names import OWNER, Key, by_key, printable
from mhc_backends.mlx_common import to_host

__all__ = ["DTYPES", "Checkpoint", "Tensor", "checked_path", "from_files", "from_mapping"]

INDEX = "model.safetensors.index.json"
# By their names in safetensors:
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INTEGERS = {"U32": "uint32", "U8": "uint8"}  # of quantised matrices


class Tensor(NamedTuple):
    """A tensor that has not been read yet.

    Attributes
    ----------
    name, shape, dtype
        What is known of it without reading it.
    read
        Reads it, as an array of NumPy.
    own
        The array itself, if it is one already.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], ndarray[Any, Any]]
    own: Any = None


class Checkpoint(NamedTuple):
    """The hyper-connections of a checkpoint, before anything of them is read.

    Attributes
    ----------
    tensors
        The tensors whose names have a supported form.
    unsupported
        Other names that look like hyper-connections.
    promised
        The tensors that the index says are there, each with a clause that says so.
    where
        The source, for errors.
    """

    tensors: dict[Key, Tensor]
    unsupported: list[str]
    promised: dict[Key, str]
    where: str


def checked_path(weights: Any) -> Path:
    """Return weights as a path; raise if it cannot be one."""
    if not isinstance(weights, (str, PathLike)):
        raise TypeError(
            f"{OWNER}: weights is a {type(weights).__name__}; needs a path, or a mapping from "
            "names to arrays"
        )
    path = Path(cast("str", weights))
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise ValueError(f"{OWNER}: weights is not a valid path: {error}") from error
    return path


# ---- mappings -----------------------------------------------------------------------------------


def from_mapping(weights: Mapping[Any, Any]) -> Checkpoint:
    """Return the checkpoint in a mapping from names to arrays."""
    for name in weights:
        if not isinstance(name, str):
            raise TypeError(f"{OWNER}: a name is a {type(name).__name__}; needs strings")
    names, unsupported = by_key(weights, None)
    tensors = {key: _of_array(name, weights[name]) for key, name in names.items()}
    return Checkpoint(tensors, unsupported, {}, "the mapping")


def _of_array(name: str, array: Any) -> Tensor:
    label = printable(name)
    for kind, to_numpy in _TO_NUMPY.items():
        if _is_a(kind, array):
            dtype = str(array.dtype).rpartition(".")[-1]
            return Tensor(label, tuple(array.shape), dtype, partial(to_numpy, label, array), array)
    *others, last = _TO_NUMPY
    raise TypeError(
        f"{OWNER}: {label} is a {type(array).__name__}; needs a {', '.join(others)} or {last}"
    )


def _is_a(kind: str, array: Any) -> bool:
    """Return whether it is an array of a library; whoever made one has imported the library."""
    module, _, name = kind.rpartition(".")
    library = sys.modules.get(module)
    return library is not None and isinstance(array, getattr(library, name))


def _from_torch(label: str, tensor: Any) -> ndarray[Any, Any]:
    """Convert a tensor from any device, floats by way of float32, since NumPy has no bfloat16."""
    try:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        wide = whole.detach().float() if whole.is_floating_point() else whole
        return wide.numpy(force=True)
    except Exception as error:  # a tensor without values: on the device meta, or traced
        raise ValueError(f"{OWNER}: {label} cannot be read: {error}") from error


def _from_mlx(label: str, array: Any) -> ndarray[Any, Any]:
    return to_host(array)


def _from_numpy(label: str, array: ndarray[Any, Any]) -> ndarray[Any, Any]:
    return array


_TO_NUMPY: dict[str, Callable[[str, Any], ndarray[Any, Any]]] = {
    "mlx.core.array": _from_mlx,
    "numpy.ndarray": _from_numpy,
    "torch.Tensor": _from_torch,
}


# ---- folders and files --------------------------------------------------------------------------


def from_files(path: Path, config: Config, allow_missing: bool) -> Checkpoint:
    """Return the checkpoint in a file or a folder; of its files, only headers are read."""
    promised: dict[Key, str] = {}
    unsupported: list[str] = []
    if not path.is_dir():
        files = [path]
    elif is_file(path / INDEX):
        shards = _weight_map(path / INDEX)
        indexed, unsupported = by_key(shards, config.layers)
        files = sorted({path / shards[name] for name in indexed.values()})
        if allow_missing:
            files = [file for file in files if is_file(file)]
        promised = dict.fromkeys(indexed, f"{INDEX} lists it")
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files and not unsupported:
        raise FileNotFoundError(f"{OWNER}: {path} has no safetensors file with hyper-connections")
    tensors: dict[Key, Tensor] = {}
    for file in files:
        found, others = _in_file(file, config.layers)
        unsupported += others
        for key, tensor in found.items():
            if key in tensors:
                raise ValueError(f"{OWNER}: {tensor.name} in {file} duplicates {tensors[key].name}")
            tensors[key] = tensor
    return Checkpoint(tensors, sorted(set(unsupported)), promised, str(path))


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of each tensor, after checking that each name stays in the index's folder.

    Only names are checked. A symbolic link may lead anywhere: Hugging Face's cache consists of
    them.
    """
    shards: Any = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{OWNER}: {index} needs an object weight_map, from tensors to files")
    named = cast("dict[str, Any]", shards)
    if not all(isinstance(shard, str) for shard in named.values()):
        raise TypeError(f"{OWNER}: {index} needs the name of a file for each tensor in weight_map")
    for shard in sorted(set(named.values())):
        if not _is_below(shard):
            raise ValueError(
                f"{OWNER}: {index} names the file {printable(shard)}; needs one inside its folder"
            )
    return named


def _is_below(shard: str) -> bool:
    """Return whether a name leads to a file below its folder, on any system."""
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return (
        bool(posix.name)
        and not (posix.is_absolute() or windows.drive or windows.root)
        and ".." not in posix.parts + windows.parts
    )


def _in_file(file: Path, layers: int | None) -> tuple[dict[Key, Tensor], list[str]]:
    """Return the tensors of a file, and the unsupported names."""
    if not is_file(file):
        raise FileNotFoundError(f"{OWNER}: {printable(str(file))} does not exist")
    with _errors_of(file):
        stored: list[str] = _stored_names(file)
    names, unsupported = by_key(stored, layers)
    with _errors_of(file), open_safetensors(file) as opened:
        slices = {key: (name, opened.get_slice(name)) for key, name in names.items()}
        tensors = {key: _of_slice(file, *named) for key, named in slices.items()}
    return tensors, unsupported


def _stored_names(file: Path) -> list[str]:
    with open_safetensors(file) as opened:
        return list(opened.keys())


def _of_slice(file: Path, name: str, part: Any) -> Tensor:
    def read() -> ndarray[Any, Any]:
        with _errors_of(file), open_safetensors(file) as opened:
            return opened.get_tensor(name)

    dtype = cast("str", part.get_dtype())
    return Tensor(printable(name), tuple(part.get_shape()), _NAMES.get(dtype, dtype), read)


_NAMES = DTYPES | INTEGERS


def open_safetensors(file: Path) -> Any:
    """Open a file; safetensors asks NumPy for "bfloat16" by name, which ml_dtypes provides."""
    return safe_open(file, framework="numpy")


@contextmanager
def _errors_of(file: Path) -> Generator[None]:
    """Turn the various errors of safetensors and NumPy into one that names the file."""
    try:
        yield
    except Exception as error:
        problem = printable(str(error))
        raise ValueError(f"{OWNER}: {file} {_diagnosis(file)}: {problem}") from error


def _diagnosis(file: Path) -> str:
    """Return why a file cannot be read, for the usual mistakes."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64).lstrip()
    except OSError:
        start = b""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (run git lfs pull)"
    if start.startswith(b"<"):
        return "is a web page, not a safetensors file"
    return "cannot be read as safetensors"
