"""The common part of the gated ops: their three launches, and those of their vjps."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhc_backends.kernels import launch
from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, dtype_name, tokens
from mhc_backends.kernels.ops import _projection

__all__ = ["Weights", "forward", "forward_with_saved", "vjp"]


class Weights(NamedTuple):
    """The weights of the norm and of the gates, and with ``inject`` those of H_post."""

    norm: Array
    down: Array
    up: Array
    inject: Array | None = None

    @property
    def columns(self) -> int:
        """The number of products of u: the rank and, with ``inject``, the streams."""
        return self.down.shape[0] + (0 if self.inject is None else self.inject.shape[0])


class Saved(NamedTuple):
    """The arrays that the vjp reads: each stream's products, the low rank, and r."""

    products: Array
    low: Array
    r: Array


def forward(kernels: Kernels, x: Array, weights: Weights, eps: float) -> tuple[Array, ...]:
    """Return h and, with inject, H_post."""
    low, r, *h_post = _low(kernels, x, weights, eps, saves=False)
    return _collapse(kernels, x, weights, low, r), *h_post


def forward_with_saved(
    kernels: Kernels, x: Array, weights: Weights, eps: float
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Return the outputs and, for the vjp, the numbers of :class:`Saved`."""
    low, r, *h_post, products = _low(kernels, x, weights, eps, saves=True)
    return (_collapse(kernels, x, weights, low, r), *h_post), Saved(products, low, r)


def _low(
    kernels: Kernels, x: Array, weights: Weights, eps: float, saves: bool
) -> tuple[Array, ...]:
    """Return the low rank, r, with inject H_post, and if it ``saves`` the products.

    The kernels need no u: ``gated_project`` multiplies x as it is by ``(1 + norm) down``,
    ``gated_low`` scales the products of each stream by its 1 / rms, and ``gated_collapse`` makes
    the numbers of u that it sums.
    """
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    T, n, _ = sizes
    rank, injects = weights.down.shape[0], weights.inject is not None
    inputs = {
        "x": tokens(x, 2),
        "norm": weights.norm,
        "down": weights.down,
        "inject": weights.inject if injects else weights.down,
    }
    width = launch.gated_width(rank, n * injects)
    (partials,) = _partials(kernels, "gated_project", x, inputs, width, INJECTS=injects)

    inputs = {"partials": partials, "settings": kernels.host.constant([eps, sizes.C, rank])}
    outputs: dict[str, Out | None] = {
        "low": Out((*ahead, rank), FLOAT32),
        "r": Out((*ahead, n), FLOAT32),
        "h_post": Out((*ahead, n), FLOAT32) if injects else None,
        "products": Out((*ahead, n, weights.columns), FLOAT32) if saves else None,
    }
    columns = Sizes(T, n, weights.columns)
    return tuple(kernels("gated_low", inputs, outputs, columns, INJECTS=injects, SAVES=saves))


def _partials(
    kernels: Kernels, name: str, x: Array, inputs: dict[str, Array], width: int, **chosen: int
) -> list[Array]:
    """Launch ``gated_project``, or ``gated_dlow``, which sums over the channels in its order."""
    sizes = Sizes.of(x)
    T, n, C = sizes
    chosen |= {
        "COLUMN_TILES": launch.GATED_TILES,
        "TOKEN_TILES": launch.gated_token_tiles(T, n, dtype_name(x.dtype)),
        "STEPS": launch.gated_steps(n, C),
        "WHOLE": launch.whole_streams(T, n),
    }
    out = Out((T, n * launch.gated_parts(T, n, C), width), FLOAT32)
    return kernels(name, inputs, {"partials": out}, sizes, **chosen)


def _collapse(kernels: Kernels, x: Array, weights: Weights, low: Array, r: Array) -> Array:
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    inputs = {"x": tokens(x, 2), "norm": weights.norm, "up": weights.up}
    inputs |= {"low": tokens(low, 1), "r": tokens(r, 1)}
    made, tiles = {"h": Out((*ahead, sizes.C), x.dtype)}, launch.channel_tiles(sizes.T, sizes.C)
    return kernels("gated_collapse", inputs, made, sizes, COLUMN_TILES=tiles)[0]


# ---- the vjp -------------------------------------------------------------------------------------


def vjp(
    kernels: Kernels, x: Array, weights: Weights, cotangents: Any, saved: Any, eps: float
) -> tuple[Array, ...]:
    """Return the gradients of x, norm, down, up and, if it is there, inject.

    ``gated_collapse_vjp`` makes the gates again and, from them, the cotangent of their logits,
    which ``gated_dlow`` and ``gated_dfactors`` multiply; ``gated_low_vjp`` goes back through the
    low rank, and ``gated_dx`` from both products with u to the streams.
    """
    if saved is None:
        low, r, *_, products = _low(kernels, x, weights, eps, saves=True)
        saved = Saved(products, low, r)
    products, low, r = (tokens(one, last) for one, last in zip(saved, (2, 1, 1), strict=True))
    sizes, (norm, down, up, inject) = Sizes.of(x), weights
    T, n, C = sizes
    rank, injects = down.shape[0], inject is not None
    streams, g = tokens(x, 2), tokens(cotangents[0], 1)
    tiles = launch.MANY_GATED_TILES
    gates = {"x": streams, "norm": norm, "up": up, "low": low, "r": r, "g": g}
    outputs = {
        "dz": Out((T, n, C), FLOAT32),  # which nothing rounds
        "sums": Out((T, n, -(-C // (tiles * launch.TILE_COLUMNS))), FLOAT32),
    }
    d_logits, sums = kernels("gated_collapse_vjp", gates, outputs, sizes, COLUMN_TILES=tiles)

    (partials,) = _partials(kernels, "gated_dlow", d_logits, {"dz": d_logits, "up": up}, rank)
    inputs = {
        "partials": partials,
        "products": products,
        "r": r,
        "sums": sums,
        "g_post": tokens(cotangents[1], 1) if injects else None,
    }
    outputs = {
        "dz": Out((T, launch.whole_steps(rank) + injects * launch.whole_steps(n)), FLOAT32),
        "scaled": Out((n, T, weights.columns), FLOAT32),
        "pulled": Out((T, n), FLOAT32),
    }
    columns = Sizes(T, n, weights.columns)
    dz, scaled, pulled = kernels("gated_low_vjp", inputs, outputs, columns, INJECTS=injects)

    inputs = {**gates, "down": down, "inject": inject if injects else down}
    inputs |= {"dz": dz, "pulled": pulled}
    outputs = {"dx": Out.like(x), "dnorm": Out((-(-T // launch.TILE_TOKENS), n * C), FLOAT32)}
    dx, dnorm = kernels("gated_dx", inputs, outputs, sizes, COLUMN_TILES=tiles, INJECTS=injects)

    dup = _factors(kernels, d_logits, norm, low.reshape(1, T, rank), (n * C, rank), of_up=True)
    factors = kernels.sum_rows(_factors(kernels, streams, norm, scaled, (weights.columns, n * C)))
    own = factors.reshape(weights.columns, n * C)
    cast = kernels.host.cast
    gradients = (
        dx,
        kernels.sum_to(dnorm, norm, 1),
        cast(own[:rank], down.dtype),
        kernels.sum_to(dup, up, 2),
    )
    return gradients if inject is None else (*gradients, cast(own[rank:], inject.dtype))


def _factors(
    kernels: Kernels,
    x: Array,
    norm: Array,
    du: Array,
    shape: tuple[int, int],
    of_up: bool = False,
) -> Array:
    """Launch ``gated_dfactors``; return a row for each share of the tokens."""
    sizes, narrow = Sizes.of(x), dtype_name(x.dtype) != FLOAT32
    tiles = _projection.column_tiles(du.shape[-1], _projection.DPHI_COLUMNS)
    steps = _projection.DPHI_STEPS
    stage, _ = _projection.staging(kernels, "gated_dfactors", x, tiles, steps, 2)
    shares = launch.shares("gated_dfactors", *sizes, kernels.dialect)
    inputs, outputs = {"x": x, "norm": norm, "du": du}, {"terms": Out((shares, *shape), FLOAT32)}
    chosen = {"COLUMN_TILES": tiles, "AHEAD": narrow, "OF_UP": of_up}
    (terms,) = kernels("gated_dfactors", inputs, outputs, sizes, None, stage, **chosen)
    return terms.reshape(shares, shape[0] * shape[1])
