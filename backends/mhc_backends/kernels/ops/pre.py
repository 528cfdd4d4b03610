"""pre: kernels ``project`` and ``pre`` (or their forms for few tokens), and those of their vjps."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels, Out
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, variant: Variant) -> tuple[Array | None, ...]:
    """(aggregate(x, H_pre), H_post, H_res) with the mappings of x."""
    return forward_with_saved(kernels, *primals, variant=variant, saves=False)[0]


def forward_with_saved(
    kernels: Kernels,
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    *,
    variant: Variant,
    saves: bool = True,
) -> tuple[tuple[Array | None, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, the projection and H_pre."""
    sums = _projection.project_for_pre(kernels, x, phi, variant.mixes)
    made = _projection.pre(kernels, x, sums, scale, bias, None, variant, saves)
    return (made.h, made.h_post, made.h_res), (*made.saved, made.h_pre)


def vjp(
    kernels: Kernels,
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    *,
    variant: Variant,
    g_x: Array | None = None,
) -> tuple[Array, ...]:
    """Pull back through the aggregate, then through the mappings with the cotangent of H_pre.

    The gradient of x includes g_x, another one, if it is given.
    """
    (x, phi, scale, bias), (g_h, g_post, g_res) = primals, cotangents
    if saved is None:
        _, saved = forward_with_saved(kernels, *primals, variant=variant)
    u, r, h_pre = saved
    dh_pre = _projection.weights_vjp(kernels, x, g_h)
    given = _projection.Cotangents(dh_pre, g_post, g_res, h_pre, g_h, g_x)
    return _projection.pullback(
        kernels, x, phi, scale, bias, _projection.Projected(u, r), given, variant, Out.like(x)
    )
