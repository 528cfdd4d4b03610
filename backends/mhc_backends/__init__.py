"""The backends that come with mhc-core, each a plugin like any third-party one."""

from mhc_core import __version__ as _version

__all__ = ["BUILTINS", "DISTRIBUTION"]

BUILTINS = (
    "mhc_backends.numpy",
    "mhc_backends.jax",
    "mhc_backends.jax_cuda",
    "mhc_backends.mlx_compiled",
    "mhc_backends.mlx_cuda",
    "mhc_backends.mlx_metal",
)
"""The modules of the built-in plugins; ``mlx_metal`` is the plugin ``mlx-metal``."""

DISTRIBUTION = f"mhc-core {_version}"
"""The distribution that they come in, with its version."""
