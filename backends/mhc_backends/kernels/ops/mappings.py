"""mappings: kernels ``project`` (or ``project_few``), ``mappings`` and those of their vjps."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import Array, Kernels, Out, Sizes
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, variant: Variant) -> tuple[Array | None, ...]:
    """(H_pre, H_post, H_res) of z = u r scale + bias."""
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
    """Return the outputs and, for the vjp, the projection."""
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    partials = _projection.project(kernels, x, phi)
    inputs = {"partials": partials, "scale": scale, "bias": bias}
    outputs = _projection.mapped(ahead, sizes.n, bias.size, variant.mixes, saves)
    chosen = {"CHANNELS": sizes.C, "SAVES": saves, **_projection.constants(variant)}
    kernel = "mappings" if variant.mixes else "mappings_unmixed"
    made = kernels(kernel, inputs, outputs, sizes, _projection.settings(variant), **chosen)
    if variant.mixes:
        return tuple(made[:3]), tuple(made[3:])
    return (*made[:2], None), tuple(made[2:])


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, variant: Variant
) -> tuple[Array, ...]:
    """Pull back through the activations, the division by the RMS and the projection."""
    x, phi, scale, bias = primals
    if saved is None:
        _, saved = forward_with_saved(kernels, *primals, variant=variant)
    given, projected = _projection.Cotangents(*cotangents), _projection.Projected(*saved)
    return _projection.pullback(
        kernels, x, phi, scale, bias, projected, given, variant, Out.like(x)
    )
