"""DeepSeek-V4 of transformers: the replacements of its classes.

Facts from transformers 5.24 and 5.17, ``models/deepseek_v4/modeling_deepseek_v4.py``: a connection
returns H_post, H_res transposed and the layer's input; a layer mixes the streams by matmuls in the
streams' dtype. :func:`mhc_torch.models.accelerate` compares the installed code with this one, on
random numbers, before it replaces anything.

The classes keep the library's names, by which FSDP's and pipelines' policies find them.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import mhc_core as mhc
from mhc_backends.acceleration import Swap
from mhc_torch._variants import key_of, variant_of
from mhc_torch.models.family import (
    Family,
    classes_of,
    difference,
    has_values,
    installed,
    pays,
    require,
)

__all__ = ["FAMILY"]

HOME = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_Layer, _Connection, _Head = classes_of(
    HOME, ("DeepseekV4DecoderLayer", "DeepseekV4HyperConnection", "DeepseekV4HyperHead")
)

_SAME = 1e-3  # of float32's rounding, and far below any other formula


def _projection(connection: Any) -> tuple[Any, ...]:
    """Return phi, scale, bias and the variant of a connection, as the ops take them."""
    key = (connection.input_norm.eps, connection.hc_eps, connection.hc_sinkhorn_iters)
    return connection.fn, connection.scale, connection.base, variant_of(_key(*key))


def _key(norm_eps: float, hc_eps: float, iterations: int = 20) -> str:
    made = _KEYS.get((norm_eps, hc_eps, iterations))
    if made is None:
        variant = replace(
            mhc.DEEPSEEK_V4,
            norm_eps=norm_eps,
            pre_eps=hc_eps,
            sinkhorn_eps=hc_eps,
            sinkhorn_iterations=iterations,
        )
        made = _KEYS[norm_eps, hc_eps, iterations] = key_of(variant)
    return made


_KEYS: dict[tuple[float, float, int], str] = {}


class DeepseekV4HyperConnection(_Connection):
    """A hyper-connection on the uniform ops."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_post, H_res transposed, and the layer's input."""
        if not pays(self, hidden_streams):
            return cast("tuple[Tensor, Tensor, Tensor]", super().forward(hidden_streams))
        return _mapped(self, hidden_streams)


