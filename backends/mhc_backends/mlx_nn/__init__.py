"""``mlx.nn`` modules on the uniform ops, and real models; public as :mod:`mhc_core.mlx`."""

from mhc_backends.mlx_nn.block import HyperConnectedBlock
from mhc_backends.mlx_nn.checkpoints import (
    ConnectedLayer,
    HyperConnections,
    load_hyper_connections,
)
from mhc_backends.mlx_nn.compare import GradientTracker, compare_models
from mhc_backends.mlx_nn.diagnostics import diagnostics
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.layer import MHCLayer, residual_add_agg
from mhc_backends.mlx_nn.manifold import ManifoldHyperConnection
from mhc_backends.mlx_nn.models import AccelerationReport, accelerate, restore
from mhc_backends.mlx_nn.patch import OUTPUT_HEADS, AutoPatcher, Patched, PatchReport
from mhc_backends.mlx_nn.rewire import MHCRewire
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core import sinkhorn_knopp

__all__ = [
    "OUTPUT_HEADS",
    "AccelerationReport",
    "AutoPatcher",
    "ConnectedLayer",
    "GradientTracker",
    "HyperConnectedBlock",
    "HyperConnectedStack",
    "HyperConnection",
    "HyperConnections",
    "HyperHead",
    "MHCLayer",
    "MHCRewire",
    "ManifoldHyperConnection",
    "PatchReport",
    "Patched",
    "accelerate",
    "compare_models",
    "diagnostics",
    "load_hyper_connections",
    "residual_add_agg",
    "restore",
    "sinkhorn_knopp",
]
