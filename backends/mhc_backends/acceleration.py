"""The common part of ``accelerate`` in every library: how a swap is declared, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["AccelerationReport", "Note", "Planned", "Swap", "natural", "swap_classes"]


class Swap(NamedTuple):
    """The subclass that replaces a library's class, and a sentence about it for the report."""

    cls: type[Any]
    why: str
    check: Callable[[str, Any], None] | None = None  # raises for an instance that it cannot replace
    freeze: tuple[str, ...] = ()  # parameters that cannot be trained


class Note(NamedTuple):
    """A module's path, the name of its class, and what was done with it, or why nothing was."""

    path: str
    class_name: str
    text: str


class AccelerationReport(NamedTuple):
    """The modules that :func:`accelerate` replaced and left; its text has a line per class."""

    replaced: tuple[Note, ...]
    left: tuple[Note, ...]

    def __str__(self) -> str:
        return "\n".join([*_lines("replaced", self.replaced), *_lines("left", self.left)])


def _lines(title: str, notes: tuple[Note, ...]) -> Iterator[str]:
    yield f"{title}: {len(notes)}"
    first = {note[1:]: note.path for note in reversed(notes)}
    for (name, text), count in Counter(note[1:] for note in notes).items():
        yield f"  {count} {name}, {first[name, text]}{' ...' * (count > 1)}: {text}"


def natural(path: str) -> list[str]:
    """Return a key that sorts layers 2 and 10 by number."""
    return [part.zfill(6) for part in path.split(".")]


class Planned(NamedTuple):
    """A module whose class changes."""

    path: str
    module: Any
    before: type[Any]
    swap: Swap

    @property
    def note(self) -> Note:
        """Return the report's note of the change."""
        return Note(self.path, self.before.__name__, self.swap.why)


def swap_classes(plan: list[Planned]) -> None:
    """Change all classes, or none if one fails."""
    try:
        for planned in plan:
            planned.module.__class__ = planned.swap.cls
    except TypeError:
        for planned in plan:
            planned.module.__class__ = planned.before
        raise
