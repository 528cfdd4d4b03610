"""lucidrains' hyper-connections: its Sinkhorns, and its second mHC module with static mappings."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="hyper-connections",
    project="hyper-connections",
    where="hyper_connections.mHCv2",
    library="torch",
    pins=("hyper-connections==0.4.11", "torch-einops-utils==0.2.0", "einops==0.8.2"),
    versions=("hyper-connections", "torch"),
    needs={"torch": "torch"},
    cannot={
        "mappings": "projects each stream by itself, normalised over C: another form, without phi",
        "pre": "projects each stream by itself, normalised over C: another form, without phi",
    },
)


def _module() -> Any:
    return import_module("hyper_connections.mHCv2")


@peer.op("sinkhorn", free=("iterations",), fixed={"eps": 0.0, "first": "columns"})
def _sinkhorn(logits: Any, iterations: int, eps: float, first: str) -> Any:
    return _module().log_domain_sinkhorn_knopps(logits, iterations)


@peer.op("static_layer", free=("eps", "iterations"), dtypes=("float32",))
def _static_layer(
    x: Any,
    h_pre_raw: Any,
    h_post_raw: Any,
    h_res_raw: Any,
    rms_weight: Any,
    eps: float,
    iterations: int,
) -> Any:
    import torch
    from torch.func import functional_call

    class Branch(torch.nn.Module):
        """The layer of the static form, which is the person's and not the library's."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(x.shape[-1]))

        def forward(self, h: Any) -> Any:
            return torch.nn.functional.rms_norm(h, h.shape[-1:], self.weight, eps)

    n = x.shape[-2]
    module = _module().ManifoldConstrainedHyperConnections(
        n, dim=x.shape[-1], branch=Branch(), layer_index=0, sinkhorn_iters=iterations
    )
    parameters = {
        "static_alpha": torch.cat((h_pre_raw[:, None], h_res_raw.transpose(0, 1)), -1),
        "static_beta": h_post_raw.view(module.static_beta.shape),
        "branch.weight": rms_weight,
    }
    return functional_call(module, parameters, (x,))


@peer.op("expand")
def _expand(h: Any, n: int) -> Any:
    return _module().get_expand_reduce_stream_functions(n)[0](h)


@peer.op("contract", fixed={"how": "sum"})
def _contract(x: Any, how: str) -> Any:
    return _module().get_expand_reduce_stream_functions(x.shape[-2])[1](x)


exp_start = Peer(
    name="hyper-connections:exp",
    project="hyper-connections",
    where="hyper_connections.mHCv2",
    library="torch",
    pins=peer.pins,
    versions=peer.versions,
    needs=peer.needs,
)


@exp_start.op("sinkhorn", free=("iterations",), fixed={"eps": 0.0, "first": "columns"})
def _divided(logits: Any, iterations: int, eps: float, first: str) -> Any:
    return _module().sinkhorn_knopps(logits, iterations)


PEERS = (peer, exp_start)
