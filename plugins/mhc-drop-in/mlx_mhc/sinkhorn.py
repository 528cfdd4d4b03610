"""The projection."""

from mhc_core.mlx import sinkhorn_knopp

__all__ = ["sinkhorn_knopp"]
