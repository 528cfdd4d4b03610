"""pre_residual: the kernels of ``pre``; ``project_dx`` of its vjp adds the cotangent of x."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels
from mhc_backends.kernels.ops import pre
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, variant: Variant) -> tuple[Array | None, ...]:
    """(aggregate(x, H_pre), H_post, H_res, x) with the mappings of x."""
    return *pre.forward(kernels, *primals, variant=variant), primals[0]


def forward_with_saved(
    kernels: Kernels, *primals: Array, variant: Variant
) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, the projection and H_pre."""
    outputs, saved = pre.forward_with_saved(kernels, *primals, variant=variant)
    return (*outputs, primals[0]), saved


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, variant: Variant
) -> tuple[Array, ...]:
    """Pull back through pre; its last pass over the streams adds the cotangent of x."""
    *through, g_x = cotangents
    return pre.vjp(kernels, primals, through, saved, variant=variant, g_x=g_x)
