"""Qwen4-Exp of transformers: the replacements of its classes.

Facts from transformers 5.24, ``models/qwen4_exp/modeling_qwen4_exp.py``: the streams are side by
side in the last axis, and a gated residual returns the layer's input, the streams and H_post in
their dtype; without ``block_inject_weight`` it is the head. A layer adds in the streams' dtype.

The classes keep the library's names, by which FSDP's and pipelines' policies find them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import mhc_core
from mhc_backends.acceleration import Swap
from mhc_torch._norms import is_changed, parts_changed
from mhc_torch.gated import is_matrix
from mhc_torch.models.family import (
    WHERE,
    Family,
    agree,
    classes_of,
    drawn,
    has_values,
    pays,
    probe_of,
    require,
    why_left,
)

__all__ = ["FAMILY"]

mhc: Any = mhc_core  # the arrays here are those of any library

HOME = "transformers.models.qwen4_exp.modeling_qwen4_exp"
_Layer, _Connection = classes_of(HOME, ("Qwen4ExpTextDecoderLayer", "Qwen4ExpTextGatedResidual"))

_PROJECTIONS = ("input_mix_weight_down", "input_mix_weight_up", "block_inject_weight")


def _pays(module: nn.Module, x: Tensor) -> bool:
    """Return whether the ops are not slower; no GPU has timed the kernels of their vjps."""
    return pays(module, x, not torch.is_grad_enabled())


def _plain(connection: Any) -> bool:
    """Return whether the parts need no call: no hooks, and matrices without adapters or codes."""
    layers = [getattr(connection, name) for name in _PROJECTIONS]
    layers = [layer for layer in layers if layer is not None]
    return all(map(is_matrix, layers)) and not parts_changed(connection)


def _gated(connection: Any, x: Tensor) -> Any:
    """Return the layer's input and H_post, or the head's output."""
    streams = x.reshape(*x.shape[:-1], connection.hc_count, connection.hidden_size)
    layers = [getattr(connection, name) for name in _PROJECTIONS]
    weights = [layer.weight for layer in layers if layer is not None]
    norm = connection.hc_norm
    if connection.block_inject_weight is None:
        return mhc.gated_head(streams, norm.weight, *weights, norm.eps)
    return mhc.gated_pre(streams, norm.weight, *weights, norm.eps)


def _returned(connection: Any, x: Tensor) -> Any:
    """Return what the library's module returns."""
    found = _gated(connection, x)
    if connection.block_inject_weight is None:
        return found
    h, h_post = found
    return h, x, h_post.to(x.dtype)


class Qwen4ExpTextGatedResidual(_Connection):
    """A gated residual on the uniform ops."""

    def forward(self, hyper_input: Tensor) -> Any:
        """Return the layer's input, the streams and H_post; the head, its input alone."""
        if _pays(self, hyper_input) and _plain(self):
            return _returned(self, hyper_input)
        return cast("Any", super().forward(hyper_input))


class Qwen4ExpTextDecoderLayer(_Layer):
    """A layer that adds to its streams in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any = None,
        conv_mask: Any = None,
        cache: Any = None,
        ple_input_ids: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return the streams ``[batch, tokens, n * C]``."""
        own = {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "conv_mask": conv_mask,
            "cache": cache,
            "ple_input_ids": ple_input_ids,
        }
        runs = _pays(self, hidden_states) and "past_key_values" not in kwargs
        if runs and all(map(_is_direct, (self.attn_hyper_connection, self.mlp_hyper_connection))):
            return _run(self, hidden_states, own, kwargs)
        return cast("Tensor", super().forward(hidden_states, **own, **kwargs))


def _is_direct(connection: Any) -> bool:
    return _plain(connection) and not is_changed(connection)


