"""The patcher."""

from mhc_core.mlx import AutoPatcher

__all__ = ["AutoPatcher"]
