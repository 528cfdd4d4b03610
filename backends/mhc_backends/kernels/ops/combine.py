"""combine: kernels ``combine`` and ``combine_vjp``, or ``combine_vjp_wide`` for many streams.

Without H_res: kernels ``write_streams`` and ``write_streams_vjp``.
"""

from __future__ import annotations

from typing import Any

from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, dtype_name, tokens

# streams whose n + n * n sums a thread can keep; Apple's compiler was not seen with more
MOST_IN_REGISTERS = {"metal": 4, "cuda": 8}


def forward(
    kernels: Kernels, x: Array, y: Array, h_post: Array, h_res: Array | None = None
) -> Array:
    """x'_i = sum_j H_res[i, j] x_j + h_post_i y; without h_res, x'_i = x_i + h_post_i y."""
    given = inputs(x, y, h_post, h_res)
    kernel = "write_streams" if h_res is None else "combine"
    return kernels(kernel, given, {"out": Out.like(x)}, Sizes.of(x))[0]


def vjp(
    kernels: Kernels, primals: Any, cotangents: Any, saved: Any = None
) -> tuple[Array | None, ...]:
    """dx = H_res^T g; dy = sum_i h_post_i g_i; dh_post_i = g_i . y; dH_res[i, j] = g_i . x_j."""
    (x, y, h_post, *mixing), (g,) = primals, cotangents
    if not mixing or mixing[0] is None:
        return (*_unmixed_vjp(kernels, x, y, h_post, g), None)[: len(primals)]
    (h_res,), sizes = mixing, Sizes.of(x)
    outputs = {
        "dx": Out.like(x),
        "dy": Out.like(y),
        "dh_post": Out((sizes.T, sizes.n), FLOAT32),
        "dh_res": Out((sizes.T, sizes.n, sizes.n), FLOAT32),
    }
    name = "combine_vjp" if sizes.n <= MOST_IN_REGISTERS[kernels.dialect] else "combine_vjp_wide"
    given = {**inputs(x, y, h_post, h_res), "g": tokens(g, 2)}
    dx, dy, dh_post, dh_res = kernels(name, given, outputs, sizes)
    dh_post, dh_res = kernels.over_channels(dh_post, dh_res)
    return dx, dy, kernels.sum_to(dh_post, h_post, 1), kernels.sum_to(dh_res, h_res, 2)


def _unmixed_vjp(
    kernels: Kernels, x: Array, y: Array, h_post: Array, g: Array
) -> tuple[Array, Array, Array]:
    """dx = g; dy = sum_i h_post_i g_i; dh_post_i = g_i . y."""
    sizes, rounds = Sizes.of(x), dtype_name(g.dtype) != dtype_name(x.dtype)
    outputs = {
        "dx": Out.like(x) if rounds else None,  # else g itself
        "dy": Out.like(y),
        "dh_post": Out((sizes.T, sizes.n), FLOAT32),
    }
    given = {"y": tokens(y, 1), "h_post": tokens(h_post, 1), "g": tokens(g, 2)}
    *dx, dy, dh_post = kernels("write_streams_vjp", given, outputs, sizes, ROUNDS=rounds)
    (dh_post,) = kernels.over_channels(dh_post)
    return dx[0] if rounds else g, dy, kernels.sum_to(dh_post, h_post, 1)


def inputs(x: Array, y: Array, h_post: Array, h_res: Array | None) -> dict[str, Array]:
    """Return the kernels' inputs, all tokens in one axis."""
    mixing = {} if h_res is None else {"h_res": tokens(h_res, 2)}
    return {"x": tokens(x, 2), "y": tokens(y, 1), "h_post": tokens(h_post, 1), **mixing}
