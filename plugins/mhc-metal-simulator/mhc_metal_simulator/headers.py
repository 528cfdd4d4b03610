"""MLX's own Metal headers, as installed with it: code that Apple's compiler accepts.

MLX puts ``utils.h``, with everything that it includes, before the text of a custom kernel
(``metal::utils()``, made by ``mlx/backend/metal/make_compiled_preamble.sh``).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from mhc_metal_simulator.errors import SimulatorError

__all__ = ["KERNELS", "flattened", "include_folder", "utilities"]

KERNELS = "mlx/backend/metal/kernels"
"""The folder of the headers, below the folder for includes."""

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"(mlx/[^"]+)"[^\n]*$', re.MULTILINE)
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$", re.MULTILINE)


def include_folder() -> Path:
    """Return the folder for includes of the installed MLX."""
    import mlx.core as mx

    folder = Path(str(mx.__file__)).parent / "include"
    if not (folder / KERNELS / "utils.h").exists():
        raise SimulatorError(f"this MLX has no Metal headers: there is no {folder / KERNELS}")
    return folder


def flattened(*names: str) -> str:
    """Return headers, named from ``mlx/`` on, with all MLX headers that they include, each once."""
    return _flat(include_folder(), names, set())


def _flat(folder: Path, names: tuple[str, ...], seen: set[str]) -> str:
    parts: list[str] = []
    for name in names:
        if name not in seen:
            seen.add(name)
            text = _ONCE.sub("", (folder / name).read_text(encoding="utf-8"))
            parts.append(_INCLUDE.sub(lambda found: _flat(folder, (found[1],), seen), text))
    return "\n".join(parts)


@functools.cache
def utilities() -> str:
    """Return the text that MLX puts before every custom kernel."""
    return "#include <metal_stdlib>\n" + flattened(f"{KERNELS}/utils.h")
