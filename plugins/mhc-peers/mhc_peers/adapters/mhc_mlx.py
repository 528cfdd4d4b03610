"""mhc-mlx: its layer with static mappings, and the references of its kernels."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="mhc-mlx",
    project="mhc-mlx",
    where="mhc_mlx.MHCLayer, mhc_mlx.reference",
    library="mlx",
    pins=("mhc-mlx==0.6.3",),
    versions=("mhc-mlx", "mlx"),
    needs={"mlx.core": "mlx[cpu]"},
)


@peer.op("static_mappings", free=("iterations",), fixed={"alone": True}, dtypes=("float32",))
def _mappings(h_pre_raw: Any, h_post_raw: Any, h_res_raw: Any, iterations: int) -> Any:
    reference: Any = import_module("mhc_mlx.reference")

    h_pre, h_post = reference.activate_pre_post(h_pre_raw, h_post_raw)
    return h_pre, h_post, reference.mixing_matrix_from_logits(h_res_raw, iterations)


@peer.op("static_layer", free=("eps", "iterations"))
def _layer(
    x: Any,
    h_pre_raw: Any,
    h_post_raw: Any,
    h_res_raw: Any,
    rms_weight: Any,
    eps: float,
    iterations: int,
) -> Any:
    MHCLayer: Any = import_module("mhc_mlx").MHCLayer

    n, C = x.shape[-2:]
    layer = MHCLayer(n=n, C=C, sinkhorn_iters=iterations, eps=eps)
    layer.H_pre_raw, layer.H_post_raw, layer.H_res_raw = h_pre_raw, h_post_raw, h_res_raw
    layer.rms_weight = rms_weight
    return layer(x.reshape(-1, n, C)).reshape(x.shape)


@peer.op("aggregate", fixed={"shared": True}, dtypes=("float32",))
def _aggregate(x: Any, h_pre: Any) -> Any:
    reference: Any = import_module("mhc_mlx.reference")

    n, C = x.shape[-2:]
    return reference.stream_aggregate(x.reshape(-1, n, C), h_pre).reshape(*x.shape[:-2], C)


@peer.op("combine", fixed={"shared": True}, dtypes=("float32",))
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    reference: Any = import_module("mhc_mlx.reference")

    n, C = x.shape[-2:]
    mixed = reference.stream_mix_ref(x.reshape(-1, n, C), h_res)
    return (mixed + reference.stream_distribute(y.reshape(-1, C), h_post)).reshape(x.shape)


PEERS = (peer,)
