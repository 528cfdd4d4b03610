"""Output to the screen: text from outside is shown literally, whatever it contains.

Names of backends, reasons and errors come from other people's plugins. None of it is read as
markup, moves the cursor or breaks a table.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mhc_core.text import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["console", "progress", "say", "text"]

WIDTH = 100  # columns where the output is no terminal


def text(value: Any, style: str = "") -> Text:
    """Return text for a table or a console, without any markup."""
    from rich.text import Text

    return Text(plain(value), style=style)


def console(width: int = WIDTH) -> Console:
    """Return a console for the screen, or one of fixed width if the output goes elsewhere."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def say(value: Any, style: str = "") -> None:
    """Print a line unchanged; the terminal wraps it."""
    console().print(text(value, style), soft_wrap=True)


@contextmanager
def progress(width: int, *more: Any, **options: Any) -> Generator[Any]:
    """Show progress bars on stderr, each description padded to the given width."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    words = TextColumn(f"{{task.description:{width}}}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), *more)
    with Progress(*columns, console=Console(stderr=True), **options) as bars:
        yield bars
