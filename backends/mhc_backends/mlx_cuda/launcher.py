"""``mx.fast.cuda_kernel`` for long texts, with what it compiles kept on disk.

MLX hashes a kernel's text at every launch, 0.3 us for each KiB, which for a token or two is more
than the launch itself. So the text passed to MLX only includes files, which NVRTC reads if MLX
compiles. ``compiled.py`` compiles before that.
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

from mhc_backends.kernels.host import dtype_name
from mhc_backends.mlx_cuda import compiled
from mhc_backends.proof import cache

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
    passed = _included(header), f"// {' '.join(dict.fromkeys(shapes))}\n{_included(source)}"
    if name_of := compiled.architecture():
        name = f"{name}_{name_of}"  # MLX's folder may serve several GPUs
    make: Any = mx.fast.cuda_kernel
    kernel = make(
        name=name,
        input_names=list(input_names),
        output_names=list(output_names),
        source=passed[1],
        header=passed[0],
        shared_memory=shared_memory,
    )
    started: set[Any] = set()

    def launch(
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, int]],
        output_dtypes: Sequence[mx.Dtype],
        **rest: Any,
    ) -> Sequence[mx.array]:
        kinds = tuple([(dtype_name(one.dtype), one.ndim > 0) for one in inputs])
        key = kinds, tuple(output_dtypes), tuple(template)
        if key not in started:
            started.add(key)
            ins = [(word, *kind) for word, kind in zip(input_names, kinds, strict=True)]
            outs = zip(output_names, map(dtype_name, output_dtypes), strict=True)
            whole = header, source
            compiled.start(compiled.Kernel(name, passed, whole, tuple(ins), tuple(outs), key[2]))
        return kernel(inputs=inputs, template=template, output_dtypes=output_dtypes, **rest)

    return launch


def _included(text: str) -> str:
    """Write a text to a file named by its content and return its ``#include``, or return the text
    itself if the file cannot be written.
    """
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.h"
    for base in _folders():
        try:
            compiled.write(base / name, text.encode())
        except OSError:
            continue
        return f'#include "{base / name}"\n'
    return text


def _folders() -> list[Path]:
    """Return where the texts may lie: a path that is the same in every process, since MLX looks for
    compiled code by a hash of it; and one for this process alone.
    """
    kept, own = cache.folder(), _own_folder()
    return [*([kept / "text"] if kept else []), *([Path(own.name)] if own else [])]


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str] | None:
    """Make a folder for this process alone, which is deleted when the process ends."""
    try:
        return tempfile.TemporaryDirectory(prefix="mhc-cuda-")
    except OSError:
        return None
