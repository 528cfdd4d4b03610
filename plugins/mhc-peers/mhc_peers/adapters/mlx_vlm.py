"""mlx-vlm: the connections of DeepSeek-V4 and V4.1, Xing4.0, HY-V4 and Qwen4-Exp."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]

PINS = ("mlx-vlm==0.7.10", "mlx-lm==0.32.2")
NEEDS = {
    "mlx.core": "mlx[cpu]",
    "transformers": "transformers",
    "requests": "requests",
    "PIL": "pillow",
}


def _peer(name: str, where: str, **declared: Any) -> Peer:
    return Peer(
        name=f"mlx-vlm:{name}",
        project="mlx-vlm",
        where=f"mlx_vlm.models.{where}",
        library="mlx",
        pins=PINS,
        versions=("mlx-vlm", "mlx"),
        needs=NEEDS,
        **declared,
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_vlm.models.{name}")


def _config(x: Any, variant: Any, eps: float) -> Any:
    clamp = variant.sinkhorn_clamp or (None, None)
    return SimpleNamespace(
        hc_mult=x.shape[-2],
        hidden_size=x.shape[-1],
        hc_sinkhorn_iters=variant.sinkhorn_iterations,
        hc_eps=eps,
        hc_magnitude=variant.post_scale,
        rms_norm_eps=variant.norm_eps,
        mhc_h_res_clamp_min=clamp[0],
        mhc_h_res_clamp_max=clamp[1],
    )


# --- DeepSeek-V4 ------------------------------------------------------------------------------

V4 = ("norm_eps", "sinkhorn_iterations", ("pre_eps", "sinkhorn_eps"))

deepseek_v4 = _peer("deepseek_v4", "deepseek_v4.hyper_connection")


@deepseek_v4.op("pre", released="DEEPSEEK_V4", free=V4)
def _v4_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    connection = _module("deepseek_v4.hyper_connection").HyperConnection(
        _config(x, variant, variant.pre_eps)
    )
    connection.fn, connection.scale, connection.base = phi, scale, bias
    h, post, comb = connection(x)
    return h, post, comb.swapaxes(-1, -2)


@deepseek_v4.op("combine")
def _v4_combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    module = _module("deepseek_v4.hyper_connection")
    return module.hc_expand(y, x, h_post, h_res.swapaxes(-1, -2))


@deepseek_v4.op("head", released="DEEPSEEK_V4", free=("norm_eps", "pre_eps"))
def _v4_head(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    head = _module("deepseek_v4.hyper_connection").HyperHead(_config(x, variant, variant.pre_eps))
    head.fn, head.scale, head.base = phi, scale, bias
    return head(x)


# --- DeepSeek-V4.1 ----------------------------------------------------------------------------

deepseek_v41 = _peer("deepseek_v41", "deepseek_v41.language")


@deepseek_v41.op("mappings", released="DEEPSEEK_V41", free=V4)
def _v41_mappings(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    pre, post, comb = _module("deepseek_v41.language").hc_mix_coeffs(
        x,
        phi,
        scale,
        bias,
        x.shape[-2],
        variant.sinkhorn_iterations,
        variant.pre_eps,
        variant.norm_eps,
    )
    return pre, post, comb.swapaxes(-1, -2)


@deepseek_v41.op("combine")
def _v41_combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    module = _module("deepseek_v41.language")
    return module.hc_expand(y, x, h_post, h_res.swapaxes(-1, -2))


# --- Xing4.0 ----------------------------------------------------------------------------------

xing4_0 = _peer("xing4_0", "xing4_0.language")


@xing4_0.op(
    "pre",
    released="XING40",
    free=("norm_eps", "sinkhorn_iterations", "sinkhorn_eps", "sinkhorn_clamp"),
)
def _xing_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    connection = _module("xing4_0.language").HyperConnection(
        _config(x, variant, variant.sinkhorn_eps)
    )
    connection.hc_fn, connection.hc_scale, connection.hc_base = phi, scale, bias
    post, comb, h = connection(x)
    return h, post, comb


# --- HY-V4 ------------------------------------------------------------------------------------

hy_v4 = _peer("hy_v4", "hy_v4.hyper_connection")


@hy_v4.op("pre", released="HY_V4", free=("norm_eps", "post_scale", ("pre_eps", "post_eps")))
def _hy_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    connection = _module("hy_v4.hyper_connection").IdentityHyperConnection(
        _config(x, variant, variant.pre_eps)
    )
    inner = connection.hc_pre
    inner.hc_fn, inner.hc_scale, inner.hc_base = phi, scale, bias
    return connection(x)


@hy_v4.op("head", released="HY_V4", free=("norm_eps", "pre_eps"))
def _hy_head(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    head = _module("hy_v4.hyper_connection").IdentityHyperHead(_config(x, variant, variant.pre_eps))
    head.hc_head_fn, head.hc_head_scale, head.hc_head_base = phi, scale, bias
    return head(x)


@hy_v4.op("combine", fixed={"unmixed": True})
def _hy_combine(x: Any, y: Any, h_post: Any) -> Any:
    return _module("hy_v4.hyper_connection").hc_expand(y, x, h_post)


# --- Qwen4-Exp --------------------------------------------------------------------------------

qwen4_exp = _peer("qwen4_exp", "qwen4_exp.language")


def _gated(x: Any, norm: Any, down: Any, up: Any, inject: Any, eps: float) -> Any:
    config = SimpleNamespace(
        hc_count=x.shape[-2], hidden_size=x.shape[-1], hc_lowrank=down.shape[0], rms_norm_eps=eps
    )
    module = _module("qwen4_exp.language").Qwen4ExpGatedResidual(config, inject is not None)
    module.hc_norm.weight = norm
    module.input_mix_weight_down.weight = down
    module.input_mix_weight_up.weight = up
    if inject is not None:
        module.block_inject_weight.weight = inject
    return module(x.reshape(*x.shape[:-2], -1))


@qwen4_exp.op("gated_pre", free=("eps",), fixed={"narrow": True})
def _qwen_pre(x: Any, norm: Any, down: Any, up: Any, inject: Any, eps: float) -> Any:
    h, _, h_post = _gated(x, norm, down, up, inject, eps)
    return h, h_post


@qwen4_exp.op("gated_head", free=("eps",), fixed={"narrow": True})
def _qwen_head(x: Any, norm: Any, down: Any, up: Any, eps: float) -> Any:
    return _gated(x, norm, down, up, None, eps)


PEERS = (deepseek_v4, deepseek_v41, xing4_0, hy_v4, qwen4_exp)
