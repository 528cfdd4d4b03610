"""The training text: its bytes, and the windows of it that a step sees."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy

__all__ = ["TextError", "batch", "digest", "probe", "read"]

LIBRARY_BYTES = 4_000_000  # of the standard library's sources: more than a run can see


class TextError(ValueError):
    """The text cannot be used, for the reason in the message."""


def read(file: Path | None, context: int) -> bytes:
    """Read the text, or the standard library's modules in the order of their names."""
    try:
        text = file.read_bytes() if file else _standard_library()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TextError(f"{file or 'the standard library'} cannot be read: {reason}") from None
    if len(text) < 2 * (context + 1):
        raise TextError(
            f"{file or 'the standard library'} has {len(text)} bytes; "
            f"needs at least {2 * (context + 1)} for sequences of {context}"
        )
    return text


def _standard_library() -> bytes:
    text = b""
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += module.read_bytes()
        if len(text) >= LIBRARY_BYTES:
            break
    return text[:LIBRARY_BYTES]


def digest(text: bytes) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text).hexdigest()


def batch(text: bytes, seed: int, step: int, count: int, context: int) -> Any:
    """Draw the windows of a step, ``[count, context + 1]``: they depend on seed and step alone."""
    data = numpy.frombuffer(text, numpy.uint8)
    starts = numpy.random.default_rng((seed, step)).integers(0, len(data) - context, count)
    return numpy.stack([data[start : start + context + 1] for start in starts]).astype(numpy.int32)


def probe(text: bytes, context: int) -> Any:
    """Return the one sequence on which a model is inspected, from the middle of the text."""
    start = (len(text) - context) // 2
    data = numpy.frombuffer(text, numpy.uint8)[start : start + context + 1]
    return data.astype(numpy.int32)[None]
