"""Output to the screen: text from outside is shown literally, whatever it contains.

Names of backends, reasons and errors come from other people's plugins. None of it is read as
markup, moves the cursor or breaks a table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["console", "one_line", "plain", "progress", "say", "text"]

WIDE = 100  # columns where the output is no terminal

# C0 and C1 but for tab and newline, what turns the direction of writing, and lone surrogates
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(value: Any) -> str:
    """Return text without characters that a terminal would act on."""
    return CONTROLS.sub("\ufffd", str(value))


def one_line(value: Any) -> str:
    """Return text in one line."""
    return " ".join(plain(value).split())


def text(value: Any, style: str = "") -> Text:
    """Return text for a table or a console, without any markup."""
    from rich.text import Text

    return Text(plain(value), style=style)


def console(width: int = WIDE) -> Console:
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
