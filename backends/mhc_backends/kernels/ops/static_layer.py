"""static_layer: the kernel ``static_layer``, and for its vjp ``static_layer_vjp``.

With many streams the vjp runs ``aggregate``, ``rms_norm``, ``rms_norm_vjp`` and
``static_layer_vjp_wide``. All tokens share the mappings, which static_mappings computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens
from mhc_backends.kernels.launch import shares
from mhc_backends.kernels.ops import rms_norm, static_mappings

MOST_IN_REGISTERS = 4  # streams whose 2 n + n * n sums a thread can keep


def forward(kernels: Kernels, *primals: Array, eps: float, iterations: int) -> Array:
    """H_res x + H_post (outer) rms_norm(aggregate(x, H_pre))."""
    return forward_with_saved(kernels, *primals, eps=eps, iterations=iterations)[0]


def forward_with_saved(
    kernels: Kernels, *primals: Array, eps: float, iterations: int
) -> tuple[Array, tuple[Array, ...]]:
    """Return the output and, for the vjp, the mappings."""
    x, *raw, weight = primals
    mapped = static_mappings.forward(kernels, *raw, iterations=iterations)
    inputs = _inputs(kernels, x, mapped, weight, eps)
    out = kernels("static_layer", inputs, {"out": Out.like(x)}, Sizes.of(x))[0]
    return out, mapped


def vjp(
    kernels: Kernels,
    primals: Sequence[Array],
    cotangents: Any,
    saved: Any = None,
    *,
    eps: float,
    iterations: int,
) -> tuple[Array, ...]:
    """Pull back through combine, norm and aggregate in one pass, then the static mappings."""
    (x, *raw, weight), (g,) = primals, cotangents
    mapped = saved or static_mappings.forward(kernels, *raw, iterations=iterations)
    pullback = _pullback if x.shape[-2] <= MOST_IN_REGISTERS else _pullback_wide
    dx, d_mapped, dweight = pullback(kernels, x, mapped, weight, g, eps)
    d_raw = static_mappings.vjp(kernels, raw, d_mapped, iterations=iterations)
    return dx, *d_raw, kernels.host.cast(dweight, weight.dtype)


def _pullback(
    kernels: Kernels, x: Array, mapped: Any, weight: Array, g: Array, eps: float
) -> tuple[Array, list[Array], Array]:
    sizes = Sizes.of(x)
    n, C = sizes.n, sizes.C
    sums = Out((shares("static_layer_vjp", *sizes, kernels.dialect), 2 * n + n * n + C), FLOAT32)
    inputs = {**_inputs(kernels, x, mapped, weight, eps), "g": tokens(g, 2)}
    dx, parts = kernels("static_layer_vjp", inputs, {"dx": Out.like(x), "sums": sums}, sizes)
    *d_mapped, dweight = _split(kernels.sum_rows(parts), n)
    return dx, d_mapped, dweight


def _pullback_wide(
    kernels: Kernels, x: Array, mapped: Any, weight: Array, g: Array, eps: float
) -> tuple[Array, list[Array], Array]:
    sizes = Sizes.of(x)
    n = sizes.n
    h_pre, h_post, h_res = mapped
    h = _collapsed(kernels, x, h_pre)
    y = rms_norm.normalised(kernels, h, weight, eps)
    dh, dweight = rms_norm.pullback(kernels, h, weight, _collapsed(kernels, g, h_post), eps)
    inputs = {
        "x": tokens(x, 2),
        "g": tokens(g, 2),
        "y": y,
        "dh": dh,
        "h_pre": h_pre,
        "h_res": h_res,
    }
    sums = Out((shares("static_layer_vjp_wide", *sizes, kernels.dialect), 2 * n + n * n), FLOAT32)
    outputs = {"dx": Out.like(x), "sums": sums}
    dx, parts = kernels("static_layer_vjp_wide", inputs, outputs, sizes)
    *d_mapped, _ = _split(kernels.sum_rows(parts), n)
    return dx, d_mapped, dweight.reshape(-1)


def _collapsed(kernels: Kernels, x: Array, weights: Array) -> Array:
    """Return sum_i weights_i x_i per token, not rounded to the dtype of the streams."""
    sizes = Sizes.of(x)
    inputs = {"x": tokens(x, 2), "h_pre": tokens(weights, 1)}
    return kernels("aggregate", inputs, {"h": Out((sizes.T, sizes.C), FLOAT32)}, sizes)[0]


def _split(sums: Array, n: int) -> tuple[Array, ...]:
    """Return dh_pre, dh_post, dH_res and the rest of the sums."""
    flat, mapped = sums.reshape(-1), 2 * n + n * n
    return flat[:n], flat[n : 2 * n], flat[2 * n : mapped].reshape(n, n), flat[mapped:]


def _inputs(kernels: Kernels, x: Array, mapped: Any, weight: Array, eps: float) -> dict[str, Array]:
    h_pre, h_post, h_res = mapped
    return {
        "x": tokens(x, 2),
        "h_pre": h_pre,
        "h_post": h_post,
        "h_res": h_res,
        "weight": weight,
        "eps": kernels.host.constant([eps]),
    }
