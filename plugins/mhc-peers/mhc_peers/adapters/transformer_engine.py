"""TransformerEngine: its Triton kernels, by the two files of a checkout."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mhc_peers.declaration import Peer
from mhc_peers.files import checkout
from mhc_peers.triton import fix_interpreter

__all__ = ["PEERS", "functions"]

peer = Peer(
    name="transformer-engine",
    project="TransformerEngine",
    where="transformer_engine/common/triton/mhc.py, transformer_engine/pytorch/triton/mhc.py",
    library="torch",
    versions=("triton", "torch"),
    needs={"torch": "torch"},
    checkout="transformer-engine",
    reads="transformer_engine/pytorch/triton/mhc.py",
    triton="triton==3.9.0",
    sizes=lambda n, C: None if n == 4 else "takes 4 streams",
)


def functions() -> Any:
    """Return the file of the torch functions, with the packages around it left out."""
    import importlib
    import sys

    import torch

    name = "transformer_engine.pytorch.triton.mhc"
    if name in sys.modules:
        return sys.modules[name]
    root = checkout() / "transformer_engine"
    for package in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        module = ModuleType(f"transformer_engine{package}")
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules[module.__name__] = module
    gemm = ModuleType("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.general_gemm = _gemm  # type: ignore[attr-defined]
    sys.modules["transformer_engine.pytorch.cpp_extensions"] = ModuleType("cpp_extensions")
    sys.modules[gemm.__name__] = gemm
    fix_interpreter()
    module: Any = importlib.import_module(name)
    if not torch.cuda.is_available():
        module._support_tma = _false
    return module


def _false(_: Any) -> bool:
    return False


def _gemm(a: Any, b: Any, out_dtype: Any, layout: str) -> tuple[Any]:
    """Return what cuBLAS would, in the one layout that is asked for."""
    assert layout == "NT"
    return ((b.transpose(0, 1) @ a).to(out_dtype),)


def _in_order(phi: Any, n: int) -> Any:
    """Return phi for vectors in which a channel's streams are side by side."""
    return phi.unflatten(-1, (n, -1)).transpose(-1, -2).flatten(-2)


@peer.op(
    "mappings",
    released="PAPER",
    fixed={"norm_eps": 2.0**-23, "res_transposed": True},
    free=("sinkhorn_iterations",),
)
def _mappings(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    module, (n, C), leading = functions(), x.shape[-2:], x.shape[:-2]
    streams = x.transpose(-1, -2).reshape(-1, n * C).contiguous()
    H, ms = module.mhc_fused_projection(streams, _in_order(phi, n), use_tf32=False)
    H_pre, H_post, logits = module.mhc_fused_scale(H, scale, bias[None], ms, n)
    logits = logits.reshape(*leading, n, n).contiguous()
    comb = module.mhc_fused_sinkhorn(logits, n, True, variant.sinkhorn_iterations)
    return H_pre.reshape(*leading, n), H_post.reshape(*leading, n), comb.transpose(-1, -2)


@peer.op("sinkhorn", free=("iterations",), fixed={"eps": 0.0, "first": "rows"}, dtypes=("float32",))
def _sinkhorn(logits: Any, iterations: int, eps: float, first: str) -> Any:
    flat = logits.contiguous()
    return functions().mhc_fused_sinkhorn(flat, flat.shape[-1], True, iterations)


@peer.op("aggregate")
def _aggregate(x: Any, h_pre: Any) -> Any:
    streams = x.transpose(-1, -2).contiguous()
    return functions().mhc_fused_aggregate(streams, h_pre, x.shape[-2], use_tf32=False)


@peer.op("combine")
def _combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    streams = x.transpose(-1, -2).contiguous()
    made = functions().mhc_fused_expand_combine(
        y, None, h_post, streams, h_res.transpose(-1, -2).contiguous(), x.shape[-2], use_tf32=False
    )
    return made.transpose(-1, -2)


PEERS = (peer,)
