"""Connections for JAX: ``from mhc_core.jax import HyperConnection``.

Everything here uses the uniform ops, so it runs on whichever JAX backend is selected. Nothing else
imports this module: ``import mhc_core`` needs no JAX.
"""

from importlib.util import find_spec as _find_spec

if _find_spec("jax") is None:
    raise ImportError("mhc_core.jax needs JAX: pip install jax")

from mhc_backends.jax_nn import *  # noqa: F403
from mhc_backends.jax_nn import __all__ as __all__
