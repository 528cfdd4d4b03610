"""TileKernels: DeepSeek's own torch references, read as one file (the package needs a GPU)."""

from __future__ import annotations

from typing import Any

from mhc_peers.declaration import Peer
from mhc_peers.files import load_file

__all__ = ["PEERS"]

peer = Peer(
    name="tile-kernels",
    project="TileKernels",
    where="tile_kernels/torch/mhc.py",
    library="torch",
    pins=("tile-kernels==2.1.0",),
    versions=("tile-kernels", "torch"),
    needs={"torch": "torch"},
)


def _module() -> Any:
    return load_file("tile_kernels/torch/mhc.py")


def _mixes(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    module, n = _module(), x.shape[-2]
    mixes = module.mhc_pre_norm_fn_ref(x, phi, None, variant.norm_eps)
    pre, post, comb = module.mhc_pre_split_mixes_ref(
        mixes, scale, bias, n, variant.post_scale, variant.pre_eps
    )
    comb = module.sinkhorn_normalize_ref(comb, variant.sinkhorn_iterations, variant.sinkhorn_eps)
    return pre, post, comb


FREE = ("norm_eps", "pre_eps", "post_scale", "sinkhorn_iterations", "sinkhorn_eps")


@peer.op("mappings", released="DEEPSEEK_V4", free=FREE)
def _mappings(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    pre, post, comb = _mixes(x, phi, scale, bias, variant)
    return pre.squeeze(-1), post.squeeze(-1), comb.transpose(-1, -2)


@peer.op("pre", released="DEEPSEEK_V4", free=FREE, dtypes=("bfloat16",))
def _pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    pre, post, comb = _mixes(x, phi, scale, bias, variant)
    h = _module().mhc_pre_apply_mix_ref(x, pre)
    return h, post.squeeze(-1), comb.transpose(-1, -2)


@peer.op("sinkhorn", free=("iterations", "eps"), fixed={"first": "columns"}, dtypes=("float32",))
def _sinkhorn(logits: Any, iterations: int, eps: float, first: str) -> Any:
    comb = _module().sinkhorn_normalize_ref(logits.transpose(-1, -2), iterations, eps)
    return comb.transpose(-1, -2)


@peer.op("aggregate", dtypes=("bfloat16",))
def _aggregate(x: Any, h_pre: Any) -> Any:
    return _module().mhc_pre_apply_mix_ref(x, h_pre.unsqueeze(-1))


@peer.op("combine", dtypes=("bfloat16",))
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    return _module().mhc_post_ref(y, x, h_post.unsqueeze(-1), h_res.transpose(-1, -2))


@peer.op("expand")
def _expand(h: Any, n: int) -> Any:
    return _module().expand_to_mhc_ref(h, n)


PEERS = (peer,)
