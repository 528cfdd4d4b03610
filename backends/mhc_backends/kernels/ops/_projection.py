"""What the ops with a projection share: its launches, and the way back through it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mhc_backends.kernels import launch
from mhc_backends.kernels.mlx import Kernels, Out, Sizes, tokens
from mhc_backends.kernels.ops import combine
from mhc_core.variants import Variant

__all__ = [
    "Cotangents",
    "Projected",
    "back",
    "back_projection",
    "combine_project",
    "constants",
    "local_vjp",
    "mapped",
    "pre",
    "project",
    "settings",
    "summed",
    "weights_vjp",
]

DPHI_TILES = 4  # of 8 columns, whose sums a simdgroup keeps in registers
AT_ONCE = 2  # blocks of channels or of tokens that are under way together, of narrow numbers


class Projected(NamedTuple):
    """u = vec(x) @ phi.T and r = 1 / rms(x), float32, as ``mhc_core.math.mappings`` saves them."""

    u: mx.array
    r: mx.array


def settings(variant: Variant) -> mx.array:
    """Give the variant's numbers that kernels read."""
    v = variant
    return mx.array([v.norm_eps, v.pre_eps, v.post_scale, v.sinkhorn_eps], mx.float32)


def constants(variant: Variant) -> dict[str, int]:
    """Give the variant's choices that are compiled in."""
    return {
        "ITERATIONS": variant.sinkhorn_iterations,
        "LOG": variant.sinkhorn_eps == 0,
        "FIRST_COLUMNS": variant.sinkhorn_first == "columns",
        "TRANSPOSED": variant.res_transposed,
    }


def project(kernels: Kernels, x: mx.array, phi: mx.array) -> mx.array:
    """Give the sums over all channels, in parts."""
    sizes, columns = Sizes.of(x), _columns(phi)
    inputs, out = {"x": tokens(x, 2), "phi": phi}, _parts(sizes, phi)
    chosen = {
        "AT_ONCE": AT_ONCE if x.dtype != mx.float32 and columns <= 4 else 1,
        "TILES": columns,
        "LEAF_NUMBERS": launch.LEAF_NUMBERS,
        "HEIGHT": launch.HEIGHT,
    }
    name = "project_few" if launch.few(sizes.T, sizes.C) else "project"
    return kernels(name, inputs, {"parts": out}, sizes, **chosen)[0]


def combine_project(
    kernels: Kernels,
    x: mx.array,
    y: mx.array,
    h_post: mx.array,
    h_res: mx.array,
    phi: mx.array,
) -> tuple[mx.array, mx.array]:
    """Give x', and its sums over all channels, in parts."""
    sizes = Sizes.of(x)
    inputs = {**combine.inputs(x, y, h_post, h_res), "phi": phi}
    outputs = {"out": Out.like(x), "parts": _parts(sizes, phi)}
    chosen = {"TILES": _columns(phi), "LEAF_NUMBERS": launch.LEAF_NUMBERS, "AT_ONCE": 1}
    # every simdgroup of the former reads all streams, so it is for a tile of tokens alone
    few = sizes.T <= launch.TILE_TOKENS and launch.few(sizes.T, sizes.C)
    name = "combine_project_few" if few else "combine_project"
    x_new, parts = kernels(name, inputs, outputs, sizes, **chosen)
    return x_new, parts


def _parts(sizes: Sizes, phi: mx.array) -> Out:
    return Out((sizes.T, launch.parts(sizes.C), phi.shape[0] + 1), mx.float32)


