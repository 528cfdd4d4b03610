"""Modules for MLX: ``from mhc_core.mlx import HyperConnection``.

Everything here uses the uniform ops, so it runs on whichever MLX backend is selected. Nothing else
imports this module: ``import mhc_core`` needs no MLX.
"""

from mhc_backends.mlx_common import missing as _missing

if _reason := _missing():
    raise ImportError(f"mhc_core.mlx needs MLX. {_reason}")

from mhc_backends.mlx_nn import *  # noqa: F403
from mhc_backends.mlx_nn import __all__ as __all__
