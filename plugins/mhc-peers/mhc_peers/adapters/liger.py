"""Liger-Kernel: its Triton kernels, through the functions that its module calls."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_peers.declaration import Peer
from mhc_peers.triton import fix_interpreter

__all__ = ["PEERS"]

peer = Peer(
    name="liger",
    project="Liger-Kernel",
    where="liger_kernel.transformers.functional",
    library="torch",
    pins=("liger-kernel==0.8.5",),
    versions=("liger-kernel", "triton", "torch"),
    needs={"torch": "torch"},
    triton="triton==3.9.0",
    # tl.arange(0, HC) of its kernels
    sizes=lambda n, C: None if n >= 2 and not n & (n - 1) else "takes 2, 4, 8, ... streams",
)

FREE = (
    "norm_eps",
    "pre_eps",
    "post_scale",
    "sinkhorn_iterations",
    "sinkhorn_eps",
)


def _functional() -> Any:
    fix_interpreter()
    return import_module("liger_kernel.transformers.functional")


@peer.op("mappings", released="LIGER", free=FREE)
def _mappings(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    return _functional().liger_mhc_coeffs(
        x,
        phi.transpose(0, 1),
        bias,
        *scale.unbind(0),
        allow_fp32=True,
        tmax=variant.sinkhorn_iterations,
        rms_eps=variant.norm_eps,
        pre_eps=variant.pre_eps,
        sinkhorn_eps=variant.sinkhorn_eps,
        post_mult=variant.post_scale,
    )


@peer.op("aggregate")
def _aggregate(x: Any, h_pre: Any) -> Any:
    return _functional().liger_mhc_pre(x, h_pre)


@peer.op("combine")
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    return _functional().liger_mhc_post_res(x, y, h_post, h_res)


PEERS = (peer,)
