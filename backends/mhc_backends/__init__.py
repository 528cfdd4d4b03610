"""The backends that come with mhc-core, each a plugin like any third-party one."""

__all__ = ["BUILTINS"]

BUILTINS = (
    "mhc_backends.numpy",
    "mhc_backends.jax",
    "mhc_backends.mlx_compiled",
    "mhc_backends.mlx_cuda",
    "mhc_backends.mlx_metal",
)
"""The modules of the built-in plugins; ``mlx_metal`` is the plugin ``mlx-metal``."""
