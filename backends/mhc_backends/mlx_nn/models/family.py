"""The declaration of a model family: which class replaces which, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Family", "Layers", "Swap"]


class Swap(NamedTuple):
    """A subclass for the instances of a library's class, and a sentence about it."""

    by: type[Any]
    why: str
    check: Callable[[str, Any], None] | None = None  # raises for an instance that will not do
    freeze: tuple[str, ...] = ()  # parameters that cannot be trained


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers, which pass pending streams to each other.

    Attributes
    ----------
    kind
        The library's class.
    passing, writing
        Our class for a layer whose successor accepts pending streams, and for one that writes the
        streams because its successor does not.
    takes_pending
        Whether a layer may be such a successor; all may, unless it is given.
    why
        A sentence about ours.
    check
        As in :class:`Swap`.
    """

    kind: type[Any]
    passing: type[Any]
    writing: type[Any]
    why: str
    takes_pending: Callable[[Any], bool] | None = None
    check: Callable[[str, Any], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to accelerate the models of one module of one library, by the library's classes.

    Attributes
    ----------
    layers
        The layers.
    connections
        Modules that are swapped always.
    trainable
        Modules that are swapped for training.
    untrained
        Modules that training leaves without gradients, and why.
    left
        Modules with streams that stay as they are, and why.
    """

    layers: Layers
    connections: Mapping[type[Any], Swap]
    trainable: Mapping[type[Any], Swap]
    untrained: Mapping[type[Any], str]
    left: Mapping[type[Any], str]