def _columns(phi: mx.array) -> int:
    return -(-min(phi.shape[0], launch.COLUMNS_AT_ONCE) // 8)


# ---- the last stage ------------------------------------------------------------------------------


def mapped(n: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Give, per token, the mappings and what their vjp needs."""
    return {"h_pre": (n,), "h_post": (n,), "h_res": (n, n), "u": (columns,), "r": (1,)}


class Pre(NamedTuple):
    """What the kernel ``pre`` gives."""

    h: mx.array
    h_pre: mx.array
    h_post: mx.array
    h_res: mx.array
    u: mx.array
    r: mx.array


def pre(
    kernels: Kernels,
    x: mx.array,
    parts: mx.array,
    scale: mx.array,
    bias: mx.array,
    given: mx.array | None,
    variant: Variant,
) -> Pre:
    """Launch ``pre`` on the sums of x; h is weighted by ``given``, or else by H_pre."""
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    inputs = {
        "x": tokens(x, 2),
        "parts": parts,
        "given": tokens(scale if given is None else given, 1),
        "scale": scale,
        "bias": bias,
        "settings": settings(variant),
    }
    outputs = {
        "h": Out((*ahead, sizes.C), x.dtype),
        **{
            name: Out((*ahead, *last), mx.float32)
            for name, last in mapped(sizes.n, bias.size).items()
        },
    }
    chosen = {"GIVEN": given is not None, **constants(variant)}
    return Pre(*kernels("pre", inputs, outputs, sizes, **chosen))


# ---- the way back --------------------------------------------------------------------------------


def weights_vjp(kernels: Kernels, x: mx.array, dh: mx.array) -> mx.array:
    """Give dw[T, n], what h = sum_i w_i x_i gives its weights per token."""
    sizes = Sizes.of(x)
    inputs = {"x": tokens(x, 2), "dh": tokens(dh, 1)}
    outputs = {"dw": Out((sizes.T, sizes.n), mx.float32)}
    return kernels("weights_vjp", inputs, outputs, sizes)[0]


class Local(NamedTuple):
    """What the part of a vjp that knows one token gives.

    du is the cotangent of u and ``pull`` what the root mean square takes from x; ``terms`` are to
    be summed over the tokens, first dbias, then dscale.
    """

    du: mx.array
    pull: mx.array
    terms: mx.array


def local_vjp(
    kernels: Kernels,
    name: str,
    inputs: dict[str, mx.array],
    sizes: Sizes,
    groups: int,
    **constants: int,
) -> Local:
    """Launch ``mappings_vjp`` or ``head_vjp``."""
    columns = inputs["bias"].size
    outputs = {
        "du": Out((sizes.T, columns), mx.float32),
        "pull": Out((sizes.T, 1), mx.float32),
        "terms": Out((sizes.T, columns + groups), mx.float32),
    }
    return Local(*kernels(name, inputs, outputs, sizes, K=sizes.n * sizes.C, **constants))


def summed(
    kernels: Kernels, local: Local, scale: mx.array, bias: mx.array
) -> tuple[mx.array, mx.array]:
    """Give dscale and dbias."""
    total = kernels.sum_rows(local.terms)[0]
    return total[bias.size :].astype(scale.dtype), total[: bias.size].astype(bias.dtype)


def back_projection(
    kernels: Kernels,
    x: mx.array,
    phi: mx.array,
    local: Local,
    out: Out,
    w: mx.array | None = None,
    dh: mx.array | None = None,
    g: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Launch ``project_dx`` and ``project_dphi``; dx includes w_i dh and g where they are given."""
    sizes, nothing = Sizes.of(x), local.pull
    flat = tokens(x, 2)
    inputs = {
        "x": flat,
        "phi": phi,
        "du": local.du,
        "pull": local.pull,
        "w": nothing if w is None else tokens(w, 1),
        "dh": nothing if dh is None else tokens(dh, 1),
        "g": nothing if g is None else tokens(g, 2),
    }
    chosen = {"COLUMNS": phi.shape[0], "WITH_H": w is not None, "WITH_G": g is not None}
    (dx,) = kernels("project_dx", inputs, {"dx": out}, sizes, **chosen)

    shares = launch.shares("project_dphi", *sizes)
    partial = Out((shares, *phi.shape), mx.float32)
    tiles = min(-(-phi.shape[0] // 8), DPHI_TILES)
    inputs = {"x": flat, "du": local.du}
    (dphi,) = kernels(
        "project_dphi", inputs, {"dphi": partial}, sizes, TILES=tiles, AT_ONCE=AT_ONCE
    )
    return dx, kernels.sum_to(dphi, phi, 2)


class Cotangents(NamedTuple):
    """Those of the mappings; of h with its weights; and of the streams, beside what is computed."""

    h_pre: mx.array
    h_post: mx.array
    h_res: mx.array
    w: mx.array | None = None
    h: mx.array | None = None
    x: mx.array | None = None


def back(
    kernels: Kernels,
    x: mx.array,
    phi: mx.array,
    scale: mx.array,
    bias: mx.array,
    projected: Projected,
    given: Cotangents,
    variant: Variant,
    out: Out,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Give dx, dphi, dscale and dbias of the mappings of x, and of h where it has a cotangent."""
    inputs = {
        "u": tokens(projected.u, 1),
        "r": tokens(projected.r, 1),
        "scale": scale,
        "bias": bias,
        "g_pre": tokens(given.h_pre, 1),
        "g_post": tokens(given.h_post, 1),
        "g_res": tokens(given.h_res, 2),
        "settings": settings(variant),
    }
    local = local_vjp(kernels, "mappings_vjp", inputs, Sizes.of(x), groups=3, **constants(variant))
    dx, dphi = back_projection(kernels, x, phi, local, out, given.w, given.h, given.x)
    return dx, dphi, *summed(kernels, local, scale, bias)
