"""mlx-lm: the connection of DeepSeek-V4.1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

deepseek_v41 = Peer(
    name="mlx-lm:deepseek_v41",
    project="mlx-lm",
    where="mlx_lm.models.deepseek_v41",
    library="mlx",
    pins=("mlx-lm==0.32.2",),
    versions=("mlx-lm", "mlx"),
    needs={"mlx.core": "mlx[cpu]", "transformers": "transformers"},
)


def _module() -> Any:
    from mlx_lm.models import deepseek_v41

    return deepseek_v41


@deepseek_v41.op(
    "mappings",
    released="DEEPSEEK_V41",
    free=("norm_eps", "sinkhorn_iterations", ("pre_eps", "sinkhorn_eps")),
)
def _mappings(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    connection = _module().HyperConnection(
        SimpleNamespace(
            hc_mult=x.shape[-2],
            hidden_size=x.shape[-1],
            hc_sinkhorn_iters=variant.sinkhorn_iterations,
            hc_eps=variant.pre_eps,
            rms_norm_eps=variant.norm_eps,
        )
    )
    connection.fn, connection.scale, connection.base = phi, scale, bias
    pre, post, comb = connection(x)
    return pre, post, comb.swapaxes(-1, -2)


@deepseek_v41.op("aggregate")
def _aggregate(x: Any, h_pre: Any) -> Any:
    return _module()._collapse(x, h_pre)


@deepseek_v41.op("combine")
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    return _module()._expand(y, x, h_post, h_res.swapaxes(-1, -2))


PEERS = (deepseek_v41,)
