"""The layer and the wrapper."""

from mhc_core.mlx import MHCLayer, MHCRewire

__all__ = ["MHCLayer", "MHCRewire"]
