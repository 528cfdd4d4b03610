"""The comparison of models."""

from mhc_backends.mlx_nn.compat import (
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

__all__ = [
    "BaselineBlock",
    "BaselineModel",
    "GradientTracker",
    "MHCBlock",
    "MHCModel",
    "compare_models",
    "count_params",
    "create_baseline_model",
    "create_mhc_model",
    "train_model",
    "train_step",
]
