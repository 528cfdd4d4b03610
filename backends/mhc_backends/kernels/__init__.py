"""The kernels: their texts, their launch shapes, and the ops made of them.

- ``bodies``, ``common``, ``metal`` and ``cuda``: C++ headers, from which ``text.py`` makes texts
- ``table.py``, ``launch.py``: the work of every kernel, and the shape of every launch
- ``program.py``: the text, launch shape and limits of one launch
- ``host.py``: launches on the arrays of any library, the host; ``mlx.py``: on MLX's
- ``plan.py``: launches recorded once, to be replayed on arrays of the same shapes
- ``ops``: each op as launches of kernels; ``functions.py`` makes a backend's functions of them
"""

from mhc_backends.kernels.text import DIALECTS, KERNELS, OWN

__all__ = ["DIALECTS", "KERNELS", "OWN"]
