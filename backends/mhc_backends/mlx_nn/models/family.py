"""The declaration of a model family: which classes replace the library's, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from mhc_backends.acceleration import Swap

__all__ = ["Family", "Layers", "Swap"]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers, which pass pending streams to each other.

    Attributes
    ----------
    original
        The library's class.
    passing
        Our class for a layer whose successor accepts pending streams.
    writing
        Our class for a layer whose successor does not: it writes the streams.
    accepts_pending
        Whether a layer accepts pending streams; by default all do.
    why
        A sentence about our classes for the report.
    check
        As in :class:`Swap`.
    """

    original: type[Any]
    passing: type[Any]
    writing: type[Any]
    why: str
    accepts_pending: Callable[[Any], bool] | None = None
    check: Callable[[str, Any], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The replacements of a library's classes, for the models of one of its modules.

    Attributes
    ----------
    layers
        The layers.
    connections
        Replacements that :func:`accelerate` always makes.
    trainable
        Replacements that it makes with ``trainable=True``.
    untrained
        Modules that have no gradients even then, and why.
    left
        Modules that use streams and stay unchanged, and why.
    order
        The layers of a model, in the order in which they run.
    """

    layers: Layers
    connections: Mapping[type[Any], Swap]
    trainable: Mapping[type[Any], Swap]
    untrained: Mapping[type[Any], str]
    left: Mapping[type[Any], str]
    order: Callable[[Any], Sequence[Any]] = attrgetter("layers")
