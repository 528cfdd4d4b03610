"""Manifold-Constrained Hyper-Connections (mHC): one API for every array library.

mHC (arXiv:2512.24880) widens a network's residual path to n streams, mixes them with a doubly
stochastic matrix and feeds each layer a weighted sum of them. Importing this package imports no
array library; each op runs on the best backend for the arrays it is given.

``mhc_core.mlx`` has modules for MLX, and ``mhc_core.diagnostics`` has numbers to watch while
training; both are imported on first use.
"""

import typing as _typing

from mhc_core._api import (
    aggregate,
    combine,
    combine_pre,
    contract,
    expand,
    gated_combine,
    head,
    mappings,
    pre,
    pre_scale,
    residual_add_aggregate,
    rms_norm,
    sinkhorn,
    sinkhorn_knopp,
    static_layer,
    static_mappings,
    vjp,
)
from mhc_core.discovery import Backend, backends
from mhc_core.errors import (
    BackendError,
    BackendUnavailableError,
    UnknownBackendError,
    UnsupportedError,
)
from mhc_core.gradients import no_grad
from mhc_core.selection import use_backend
from mhc_core.variants import DEEPSEEK_V4, DEEPSEEK_V41, LIGER, PAPER, Variant

__version__ = "0.1.0"

__all__ = [
    "DEEPSEEK_V4",
    "DEEPSEEK_V41",
    "LIGER",
    "PAPER",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "UnknownBackendError",
    "UnsupportedError",
    "Variant",
    "aggregate",
    "backends",
    "combine",
    "combine_pre",
    "contract",
    "expand",
    "gated_combine",
    "head",
    "mappings",
    "no_grad",
    "pre",
    "pre_scale",
    "residual_add_aggregate",
    "rms_norm",
    "sinkhorn",
    "sinkhorn_knopp",
    "static_layer",
    "static_mappings",
    "use_backend",
    "vjp",
]

if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in ("diagnostics", "mlx"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
