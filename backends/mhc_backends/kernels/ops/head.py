"""head: kernels ``project`` (or ``project_few``) and ``head``, and the kernels of their vjps."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens
from mhc_backends.kernels.ops import _projection
from mhc_core.variants import Variant


def forward(kernels: Kernels, *primals: Array, variant: Variant) -> Array:
    """h = sum_i w_i x_i with w = sigmoid(vec(x) @ phi.T r scale + bias) + pre_eps."""
    return forward_with_saved(kernels, *primals, variant=variant, saves=False)[0][0]


def forward_with_saved(
    kernels: Kernels,
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    *,
    variant: Variant,
    saves: bool = True,
) -> tuple[tuple[Array], tuple[Array, ...]]:
    """Return h and, for the vjp, the projection and the weights."""
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    partials = _projection.project(kernels, x, phi)
    inputs = {"x": tokens(x, 2), "partials": partials, "scale": scale, "bias": bias}
    outputs: dict[str, Out | None] = {"h": Out((*ahead, sizes.C), x.dtype)}
    for name, last in (("u", sizes.n), ("w", sizes.n), ("r", 1)):
        outputs[name] = Out((*ahead, last), FLOAT32, True) if saves else None
    h, *saved = kernels("head", inputs, outputs, sizes, _projection.settings(variant), SAVES=saves)
    return (h,), tuple(saved)


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None, *, variant: Variant
) -> tuple[Array, ...]:
    """Pull back through the weighted sum, then the sigmoid and the projection."""
    (x, phi, scale, bias), (g,) = primals, cotangents
    if saved is None:
        _, saved = forward_with_saved(kernels, *primals, variant=variant)
    u, w, r = saved
    sizes = Sizes.of(x)
    inputs = {
        "u": tokens(u, 1),
        "r": tokens(r, 1),
        "scale": scale,
        "bias": bias,
        "g_w": _projection.weights_vjp(kernels, x, g),
    }
    local = _projection.local_vjp(kernels, "head_vjp", inputs, sizes, 1)
    out = Out.like(x)
    dx, dphi, terms = _projection.projection_pullback(kernels, x, phi, local, out, w, g)
    return dx, dphi, *_projection.summed(kernels, terms, scale, bias)
