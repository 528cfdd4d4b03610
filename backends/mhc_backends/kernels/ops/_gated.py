"""The common part of the gated ops: their three launches."""

from __future__ import annotations

from mhc_backends.kernels import launch
from mhc_backends.kernels.host import FLOAT32, Array, Kernels, Out, Sizes, dtype_name, tokens

__all__ = ["gated"]


def gated(
    kernels: Kernels,
    x: Array,
    norm: Array,
    down: Array,
    up: Array,
    inject: Array | None,
    eps: float,
) -> tuple[Array, Array | None]:
    """Return h and, with inject, H_post.

    The kernels need no u: ``gated_project`` multiplies x as it is by ``(1 + norm) down``,
    ``gated_low`` scales the products of each stream by its 1 / rms, and ``gated_collapse`` makes
    the numbers of u that it sums.
    """
    sizes, ahead = Sizes.of(x), x.shape[:-2]
    T, n, C = sizes
    rank, injects = down.shape[0], inject is not None
    streams = tokens(x, 2)
    chosen = {
        "COLUMN_TILES": launch.GATED_TILES,
        "TOKEN_TILES": launch.gated_token_tiles(T, n, dtype_name(x.dtype)),
        "STEPS": launch.gated_steps(n, C),
        "WHOLE": launch.whole_streams(T, n),
        "INJECTS": injects,
    }
    inputs = {"x": streams, "norm": norm, "down": down, "inject": inject if injects else down}
    out = Out((T, n * launch.gated_parts(T, n, C), launch.gated_width(rank, n * injects)), FLOAT32)
    (partials,) = kernels("gated_project", inputs, {"partials": out}, sizes, **chosen)

    inputs = {"partials": partials, "settings": kernels.host.constant([eps, C, rank])}
    outputs: dict[str, Out | None] = {
        "low": Out((T, rank), FLOAT32),
        "r": Out((T, n), FLOAT32),
        "h_post": Out((*ahead, n), FLOAT32) if injects else None,
    }
    columns = Sizes(T, n, rank + n * injects)
    low, r, *h_post = kernels("gated_low", inputs, outputs, columns, INJECTS=injects)

    inputs = {"x": streams, "norm": norm, "up": up, "low": low, "r": r}
    made, tiles = {"h": Out((*ahead, C), x.dtype)}, launch.channel_tiles(T, C)
    (h,) = kernels("gated_collapse", inputs, made, sizes, COLUMN_TILES=tiles)
    return h, h_post[0] if h_post else None
