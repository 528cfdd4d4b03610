"""mlx-mhc: its Sinkhorn, and its module with shared mappings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="mlx-mhc",
    project="mlx-mhc",
    where="mlx_mhc.ManifoldHyperConnection",
    library="mlx",
    pins=("mlx-mhc==0.4.1",),
    versions=("mlx-mhc", "mlx"),
    needs={"mlx.core": "mlx[cpu]"},
)


@peer.op(
    "sinkhorn_knopp",
    free=("max_iterations", "epsilon", "log_space"),
    fixed={"alone": True},
    dtypes=("float32",),
)
def _knopp(matrix: Any, max_iterations: int, epsilon: float, log_space: bool) -> Any:
    return import_module("mlx_mhc").sinkhorn_knopp(matrix, max_iterations, epsilon, log_space)


def _connection(n: int, size: int, iterations: int = 20) -> Any:
    return import_module("mlx_mhc").ManifoldHyperConnection(size, n, iterations)


@peer.op("static_mappings", free=("iterations",), fixed={"alone": True}, dtypes=("float32",))
def _mappings(h_pre_raw: Any, h_post_raw: Any, h_res_raw: Any, iterations: int) -> Any:
    module = _connection(h_pre_raw.shape[-1], h_pre_raw.shape[-1], iterations)
    module.h_pre_raw, module.h_post_raw, module.h_res_raw = h_pre_raw, h_post_raw, h_res_raw
    return module._project_h_pre(), module._project_h_post(), module._project_h_res()


@peer.op("gated_combine", fixed={"shared": True})
def _combine(x: Any, y: Any, h_pre: Any, h_post: Any, h_res: Any) -> Any:
    module = _connection(h_pre.shape[-1], x.shape[-1])
    module.eval()  # where it takes the mappings that it keeps
    module._cached_h_pre, module._cached_h_post, module._cached_h_res = h_pre, h_post, h_res
    return module.post_combine(x, y)


PEERS = (peer,)