def _run(layer: Any, x: Tensor, own: dict[str, Any], kwargs: dict[str, Any]) -> Tensor:
    cache, conv_mask = own["cache"], own["conv_mask"]
    if layer.ple is not None:
        x = x + layer.ple(x, own["ple_input_ids"], cache, conv_mask=conv_mask)
    h, h_post = _gated(layer.attn_hyper_connection, x)
    if layer.layer_type == "linear_attention":
        y = layer.linear_attn(h, cache=cache, attention_mask=conv_mask, **kwargs)
    else:
        y, _ = layer.self_attn(
            h,
            own["position_embeddings"],
            attention_mask=own["attention_mask"],
            cache=cache,
            **kwargs,
        )
    x = _written(x, y, h_post)
    h, h_post = _gated(layer.mlp_hyper_connection, x)
    return _written(x, layer.mlp(h), h_post)


def _written(x: Tensor, y: Tensor, h_post: Tensor) -> Tensor:
    streams = x.reshape(*x.shape[:-1], h_post.shape[-1], y.shape[-1])
    return mhc.combine(streams, y, h_post, None).flatten(-2)


# ---- what the installed library computes --------------------------------------------------------


def _check(path: str, connection: Any) -> None:
    names = "hc_count", "hidden_size", "hc_norm.weight", "hc_norm.eps", *_PROJECTIONS[:2]
    require(path, connection, names)
    if not has_values(connection) or not _plain(connection):
        return
    probe = probe_of(connection)
    x = _streams_of(connection)
    with torch.no_grad():
        agree(path, _Connection, _returned(probe, x), _Connection.forward(probe, x))


def _streams_of(connection: Any) -> Tensor:
    weight = connection.hc_norm.weight
    return drawn(torch.empty(1, 2, weight.shape[0], device=weight.device))


def _leaves(original: type[Any], layer: Any) -> str | None:
    """Return why layers keep their forward: the installed one does not what ours does."""
    if original is not _Layer:
        return None
    require("a layer", layer, ("attn_hyper_connection", "mlp_hyper_connection", "layer_type"))
    connections = layer.attn_hyper_connection, layer.mlp_hyper_connection
    if not all(has_values(one) and _plain(one) for one in connections):
        return None
    stub: Any = _Layer.__new__(_Layer)
    nn.Module.__init__(stub)
    stub.attn_hyper_connection, stub.mlp_hyper_connection = map(probe_of, connections)
    stub.linear_attn, stub.self_attn, stub.ple, stub.mlp = _linear, _indexed, _added, torch.sin
    x = _streams_of(connections[0])
    names = ("position_embeddings", "attention_mask", "conv_mask", "cache", "ple_input_ids")
    own = {name: torch.tensor(0.1 * 2**k, device=x.device) for k, name in enumerate(names)}

    def both(forward: Any) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for stub.layer_type in ("linear_attention", "indexed_attention"):
            found.append(forward())
        return tuple(found)

    return why_left(
        lambda: both(lambda: _Layer.forward(stub, x, **own, shift=0.25)),
        lambda: both(lambda: _run(stub, x, own, {"shift": 0.25})),
    )


def _added(x: Tensor, ids: Tensor, cache: Tensor, conv_mask: Tensor) -> Tensor:
    return torch.cos(x) + ids + 2 * cache + 3 * conv_mask


def _linear(h: Tensor, cache: Tensor, attention_mask: Tensor, shift: float) -> Tensor:
    return torch.tanh(h) + cache + 2 * attention_mask + shift


def _indexed(
    h: Tensor, positions: Tensor, attention_mask: Tensor, cache: Tensor, shift: float
) -> tuple[Tensor, None]:
    return torch.tanh(h) + positions + 2 * attention_mask + 3 * cache + shift, None


_WHERE = f"without gradients {WHERE}"

FAMILY = Family(
    swaps={
        _Layer: Swap(Qwen4ExpTextDecoderLayer, f"combine adds to its streams, {_WHERE}"),
        _Connection: Swap(
            Qwen4ExpTextGatedResidual,
            f"runs on mhc-core's ops while its projections are plain, {_WHERE}",
            _check,
        ),
    },
    leaves=_leaves,
)
