"""The fused residual addition."""

from mhc_core.mlx import residual_add_agg

__all__ = ["residual_add_agg"]
