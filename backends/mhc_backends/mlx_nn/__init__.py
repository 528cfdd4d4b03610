"""``mlx.nn`` modules on the uniform ops, and real models; public as :mod:`mhc_core.mlx`."""

from mhc_backends.mlx_nn.block import HyperConnectedBlock
from mhc_backends.mlx_nn.checkpoints import (
    ConnectedLayer,
    HyperConnections,
    load_hyper_connections,
)
from mhc_backends.mlx_nn.compat import (
    OUTPUT_HEADS,
    AutoPatcher,
    GradientTracker,
    ManifoldHyperConnection,
    MHCLayer,
    MHCRewire,
    Patched,
    PatchReport,
    compare_models,
    diagnostics,
    residual_add_agg,
)
from mhc_backends.mlx_nn.gated import GatedConnection, GatedHead
from mhc_backends.mlx_nn.hyper import HyperConnection, HyperHead
from mhc_backends.mlx_nn.models import AccelerationReport, accelerate, restore
from mhc_backends.mlx_nn.sharding import (
    channels_over,
    pipeline_value_and_grad,
    shard_channels,
)
from mhc_backends.mlx_nn.stack import HyperConnectedStack
from mhc_core import sinkhorn_knopp

__all__ = [
    "OUTPUT_HEADS",
    "AccelerationReport",
    "AutoPatcher",
    "ConnectedLayer",
    "GatedConnection",
    "GatedHead",
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
    "channels_over",
    "compare_models",
    "diagnostics",
    "load_hyper_connections",
    "pipeline_value_and_grad",
    "residual_add_agg",
    "restore",
    "shard_channels",
    "sinkhorn_knopp",
]
