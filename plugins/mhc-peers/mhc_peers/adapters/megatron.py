"""Megatron-LM: its HyperConnectionModule, from a checkout."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

peer = Peer(
    name="megatron-lm",
    project="Megatron-LM",
    where="megatron.core.transformer.hyper_connection",
    library="torch",
    versions=("torch",),
    needs={"torch": "torch"},
    checkout="megatron-lm",
    reads="megatron/core/transformer/hyper_connection.py",
    environment={"TORCHDYNAMO_DISABLE": "1"},
)


class _Absent(ModuleType):
    """A module in the place of triton: the kernels of experts are declared with it, not run."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def declares(*given: Any, **_: Any) -> Any:
            return given[0] if given and callable(given[0]) else declares

        return declares


def _nothing(*_: Any) -> Any:
    """Return a range that does nothing."""
    return contextlib.nullcontext()


@functools.cache
def _class() -> Any:
    import torch
    from torch.utils._triton import has_triton_package

    if not torch.cuda.is_available():  # its ranges for a profiler need CUDA
        nvtx: Any = torch.cuda.nvtx
        nvtx.range = _nothing
        nvtx.range_push = nvtx.range_pop = _nothing
    if importlib.util.find_spec("triton") is None:
        has_triton_package()  # which torch remembers: it has none
        triton, language = _Absent("triton"), _Absent("triton.language")
        triton.language = language  # type: ignore[attr-defined]
        sys.modules |= {"triton": triton, "triton.language": language}
    module = importlib.import_module("megatron.core.transformer.hyper_connection")
    return module.HyperConnectionModule


def _module(x: Any, variant: Any) -> Any:
    config = SimpleNamespace(
        mhc_num_residual_streams=x.shape[-2],
        hidden_size=x.shape[-1],
        mhc_sinkhorn_iterations=variant.sinkhorn_iterations if variant else 20,
        mhc_init_gating_factor=1.0,
        perform_initialization=False,
        sequence_parallel=False,
    )
    return _class()(config, 0)


@peer.op(
    "pre",
    released="PAPER",
    fixed={"norm_eps": 0.0, "norm_root_eps": 1e-6, "sinkhorn_first": "rows"},
    free=("sinkhorn_iterations",),
    dtypes=("float32",),
)
def _pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    from torch.func import functional_call

    parameters = {
        "mapping_proj.weight": phi,
        "alpha_pre": scale[0:1],
        "alpha_post": scale[1:2],
        "alpha_res": scale[2:3],
        "bias": bias,
    }
    h, h_res, h_post = functional_call(_module(x, variant), parameters, (x.flatten(-2),))
    return h, h_post, h_res


@peer.op("aggregate")
def _aggregate(x: Any, h_pre: Any) -> Any:
    return _module(x, None).aggregate(x.flatten(-2), h_pre)


@peer.op("combine", dtypes=("float32",))
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    made = _module(x, None).fused_h_res_h_post_bda(
        h_res, x.flatten(-2), h_post, (y, None), 0.0, False, False
    )
    return made.view(x.shape)


@peer.op("expand")
def _expand(h: Any, n: int) -> Any:
    return _class().input_expand(h, n).view(*h.shape[:-1], n, h.shape[-1])


@peer.op("contract", fixed={"how": "mean"})
def _contract(x: Any, how: str) -> Any:
    return _class().output_contract(x.flatten(-2), x.shape[-2])


PEERS = (peer,)
