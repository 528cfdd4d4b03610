"""gated_combine: kernels ``gated_combine`` and ``gated_combine_vjp``, or for many streams
``combine_vjp_wide`` and ``pre_scale_vjp``.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens
from mhc_backends.kernels.ops.pre_scale import scale_pullback, slices

MOST_IN_REGISTERS = 4  # streams whose n + n * n sums a thread can keep


def forward(
    kernels: Kernels, x: Array, y: Array, h_pre: Array, h_post: Array, h_res: Array
) -> Array:
    """H_post * (y + H_res (H_pre * x)) on the n slices of the last axis."""
    sizes, inputs = _inputs(x, y, h_pre, h_post, h_res)
    return kernels("gated_combine", inputs, {"out": Out.like(x)}, sizes)[0]


def vjp(kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None) -> tuple[Array, ...]:
    """With z = y + H_res (H_pre * x): dy = H_post * g, and the rest through z's two products."""
    *_, h_pre, h_post, h_res = primals
    pullback = _pullback if h_pre.shape[-1] <= MOST_IN_REGISTERS else _pullback_wide
    dx, dy, dh_pre, dh_post, dh_res = pullback(kernels, *primals, *cotangents)
    return (
        dx,
        dy,
        kernels.sum_to(dh_pre, h_pre, 1),
        kernels.sum_to(dh_post, h_post, 1),
        kernels.sum_to(dh_res, h_res, 2),
    )


def _pullback(kernels: Kernels, *arrays: Array) -> list[Array]:
    """Return dx, dy and each token's gradients of the mappings."""
    x, y, *_, g = arrays
    sizes, inputs = _inputs(*arrays[:-1])
    inputs["g"] = slices(g, sizes.n)
    outputs = {
        "dx": Out.like(x),
        "dy": Out.like(y),
        "dh_pre": Out((sizes.T, sizes.n), FLOAT32),
        "dh_post": Out((sizes.T, sizes.n), FLOAT32),
        "dh_res": Out((sizes.T, sizes.n, sizes.n), FLOAT32),
    }
    return kernels("gated_combine_vjp", inputs, outputs, sizes)


def _pullback_wide(
    kernels: Kernels,
    x: Array,
    y: Array,
    h_pre: Array,
    h_post: Array,
    h_res: Array,
    g: Array,
) -> tuple[Array, ...]:
    """Return the same by the vjp kernels of combine, with H = h_post H_res h_pre, and pre_scale.

    They compute the sums over C, G[i, j] = g_i . x_j and Y_i = g_i . y_i: see gated_combine_vjp.h.
    """
    dy, Y = scale_pullback(kernels, y, h_post, g)
    cast, zeros = kernels.host.cast, kernels.host.zeros
    pre, post, res = (cast(a, FLOAT32) for a in (h_pre, h_post, h_res))
    columns, rows = pre[..., None, :], post[..., :, None]
    streams = slices(x, h_pre.shape[-1])
    sizes = Sizes.of(streams)
    inputs = {
        "x": streams,
        "y": zeros((sizes.T, sizes.C), x.dtype),
        "h_post": zeros((1, sizes.n), FLOAT32),
        "h_res": tokens(rows * res * columns, 2),
        "g": slices(g, sizes.n),
    }
    outputs = {
        "dx": Out.like(x),
        "dy": Out((sizes.T, sizes.C), x.dtype),
        "dh_post": Out((sizes.T, sizes.n), FLOAT32),
        "dh_res": Out((sizes.T, sizes.n, sizes.n), FLOAT32),
    }
    dx, _, _, G = kernels("combine_vjp_wide", inputs, outputs, sizes)
    columns, rows, res = tokens(columns, 2), tokens(rows, 2), tokens(res, 2)
    dh_pre = (rows * res * G).sum(axis=1)
    dh_post = Y + (res * columns * G).sum(axis=2)
    return dx, dy, dh_pre, dh_post, rows * columns * G


def _inputs(
    x: Array, y: Array, h_pre: Array, h_post: Array, h_res: Array
) -> tuple[Sizes, dict[str, Array]]:
    n = h_pre.shape[-1]
    streams = slices(x, n)
    inputs = {
        "x": streams,
        "y": slices(y, n),
        "h_pre": tokens(h_pre, 1),
        "h_post": tokens(h_post, 1),
        "h_res": tokens(h_res, 2),
    }
    return Sizes.of(streams), inputs
