"""tokamax: its mHC by XLA, which runs on any device."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="tokamax",
    project="tokamax",
    where="tokamax mhc_pre, mhc_post and mhc_fused_post_pre, implementation xla",
    library="jax",
    python="3.12",
    pins=(
        "tokamax==0.0.17",
        "jax==0.12.0.1",
        "jaxlib==0.12.0.1",
    ),
    versions=("tokamax", "jax"),
    dtypes=("bfloat16",),
)

FREE = ("norm_eps", "pre_eps", "post_scale", "sinkhorn_iterations", "sinkhorn_eps")


def _constants(variant: Any) -> tuple[Any, ...]:
    return (
        variant.norm_eps,
        variant.pre_eps,
        variant.sinkhorn_eps,
        variant.post_scale,
        variant.sinkhorn_iterations,
    )


def _api() -> Any:
    return import_module("tokamax._src.ops.mhc.api")


def _flat(x: Any) -> Any:
    n, C = x.shape[-2:]
    return x.reshape(-1, n * C)


def _shaped(x: Any, h: Any, post: Any, comb: Any) -> Any:
    leading, n = x.shape[:-2], x.shape[-2]
    comb = comb.reshape(*leading, n, n).swapaxes(-1, -2)
    return h.reshape(*leading, x.shape[-1]), post.reshape(*leading, n), comb


@peer.op("pre", released="DEEPSEEK_V4", free=FREE)
def _pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    post, comb, h = _api().mhc_pre(
        _flat(x), phi, scale, bias, *_constants(variant), implementation="xla"
    )
    return _shaped(x, h, post, comb)


@peer.op("combine")
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    n, C = x.shape[-2:]
    comb = h_res.swapaxes(-1, -2).reshape(-1, n, n)
    made = _api().mhc_post(
        y.reshape(-1, C), _flat(x), h_post.reshape(-1, n), comb, implementation="xla"
    )
    return made.reshape(x.shape)


PEERS = (peer,)
