"""Manifold-Constrained Hyper-Connections (mHC): one API for every array library.

mHC (arXiv:2512.24880) widens a network's residual path to n streams, mixes them with a doubly
stochastic matrix and feeds each layer a weighted sum of them. Importing this package imports no
array library; each op runs on the best backend for the arrays it is given.

``mhc_core.mlx`` has modules for MLX, ``mhc_core.jax`` for JAX, ``mhc_core.diagnostics`` has numbers
to watch while training, and ``mhc_core.fp8`` a layer's input in FP8; all are imported on first use.
"""

import typing as _typing
from types import ModuleType as _ModuleType

from mhc_core._api import *  # noqa: F403 - every op, and vjp
from mhc_core.discovery import Backend as Backend
from mhc_core.discovery import backends as backends
from mhc_core.discovery import mixers as mixers
from mhc_core.errors import BackendError as BackendError
from mhc_core.errors import BackendUnavailableError as BackendUnavailableError
from mhc_core.errors import UnknownBackendError as UnknownBackendError
from mhc_core.errors import UnsupportedError as UnsupportedError
from mhc_core.gradients import no_grad as no_grad
from mhc_core.selection import use_backend as use_backend
from mhc_core.variants import DEEPSEEK_V4 as DEEPSEEK_V4
from mhc_core.variants import DEEPSEEK_V41 as DEEPSEEK_V41
from mhc_core.variants import GLM53_FLASH as GLM53_FLASH
from mhc_core.variants import HY_V4 as HY_V4
from mhc_core.variants import LIGER as LIGER
from mhc_core.variants import PAPER as PAPER
from mhc_core.variants import XING40 as XING40
from mhc_core.variants import Variant as Variant

__version__ = "0.1.0"

if not _typing.TYPE_CHECKING:  # to a type checker, all names without an underscore are public
    __all__ = sorted(
        (
            name
            for name, value in globals().items()
            if not name.startswith("_") and not isinstance(value, _ModuleType)
        ),
        key=lambda name: (not name.isupper(), not name[0].isupper(), name),
    )

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in ("diagnostics", "fp8", "jax", "mlx"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
