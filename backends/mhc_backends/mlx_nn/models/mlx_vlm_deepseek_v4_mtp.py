"""The drafter of DeepSeek-V4 in mlx-vlm that drafts token by token: one layer, and its own head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mhc_backends.mlx_nn.models import mlx_vlm_deepseek_v4

__all__ = ["FAMILY"]


def _layers(drafter: Any) -> list[Any]:
    return [drafter.decoder]


FAMILY = replace(mlx_vlm_deepseek_v4.FAMILY, order=_layers)
