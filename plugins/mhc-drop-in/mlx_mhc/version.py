"""The version of mlx-mhc whose names these are."""

__version__ = "0.4.1"
