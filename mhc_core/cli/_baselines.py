"""The baselines of ``mhc bench``: other people's formulas, and other people's packages.

A baseline has functions with the names of our ops, which take the same arrays; ``gated_layer`` is
static_mappings, pre_scale and gated_combine in one. Nothing is imported before
:attr:`Baseline.load` is called.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["BASELINES", "Baseline"]

Array = Any
Forward = Callable[..., Any]

NORM_EPS = EPS = 1e-6  # of DeepSeek-V4
ITERATIONS = 20
RMS_EPS = 1e-5  # of static_layer


@dataclass(frozen=True)
class Baseline:
    """One baseline to compare with.

    Attributes
    ----------
    name
        The name to write after ``--vs``.
    library
        The array library that it runs on; it is compared with the backends of that library.
    package
        The distribution that must be installed for it. Its import name proves nothing: mhc-drop-in
        provides our own modules under two of these names.
    what
        The code that is compared, in a sentence.
    load
        Returns its functions by name.
    uncompilable
        Why it cannot run inside mx.compile, or None.
    start
        Starts it in a process of its own, which times it, given the checkouts that a person named;
        None for one that runs in this process, by ``load``.
    """

    name: str
    library: str
    package: str
    what: str
    load: Callable[[], Mapping[str, Forward]]
    uncompilable: str | None = None
    start: Callable[[Mapping[str, Path]], Any] | None = None

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        try:
            version(self.package)
        except PackageNotFoundError:
            return f"{self.package} is not installed"
        return None


# ------------------------------------------------------------------------------- mlx-vlm's formulas


def _mlx_vlm() -> dict[str, Forward]:
    """Return the functions that mlx-vlm's deepseek_v4 runs without Metal, compiled as there."""
    import mlx.core as mx

    tile = 256  # tokens that are projected at a time

    def project(z: Array, phi: Array) -> Array:
        length = z.shape[1]
        if length <= tile:
            return z @ phi.T
        z = mx.pad(z, [(0, 0), (0, -length % tile), (0, 0)])
        starts = range(0, length, tile)
        tiles = [mx.contiguous(z[:, start : start + tile]) @ phi.T for start in starts]
        return mx.concatenate(tiles, axis=1)[:, :length]

    @mx.compile
    def split(mixes: Array, scale: Array, bias: Array, n: int) -> tuple[Array, Array, Array]:
        h_pre = mx.sigmoid(mixes[..., :n] * scale[0] + bias[:n]) + EPS
        h_post = 2 * mx.sigmoid(mixes[..., n : 2 * n] * scale[1] + bias[n : 2 * n])
        logits = mixes[..., 2 * n :] * scale[2] + bias[2 * n :]
        comb = mx.softmax(logits.reshape(*mixes.shape[:-1], n, n), axis=-1, precise=True) + EPS
        comb = comb / (comb.sum(axis=-2, keepdims=True) + EPS)
        for _ in range(ITERATIONS - 1):
            comb = comb / (comb.sum(axis=-1, keepdims=True) + EPS)
            comb = comb / (comb.sum(axis=-2, keepdims=True) + EPS)
        return h_pre, h_post, comb

    def collapse(x: Array, phi: Array, scale: Array, bias: Array) -> tuple[Array, ...]:
        upcast = x.astype(mx.float32)
        mixes = project(mx.fast.rms_norm(upcast.flatten(-2), None, NORM_EPS), phi)
        h_pre, h_post, comb = split(mixes, scale, bias, x.shape[-2])
        h = (h_pre[..., None] * upcast).sum(axis=-2).astype(x.dtype)
        return h, h_pre, h_post, comb

    def pre(x: Array, *projection: Array) -> tuple[Array, Array, Array]:
        h, _, h_post, comb = collapse(x, *projection)
        return h, h_post, comb.swapaxes(-1, -2)

    @mx.compile
    def expand(x: Array, y: Array, h_post: Array, comb: Array) -> Array:
        written = h_post[..., None] * y[..., None, :].astype(mx.float32)
        mixed = mx.matmul(comb.swapaxes(-1, -2), x.astype(mx.float32))
        return (written + mixed).astype(x.dtype)

    def combine(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
        return expand(x, y, h_post, h_res.swapaxes(-1, -2))

    def combine_pre(x: Array, y: Array, h_post: Array, h_res: Array, *projection: Array) -> Any:
        x = combine(x, y, h_post, h_res)
        h, h_pre, h_post, comb = collapse(x, *projection)
        return x, h, h_pre, h_post, comb.swapaxes(-1, -2)

    return {"pre": pre, "combine": combine, "combine_pre": combine_pre}


# ------------------------------------------------------------------------------------------ mlx-lm


def _mlx_lm() -> dict[str, Forward]:
    """Return the hyper-connection of mlx-lm's deepseek_v41, with its layer's steps around it."""
    v41: Any = import_module("mlx_lm.models.deepseek_v41")

    @functools.cache
    def connection(n: int, C: int) -> Any:
        return v41.HyperConnection(
            v41.ModelArgs(hidden_size=C, hc_mult=n, hc_sinkhorn_iters=ITERATIONS, hc_eps=EPS)
        )

    def mapped(x: Array, phi: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
        own = connection(*x.shape[-2:])
        own.fn, own.scale, own.base, own.norm_eps = phi, scale, bias, NORM_EPS
        h_pre, h_post, comb = own(x)
        return h_pre, h_post, comb.swapaxes(-1, -2)

    def pre(x: Array, *projection: Array) -> tuple[Array, Array, Array]:
        h_pre, h_post, h_res = mapped(x, *projection)
        return v41._collapse(x, h_pre), h_post, h_res

    def combine(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
        return v41._expand(y, x, h_post, h_res.swapaxes(-1, -2))

    def combine_pre(x: Array, y: Array, h_post: Array, h_res: Array, *projection: Array) -> Any:
        x = combine(x, y, h_post, h_res)
        h_pre, h_post, h_res = mapped(x, *projection)
        return x, v41._collapse(x, h_pre), h_pre, h_post, h_res

    aggregate: Forward = v41._collapse
    return {"pre": pre, "combine": combine, "combine_pre": combine_pre, "aggregate": aggregate}


# --------------------------------------------------------------------------------------- plain JAX


def _jax() -> dict[str, Forward]:
    """Return the same formulas as plain JAX, each jitted whole, without any custom vjp."""
    import jax
    import jax.numpy as jnp

    def collapse(x: Array, phi: Array, scale: Array, bias: Array) -> tuple[Array, ...]:
        n, upcast = x.shape[-2], x.astype(jnp.float32)
        flat = upcast.reshape(*x.shape[:-2], -1)
        r = jax.lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + NORM_EPS)
        mixes = (flat @ phi.T) * r
        h_pre = jax.nn.sigmoid(mixes[..., :n] * scale[0] + bias[:n]) + EPS
        h_post = 2 * jax.nn.sigmoid(mixes[..., n : 2 * n] * scale[1] + bias[n : 2 * n])
        logits = mixes[..., 2 * n :] * scale[2] + bias[2 * n :]
        comb = jax.nn.softmax(logits.reshape(*mixes.shape[:-1], n, n), axis=-1) + EPS
        comb = comb / (comb.sum(axis=-2, keepdims=True) + EPS)
        for _ in range(ITERATIONS - 1):
            comb = comb / (comb.sum(axis=-1, keepdims=True) + EPS)
            comb = comb / (comb.sum(axis=-2, keepdims=True) + EPS)
        h = aggregate(x, h_pre)
        return h, h_pre, h_post, comb.swapaxes(-1, -2)

    def aggregate(x: Array, h_pre: Array) -> Array:
        return jnp.einsum("...n,...nc->...c", h_pre, x.astype(jnp.float32)).astype(x.dtype)

    def pre(x: Array, *projection: Array) -> tuple[Array, Array, Array]:
        h, _, h_post, h_res = collapse(x, *projection)
        return h, h_post, h_res

    def combine(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
        mixed = jnp.matmul(h_res, x.astype(jnp.float32))
        return (mixed + h_post[..., None] * y[..., None, :].astype(jnp.float32)).astype(x.dtype)

    def combine_pre(x: Array, y: Array, h_post: Array, h_res: Array, *projection: Array) -> Any:
        x = combine(x, y, h_post, h_res)
        return x, *collapse(x, *projection)

    functions = (pre, combine, combine_pre, aggregate)
    return {function.__name__: jax.jit(function) for function in functions}


# ---------------------------------------------------------------------------- the two MLX packages


def _mhc_mlx() -> dict[str, Forward]:
    """Return mhc-mlx's MHCLayer; without Metal it runs its own reference path."""
    import mlx.core as mx

    MHCLayer: Any = import_module("mhc_mlx").MHCLayer
    disabled = os.environ.get("MHC_MLX_DISABLE_METAL") == "1"
    metal = mx.metal.is_available() and not disabled

    def static_layer(x: Array, pre: Array, post: Array, res: Array, weight: Array) -> Array:
        layer = MHCLayer(*x.shape[-2:], ITERATIONS, RMS_EPS, use_metal=metal)
        layer.H_pre_raw, layer.H_post_raw, layer.H_res_raw = pre, post, res
        layer.rms_weight = weight
        return layer(x.reshape(-1, *x.shape[-2:])).reshape(x.shape)

    return {"static_layer": static_layer}


def _mlx_mhc() -> dict[str, Forward]:
    """Return mlx-mhc's ManifoldHyperConnection in its two-stage form, around a layer F."""
    import mlx.core as mx

    ManifoldHyperConnection: Any = import_module("mlx_mhc").ManifoldHyperConnection

    def module(x: Array, n: int, pre: Array, post: Array, res: Array) -> Any:
        layer = ManifoldHyperConnection(x.shape[-1], n, ITERATIONS)
        layer.h_pre_raw, layer.h_post_raw, layer.h_res_raw = pre, post, res
        return layer

    def gated_layer(x: Array, pre: Array, post: Array, res: Array) -> Array:
        layer = module(x, pre.shape[-1], pre, post, res)
        return layer.post_combine(x, layer.pre_scale(x))

    def static_layer(x: Array, pre: Array, post: Array, res: Array, weight: Array) -> Array:
        n = x.shape[-2]
        # sigmoid(100) = 1 and 2 sigmoid(0) = 1
        layer = module(x.reshape(*x.shape[:-2], -1), n, mx.full((n,), 100.0), mx.zeros((n,)), res)
        h = (mx.sigmoid(pre)[:, None] * x).sum(axis=-2)
        y = 2 * mx.sigmoid(post)[:, None] * mx.fast.rms_norm(h, weight, RMS_EPS)[..., None, :]
        flat = (*x.shape[:-2], n * x.shape[-1])
        return layer.post_combine(x.reshape(flat), y.reshape(flat)).reshape(x.shape)

    return {"gated_layer": gated_layer, "static_layer": static_layer}


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "mlx-vlm",
            "mlx",
            "mlx",
            "the formulas of mlx-vlm's deepseek_v4 outside Metal, written again here, with the "
            "parts compiled that it compiles; gradients by MLX's autodiff",
            _mlx_vlm,
        ),
        Baseline(
            "mlx-lm",
            "mlx",
            "mlx-lm",
            "the hyper-connection of its deepseek_v41 and what its layer does around it; gradients "
            "by MLX's autodiff",
            _mlx_lm,
        ),
        Baseline(
            "jax",
            "jax",
            "jax",
            "the same formulas in plain JAX, jitted whole; gradients by JAX's autodiff",
            _jax,
        ),
        Baseline(
            "mhc-mlx",
            "mlx",
            "mhc-mlx",
            "MHCLayer, with Metal where there is one and else its reference path: the same "
            "function as static_layer",
            _mhc_mlx,
        ),
        Baseline(
            "mlx-mhc",
            "mlx",
            "mlx-mhc",
            "ManifoldHyperConnection, dims = n * C; gated_layer: its two stages around an F "
            "that is the identity, the same function as static_mappings, pre_scale and "
            "gated_combine; static_layer: its H_pre and H_post, which would gate the residual "
            "too, held at 1, with aggregate, norm and H_post inside F, so that it is the same "
            "function",
            _mlx_mhc,
            "mlx-mhc reads array values in its loop, which mx.compile does not allow",
        ),
    )
}
