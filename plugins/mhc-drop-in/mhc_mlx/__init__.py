"""mhc-mlx 0.6.3's names, provided by mhc-core and documented in :mod:`mhc_core.mlx`."""

from mhc_mlx._originals import refuse

refuse()

from mhc_mlx.diagnostics import diagnostics  # noqa: E402
from mhc_mlx.layer import MHCLayer, MHCRewire  # noqa: E402
from mhc_mlx.patching import AutoPatcher  # noqa: E402
from mhc_mlx.utils import residual_add_agg  # noqa: E402

__version__ = "0.6.3"  # whose names these are

__all__ = [
    "AutoPatcher",
    "MHCLayer",
    "MHCRewire",
    "__version__",
    "diagnostics",
    "residual_add_agg",
]
