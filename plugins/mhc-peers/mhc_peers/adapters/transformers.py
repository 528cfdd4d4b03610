"""transformers: the connections of DeepSeek-V4, GLM-5.3-Flash, HY-V4 and Qwen4-Exp."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from mhc_peers.declaration import Peer

__all__ = ["PEERS"]


class _ReadError(Exception):
    """Raised where a decoder layer has made the streams that are asked for."""


def _peer(name: str, module: str, **declared: Any) -> Peer:
    return Peer(
        name=f"transformers:{name}",
        project="transformers",
        where=f"transformers.models.{module}.modeling_{module}",
        library="torch",
        pins=("transformers==5.24.0",),
        versions=("transformers", "torch"),
        needs={"torch": "torch"},
        **declared,
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _config(x: Any, variant: Any) -> Any:
    return SimpleNamespace(
        hc_mult=x.shape[-2],
        hidden_size=x.shape[-1],
        hc_sinkhorn_iters=variant.sinkhorn_iterations,
        hc_eps=variant.pre_eps,
        hc_magnitude=variant.post_scale,
        rms_norm_eps=variant.norm_eps,
    )


def _called(module: Any, parameters: dict[str, Any], *inputs: Any) -> Any:
    from torch.func import functional_call

    return functional_call(module, parameters, inputs)


def _connection(
    module: str, cls: str, x: Any, phi: Any, scale: Any, bias: Any, variant: Any
) -> Any:
    connection = getattr(_module(module), cls)(_config(x, variant))
    return _called(connection, {"fn": phi, "scale": scale, "base": bias}, x)


def _streams_after(module: str, cls: str, x: Any, mixed: tuple[Any, ...], output: Any) -> Any:
    """Return the streams that a decoder layer makes of the output of its attention."""
    from torch import nn

    class Stands(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value

        def forward(self, *_: Any, **__: Any) -> Any:
            return self.value

    class Reads(nn.Module):
        def forward(self, streams: Any) -> Any:
            raise _ReadError(streams)

    layer = getattr(_module(module), cls).__new__(getattr(_module(module), cls))
    nn.Module.__init__(layer)
    layer.gradient_checkpointing = False
    layer.block_type = "attention"
    layer.attn_hc, layer.ffn_hc = Stands((*mixed, None)), Reads()
    layer.input_layernorm, layer.self_attn = nn.Identity(), Stands(output)
    layer.input_layernorm = Stands(None)
    try:
        layer(x)
    except _ReadError as read:
        return read.args[0]
    raise AssertionError(f"{cls} made no streams for its second connection")


# --- DeepSeek-V4 ------------------------------------------------------------------------------

V4 = ("norm_eps", "sinkhorn_iterations", ("pre_eps", "sinkhorn_eps"))

deepseek_v4 = _peer("deepseek_v4", "deepseek_v4")


@deepseek_v4.op("pre", released="DEEPSEEK_V4", free=V4)
def _v4_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    post, comb, h = _connection(
        "deepseek_v4", "DeepseekV4HyperConnection", x, phi, scale, bias, variant
    )
    return h, post, comb.transpose(-1, -2)


@deepseek_v4.op("combine")
def _v4_combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    mixed = (h_post, h_res.transpose(-1, -2))
    return _streams_after("deepseek_v4", "DeepseekV4DecoderLayer", x, mixed, (y, None))


@deepseek_v4.op("head", released="DEEPSEEK_V4", free=("norm_eps", "pre_eps"))
def _v4_head(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    head = _module("deepseek_v4").DeepseekV4HyperHead(_config(x, variant))
    return _called(head, {"hc_fn": phi, "hc_scale": scale, "hc_base": bias}, x)


# --- GLM-5.3-Flash ----------------------------------------------------------------------------

glm5_next = _peer("glm5_next", "glm5_next")


@glm5_next.op("pre", released="GLM53_FLASH", free=V4)
def _glm_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    post, comb, h = _connection(
        "glm5_next", "Glm5NextTextHyperConnection", x, phi, scale, bias, variant
    )
    return h, post, comb.transpose(-1, -2)


@glm5_next.op("combine")
def _glm_combine(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
    mixed = (h_post, h_res.transpose(-1, -2))
    return _streams_after("glm5_next", "Glm5NextTextDecoderLayer", x, mixed, (y, None, None))


@glm5_next.op("contract", fixed={"how": "mean"})
def _glm_contract(x: Any, how: str) -> Any:
    return _module("glm5_next").Glm5NextTextHyperHead()(x)


# --- HY-V4 ------------------------------------------------------------------------------------

HY = ("norm_eps", "post_scale", ("pre_eps", "post_eps"))

hy_v4 = _peer("hy_v4", "hy_v4")


@hy_v4.op("pre", released="HY_V4", free=HY)
def _hy_pre(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    post, h = _connection("hy_v4", "HYV4HyperConnection", x, phi, scale, bias, variant)
    return h, post


@hy_v4.op("head", released="HY_V4", free=("norm_eps", "pre_eps"))
def _hy_head(x: Any, phi: Any, scale: Any, bias: Any, variant: Any) -> Any:
    head = _module("hy_v4").HYV4HyperHead(_config(x, variant))
    return _called(head, {"hc_fn": phi, "hc_scale": scale, "hc_base": bias}, x)


@hy_v4.op("combine", fixed={"unmixed": True})
def _hy_combine(x: Any, y: Any, h_post: Any) -> Any:
    return _streams_after("hy_v4", "HYV4DecoderLayer", x, (h_post,), (y, None, None))


# --- Qwen4-Exp --------------------------------------------------------------------------------

qwen4_exp = _peer("qwen4_exp", "qwen4_exp")


def _gated(x: Any, norm: Any, down: Any, up: Any, inject: Any, eps: float) -> Any:
    config = SimpleNamespace(
        hc_count=x.shape[-2], hidden_size=x.shape[-1], hc_lowrank=down.shape[0], rms_norm_eps=eps
    )
    module = _module("qwen4_exp").Qwen4ExpTextGatedResidual(config, inject is not None)
    parameters = {
        "hc_norm.weight": norm,
        "input_mix_weight_down.weight": down,
        "input_mix_weight_up.weight": up,
    }
    if inject is not None:
        parameters["block_inject_weight.weight"] = inject
    return _called(module, parameters, x.flatten(-2))


@qwen4_exp.op("gated_pre", free=("eps",), fixed={"narrow": True})
def _qwen_pre(x: Any, norm: Any, down: Any, up: Any, inject: Any, eps: float) -> Any:
    h, _, h_post = _gated(x, norm, down, up, inject, eps)
    return h, h_post


@qwen4_exp.op("gated_head", free=("eps",), fixed={"narrow": True})
def _qwen_head(x: Any, norm: Any, down: Any, up: Any, eps: float) -> Any:
    return _gated(x, norm, down, up, None, eps)


PEERS = (deepseek_v4, glm5_next, hy_v4, qwen4_exp)