def _mapped(connection: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, h_post, h_res = mhc.pre(streams, *_projection(connection))
    return h_post, h_res.mT, h


class DeepseekV4HyperHead(_Head):
    """The collapse before the output."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden state ``[batch, tokens, C]``."""
        return _collapsed(self, x) if pays(self, x) else cast("Tensor", super().forward(x))


def _collapsed(head: Any, x: Tensor) -> Tensor:
    variant = variant_of(_key(head.input_norm.eps, head.eps))
    return mhc.head(x, head.hc_fn, head.hc_scale, head.hc_base, variant)


class DeepseekV4DecoderLayer(_Layer):
    """A layer whose streams are written and read in one pass between attention and experts."""

    def forward(self, hidden_states: Tensor, input_ids: Any = None, **kwargs: Any) -> Tensor:
        """Return the streams ``[batch, tokens, n, C]``."""
        # a connection with a hook is called, so that the hook can bring its parameters
        if pays(self, hidden_states) and not (_hooked(self.attn_hc) or _hooked(self.ffn_hc)):
            return _run(self, hidden_states, input_ids, kwargs)
        return cast("Tensor", super().forward(hidden_states, input_ids=input_ids, **kwargs))


def _hooked(module: nn.Module) -> bool:
    return bool(vars(module)["_forward_pre_hooks"]) or hasattr(module, "_hf_hook")


def _run(layer: Any, x: Tensor, input_ids: Any, kwargs: dict[str, Any]) -> Tensor:
    h, h_post, h_res = mhc.pre(x, *_projection(layer.attn_hc))
    y, _ = layer.self_attn(layer.input_layernorm(h), **kwargs)
    x, h, _, h_post, h_res = mhc.combine_pre(x, y, h_post, h_res, *_projection(layer.ffn_hc))
    y = layer.mlp(layer.post_attention_layernorm(h), input_ids=input_ids)
    return mhc.combine(x, y, h_post, h_res)


# ---- what the installed library computes --------------------------------------------------------


def _check_connection(path: str, connection: Any) -> None:
    require(
        path,
        connection,
        ("fn", "scale", "base", "hc_mult", "hc_eps", "hc_sinkhorn_iters", "input_norm.eps"),
    )
    _check(path, connection, connection.fn, _Connection, _mapped)


def _check_head(path: str, head: Any) -> None:
    require(path, head, ("hc_fn", "hc_scale", "hc_base", "hc_mult", "eps", "input_norm.eps"))
    _check(path, head, head.hc_fn, _Head, _collapsed)


def _check(path: str, module: Any, fn: Tensor, original: Any, ours: Any) -> None:
    """Raise unless the library's forward and ours agree on random parameters and streams."""
    if not has_values(module):
        return
    probe = _probe(module)
    x = _drawn(torch.empty(1, 2, module.hc_mult, fn.shape[-1] // module.hc_mult, device=fn.device))
    with torch.no_grad():
        off = difference(ours(probe, x), original.forward(probe, x))
    if not off <= _SAME:
        raise RuntimeError(
            f"accelerate: {path}, a {original.__name__} of {installed()}, computes something else "
            f"than mhc-core (they differ by {off:.1e}); look for a newer mhc-torch"
        )


def _probe(module: Any) -> Any:
    """Return a copy of a connection with random float32 parameters."""
    probe = copy.deepcopy(module).float().requires_grad_(False)
    for parameter in probe.parameters():
        _drawn(parameter)
        if parameter.ndim > 1:
            parameter /= parameter.shape[-1] ** 0.5
    return probe


def _drawn(tensor: Tensor) -> Tensor:
    """Fill a tensor with random numbers, without the program's generator."""
    return tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(tensor.numel()))


def _stub(layer: Any) -> Any:
    """Return a layer with random connections around functions instead of attention and experts."""

    def attention(h: Tensor, shift: float) -> tuple[Tensor, None]:
        return torch.tanh(h) + shift, None

    def experts(h: Tensor, input_ids: float) -> Tensor:
        return torch.sin(h) + input_ids

    def doubled(h: Tensor) -> Tensor:
        return 2 * h

    def tripled(h: Tensor) -> Tensor:
        return 3 * h

    stub: Any = _Layer.__new__(_Layer)  # transformers looks the forward up by the class
    nn.Module.__init__(stub)
    stub.attn_hc, stub.ffn_hc = _probe(layer.attn_hc), _probe(layer.ffn_hc)
    stub.self_attn, stub.mlp = attention, experts
    stub.input_layernorm, stub.post_attention_layernorm = doubled, tripled
    return stub


def _leaves(original: type[Any], layer: Any) -> str | None:
    """Return why layers keep their forward: the installed one does not what ours does."""
    if original is not _Layer or not has_values(layer.attn_hc):
        return None
    require("a layer", layer, ("attn_hc", "ffn_hc"))
    stub = _stub(layer)
    n, fn = layer.attn_hc.hc_mult, layer.attn_hc.fn
    x = _drawn(torch.empty(1, 2, n, fn.shape[-1] // n, device=fn.device))
    try:
        with torch.no_grad():
            want = _Layer.forward(stub, x, input_ids=0.5, shift=0.25)
            off = difference(_run(stub, x, 0.5, {"shift": 0.25}), want)
    except Exception as error:
        return f"its forward is not the one that is known: {type(error).__name__}: {error}"
    return None if off <= _SAME else f"its forward computes something else (off by {off:.1e})"


_WHERE = "for CUDA tensors; elsewhere its own code runs, unless everywhere=True"

FAMILY = Family(
    swaps={
        _Layer: Swap(
            DeepseekV4DecoderLayer,
            f"combine_pre writes its streams and reads them in one pass, {_WHERE}",
        ),
        _Connection: Swap(
            DeepseekV4HyperConnection, f"runs on mhc-core's ops, {_WHERE}", _check_connection
        ),
        _Head: Swap(DeepseekV4HyperHead, f"runs on mhc-core's head, {_WHERE}", _check_head),
    },
    leaves=_leaves,
)
