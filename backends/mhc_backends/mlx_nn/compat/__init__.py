"""The modules of mhc-mlx 0.6.3 and mlx-mhc 0.4.1 on the uniform ops, for code written for them.

:mod:`mhc_core.mlx` has those that users of either package call. The models and training steps that
:func:`compare_models` is made of are here alone.
"""

from mhc_backends.mlx_nn.compat.compare import (
    BaselineBlock,
    BaselineModel,
    GradientTracker,
    MHCBlock,
    MHCModel,
    compare_models,
    count_params,
    create_baseline_model,
    create_mhc_model,
    train_model,
    train_step,
)
from mhc_backends.mlx_nn.compat.diagnostics import diagnostics
from mhc_backends.mlx_nn.compat.layer import MHCLayer, residual_add_agg
from mhc_backends.mlx_nn.compat.manifold import ManifoldHyperConnection
from mhc_backends.mlx_nn.compat.patch import OUTPUT_HEADS, AutoPatcher, Patched, PatchReport
from mhc_backends.mlx_nn.compat.rewire import MHCRewire

__all__ = [
    "OUTPUT_HEADS",
    "AutoPatcher",
    "BaselineBlock",
    "BaselineModel",
    "GradientTracker",
    "MHCBlock",
    "MHCLayer",
    "MHCModel",
    "MHCRewire",
    "ManifoldHyperConnection",
    "PatchReport",
    "Patched",
    "compare_models",
    "count_params",
    "create_baseline_model",
    "create_mhc_model",
    "diagnostics",
    "residual_add_agg",
    "train_model",
    "train_step",
]
