"""mlx-mhc 0.4.1's names, provided by mhc-core and documented in :mod:`mhc_core.mlx`.

``MHCLayer`` and ``MHCRewire`` are included since mhc-mlx offers them under this name too.
"""

from mhc_mlx import MHCLayer, MHCRewire
from mlx_mhc.benchmark import GradientTracker, compare_models
from mlx_mhc.mhc import ManifoldHyperConnection
from mlx_mhc.sinkhorn import sinkhorn_knopp
from mlx_mhc.version import __version__

__all__ = [
    "GradientTracker",
    "MHCLayer",
    "MHCRewire",
    "ManifoldHyperConnection",
    "__version__",
    "compare_models",
    "sinkhorn_knopp",
]
