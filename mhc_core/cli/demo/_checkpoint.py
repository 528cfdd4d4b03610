"""Checkpoints that are complete or absent, whenever the process ends.

A checkpoint is written beside the old one, flushed to the disk, and then moved into its place in
one step, so that a reader finds either the old or the new one, complete. The data's position is the
step's number: what a step draws depends on that and on the seed alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy

from mhc_core.cli.demo._settings import Settings

__all__ = ["Checkpoint", "CheckpointError", "load", "path", "save"]

FORMAT = "mhc-demo 1"  # another number where an old file would be misread
LONGEST = 300  # characters of an error that may quote the file
GROUPS = ("parameters", "first", "second", "history")

Arrays = dict[str, numpy.ndarray[Any, Any]]


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed from, for the reason in the message."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A training run after a number of steps.

    Attributes
    ----------
    step
        Steps that were taken; the next one has this number.
    parameters, first, second
        The model's arrays and the optimizer's two moments.
    history
        The records of every step.
    """

    step: int
    parameters: Arrays
    first: Arrays
    second: Arrays
    history: Arrays


def path(folder: Path, variant: str) -> Path:
    """Return the file of a variant."""
    return folder / f"{variant}.safetensors"


def save(file: Path, checkpoint: Checkpoint, settings: Settings, variant: str) -> None:
    """Replace the previous checkpoint with this one."""
    from safetensors.numpy import save as serialised

    arrays = {
        f"{group}/{name}": numpy.ascontiguousarray(array)
        for group in GROUPS
        for name, array in getattr(checkpoint, group).items()
    }
    about = {
        "format": FORMAT,
        "variant": variant,
        "step": str(checkpoint.step),
        "settings": json.dumps(asdict(settings)),
    }
    about["content"] = _content(about, arrays)
    beside = file.with_suffix(".partial")
    with beside.open("wb") as stream:
        stream.write(serialised(arrays, metadata=about))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, file)
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the new name to the disk too, where folders can be opened."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _content(about: Mapping[str, str], arrays: Mapping[str, Any]) -> str:
    """Return a digest of all that is stored: safetensors itself does not detect a flipped bit."""
    found = hashlib.sha256(json.dumps(sorted(about.items())).encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(arrays[name].tobytes())
    return found.hexdigest()


def load(file: Path, settings: Settings, variant: str) -> Checkpoint:
    """Load a checkpoint, which must be complete and have the same settings.

    The digest is checked before any content is interpreted.
    """
    about, arrays = _stored(file)
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no checkpoint of this version of mhc demo")
    if about.pop("content", None) != _content(about, arrays):
        raise CheckpointError(f"{file} is damaged: its numbers are not those that were saved")
    found = {**json.loads(about["settings"]), "variant": about["variant"]}
    _compare(file, found, {**asdict(settings), "variant": variant})
    groups: dict[str, Arrays] = {group: {} for group in GROUPS}
    for name, array in arrays.items():
        group, _, own = name.partition("/")
        groups[group][own] = array
    return Checkpoint(step=int(about["step"]), **groups)


def _stored(file: Path) -> tuple[dict[str, str], Arrays]:
    """Return the contents of a file."""
    safetensors: Any = import_module("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as stored:
            about: dict[str, str] = stored.metadata() or {}
            names: list[str] = stored.keys()
            return about, {name: stored.get_tensor(name) for name in names}
    # A damaged header may name a dtype that NumPy lacks (AttributeError, TypeError), or a shape
    # that it refuses; safetensors says neither which errors it raises nor that these are all.
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read: {str(error)[:LONGEST]}") from None


def _compare(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise if the settings differ, and name the differences."""
    differ = [name for name in wanted if found.get(name) != wanted[name]]
    if differ:
        words = ", ".join(f"{n} {_short(found.get(n))} and not {_short(wanted[n])}" for n in differ)
        raise CheckpointError(
            f"{file} has other settings: {words}; use the same ones, or another --out"
        )


def _short(value: Any) -> str:
    return f"{value:.12}..." if isinstance(value, str) and len(value) > 24 else str(value)
