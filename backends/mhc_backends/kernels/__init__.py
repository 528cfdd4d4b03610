"""The kernels: their texts, their launch shapes, and the ops made of them.

- ``bodies``, ``common``, ``metal`` and ``cuda``: C++ headers, from which ``text.py`` makes texts
- ``launch.py``: the shape of every launch
- ``program.py``: the text, launch shape and limits of one launch
- ``mlx.py``: launches through MLX
- ``ops``: each op as launches of kernels; ``functions.py`` makes a backend's functions of them
"""

from mhc_backends.kernels.text import DIALECTS, KERNELS

__all__ = ["DIALECTS", "KERNELS"]
