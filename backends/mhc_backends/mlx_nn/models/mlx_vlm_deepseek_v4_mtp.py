"""The drafter of DeepSeek-V4 in mlx-vlm that drafts token by token: one layer, and its own head."""

from __future__ import annotations

from dataclasses import replace

from mhc_backends.mlx_nn.models import mlx_vlm_deepseek_v4

__all__ = ["FAMILY"]

FAMILY = replace(mlx_vlm_deepseek_v4.FAMILY, order=lambda drafter: [drafter.decoder])
