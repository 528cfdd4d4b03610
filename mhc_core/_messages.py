"""Words for errors and warnings about backends, which are other people's code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["error_text", "nearest", "warn"]


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return the known name that is nearest to a wrong one, as the end of a message, or ""."""
    from difflib import get_close_matches

    near = get_close_matches(str(name), known, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


def error_text(error: BaseException) -> str:
    """Return the message of an error from a plugin's code; Ctrl-C is raised again.

    ``sys.exit`` counts as an error: a plugin must not end the program.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    try:
        said = str(error)
    except Exception:
        said = "(a message that cannot be read)"
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def warn(message: str) -> None:
    """Warn through logging: the running program can neither fix this nor should it end for it."""
    import logging

    logging.getLogger("mhc_core").warning("%s", message)
