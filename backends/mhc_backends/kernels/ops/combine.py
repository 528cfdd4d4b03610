"""combine: kernels ``combine`` and ``combine_vjp``, or ``combine_vjp_wide`` for many streams."""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, tokens

MOST_IN_REGISTERS = 4  # streams whose n + n * n sums a thread can keep


def forward(kernels: Kernels, x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """x'_i = sum_j H_res[i, j] x_j + h_post_i y."""
    given = inputs(x, y, h_post, h_res)
    return kernels("combine", given, {"out": Out.like(x)}, Sizes.of(x))[0]


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None
) -> tuple[Array, Array, Array, Array]:
    """dx = H_res^T g; dy = sum_i h_post_i g_i; dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j."""
    (x, y, h_post, h_res), (g,) = primals, cotangents
    sizes = Sizes.of(x)
    outputs = {
        "dx": Out.like(x),
        "dy": Out.like(y),
        "dh_post": Out((sizes.T, sizes.n), FLOAT32),
        "dh_res": Out((sizes.T, sizes.n, sizes.n), FLOAT32),
    }
    name = "combine_vjp" if sizes.n <= MOST_IN_REGISTERS else "combine_vjp_wide"
    given = {**inputs(x, y, h_post, h_res), "g": tokens(g, 2)}
    dx, dy, dh_post, dh_res = kernels(name, given, outputs, sizes)
    return dx, dy, kernels.sum_to(dh_post, h_post, 1), kernels.sum_to(dh_res, h_res, 2)


def inputs(x: Array, y: Array, h_post: Array, h_res: Array) -> dict[str, Array]:
    """Return the kernels' inputs, all tokens in one axis."""
    return {
        "x": tokens(x, 2),
        "y": tokens(y, 1),
        "h_post": tokens(h_post, 1),
        "h_res": tokens(h_res, 2),
    }
