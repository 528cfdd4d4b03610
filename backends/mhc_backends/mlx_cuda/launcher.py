"""``mx.fast.cuda_kernel`` for long texts.

MLX hashes a kernel's text at every launch, 0.3 us for each KiB, which for a token or two is more
than the launch itself. So the text passed to MLX only includes files, which nvrtc reads when it
compiles.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = ["cuda_kernel"]


def cuda_kernel(
    *,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    shared_memory: int = 0,
) -> Callable[..., Sequence[mx.array]]:
    """Make a kernel as ``mx.fast.cuda_kernel`` does, with its source and header in files."""
    # MLX passes the shapes that the source mentions
    shapes = [word for word in re.findall(r"\w+_shape\b", source) if word[:-6] in input_names]
    make: Any = mx.fast.cuda_kernel
    return make(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=f"// {' '.join(dict.fromkeys(shapes))}\n{_included(source)}",
        header=_included(header),
        shared_memory=shared_memory,
    )


def _included(text: str) -> str:
    """Write a text to a file named by its content and return its ``#include``, or return the text
    itself if the file cannot be written.
    """
    folder = _folder()
    if folder is None:
        return text
    path = Path(folder.name) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.h"
    if not path.exists():
        path.write_text(text, encoding="utf-8")
    return f'#include "{path}"\n'


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str] | None:
    """Make a folder for this process alone, which is deleted when the process ends."""
    try:
        return tempfile.TemporaryDirectory(prefix="mhc-cuda-")
    except OSError:
        return None
