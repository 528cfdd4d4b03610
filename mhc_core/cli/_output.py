"""Standard output that may be closed, full or a pipe that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

__all__ = ["Output", "UnwritableError", "output", "writes_files"]


class UnwritableError(OSError):
    """Standard output cannot be written: ``strerror`` says why."""


class Output:
    """A stream that remembers the error of the first write that failed, and writes no more.

    ``goes_on`` says whether the command has other work, such as a file to write; else that write
    raises :class:`UnwritableError`, or BrokenPipeError.
    """

    def __init__(self, stream: Any) -> None:
        self.error: OSError | None = None
        self.goes_on = False
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, if that can be done."""
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        """Write what is still in memory, if that can be done."""
        self._try(self._stream.flush)

    def _try(self, work: Any, *arguments: Any) -> Any:
        if self.error is not None:
            return None
        try:
            return work(*arguments)
        except OSError as error:
            self.error = error
            _leave(self._stream)
            if self.goes_on:
                return None
            if isinstance(error, BrokenPipeError):
                raise
            raise UnwritableError(error.errno, error.strerror) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leave(stream: Any) -> None:
    """Let a stream write nowhere: Python would write the rest of it at exit, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def output() -> Generator[Output]:
    """Have an :class:`Output` in place of ``sys.stdout``, and of ``sys.stderr``.

    A closed stream writes nowhere, and nothing ends because stderr cannot be written.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        nowhere = None
        if any(stream is None for stream in cast("tuple[Any, ...]", before)):
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        made, said = Output(before[0] or nowhere), Output(before[1] or nowhere)
        said.goes_on = True
        sys.stdout, sys.stderr = cast("Any", made), cast("Any", said)
        try:
            yield made
        finally:
            said.flush()
            sys.stdout, sys.stderr = before


def writes_files(parameters: Sequence[Any], given: Mapping[str, Any]) -> bool:
    """Return whether a command was given a file or a folder by any of its parameters.

    Old releases of typer have the kind of a parameter and make paths of texts later; new ones have
    the paths.
    """
    for one in parameters:
        value = given.get(one.name)
        several = cast("Sequence[Any]", value if isinstance(value, (list, tuple)) else [value])
        is_path = getattr(getattr(one, "type", None), "name", "") == "path"
        if any(isinstance(path, Path) or (is_path and path is not None) for path in several):
            return True
    return False
