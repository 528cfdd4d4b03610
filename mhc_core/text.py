"""Text from outside in messages and reports: literal, in one line, and nothing about the user.

Names of backends, reasons and errors come from other people's plugins. They must not move the
cursor, break a table or reveal whose machine it was.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

__all__ = ["one_line", "plain", "safe"]

# C0 and C1 but for tab and newline, what turns the direction of writing, and lone surrogates
CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
HOMES = re.compile(r"(/home|/Users|[A-Za-z]:[/\\]+Users)[/\\]+[^/\\\s'\":,)]+")


def plain(value: Any) -> str:
    """Return text without characters that a terminal would act on."""
    return CONTROLS.sub("\ufffd", str(value))


def one_line(value: Any) -> str:
    """Return text in one line."""
    return " ".join(plain(value).split())


def safe(text: str) -> str:
    """Remove what identifies the user from a message: home folders and the user's name."""
    for folder in (str(Path.home()), os.environ.get("HOME", "")):
        if len(folder) > 1:
            text = text.replace(folder, "~")
    text = HOMES.sub("~", text)
    user = os.environ.get("USER") or os.environ.get("USERNAME") or ""
    # a short name, or root, is in many an innocent word
    return re.sub(rf"\b{re.escape(user)}\b", "someone", text) if len(user) > 4 else text
