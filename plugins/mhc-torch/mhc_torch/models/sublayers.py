"""The shared part of families whose connections have the parameters fn, scale and base.

A connection normalises its streams by ``input_norm``, and a layer has one around attention,
``attn_hc``, and one around the MLP, ``ffn_hc`` (transformers 5.24: ``deepseek_v4``,
``glm5_next``, ``hy_v4``, ``hy_v4_vl``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

import mhc_core as mhc
from mhc_core import Variant
from mhc_torch._variants import key_of, variant_of
from mhc_torch.models.family import (
    Norm,
    has_values,
    hooked,
    kernels_run,
    pays,
    require,
    streams_of,
    stub_of,
    why_left,
)

__all__ = [
    "COMB",
    "HEAD",
    "IDENTITY",
    "LAYER",
    "IndexedLayer",
    "begun",
    "check_head",
    "collapsed",
    "comb_projection",
    "continued",
    "identity_projection",
    "leaves",
    "mapped",
]

COMB = ("fn", "scale", "base", "hc_mult", "hc_eps", "hc_sinkhorn_iters", "input_norm.eps")
IDENTITY = ("fn", "scale", "base", "hc_mult", "hc_eps", "hc_post_magnitude", "input_norm.eps")
HEAD = ("hc_fn", "hc_scale", "hc_base", "hc_mult", "eps", "input_norm.eps")

LAYER = ("attn_hc", "ffn_hc", "input_layernorm", "post_attention_layernorm")

Projection = Callable[[Any], tuple[Any, ...]]

_KEYS: dict[tuple[Any, ...], str] = {}


def _comb(norm_eps: float, eps: float, iterations: int) -> Variant:
    """Return a variant of DeepSeek-V4's maths."""
    return replace(
        mhc.DEEPSEEK_V4,
        norm_eps=norm_eps,
        pre_eps=eps,
        sinkhorn_eps=eps,
        sinkhorn_iterations=iterations,
    )


def _identity(norm_eps: float, eps: float, magnitude: float) -> Variant:
    """Return a variant of HY-V4's maths: transformers adds hc_eps to H_post too."""
    return replace(mhc.HY_V4, norm_eps=norm_eps, pre_eps=eps, post_eps=eps, post_scale=magnitude)


def _variant(make: Callable[..., Variant], *constants: float) -> Variant:
    key = make.__name__, *constants
    if key not in _KEYS:
        _KEYS[key] = key_of(make(*constants))
    return variant_of(_KEYS[key])


def comb_projection(connection: Any) -> tuple[Any, ...]:
    """Return phi, scale, bias and the variant of a connection that mixes its streams."""
    constants = connection.input_norm.eps, connection.hc_eps, connection.hc_sinkhorn_iters
    return connection.fn, connection.scale, connection.base, _variant(_comb, *constants)


def identity_projection(connection: Any) -> tuple[Any, ...]:
    """Return phi, scale, bias and the variant of a connection that does not mix its streams."""
    constants = connection.input_norm.eps, connection.hc_eps, connection.hc_post_magnitude
    return connection.fn, connection.scale, connection.base, _variant(_identity, *constants)


def mapped(connection: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return H_post, H_res transposed, and the layer's input."""
    h, h_post, h_res = mhc.pre(streams, *comb_projection(connection))
    return h_post, h_res.mT, h


def begun(x: Tensor, projection: tuple[Any, ...], module: Any, norm: Norm | None) -> Any:
    """Return the layer's normalised input, H_post and H_res.

    The pass over the streams takes in the module's norm, if it is of the known kind ``norm``.
    """
    words = norm.words(module, x) if norm else {}
    h, *mapped = mhc.pre(x, *projection, **words)
    return h if words else module(h), *mapped


def continued(
    streams: tuple[Any, ...], projection: tuple[Any, ...], module: Any, norm: Norm | None
) -> Any:
    """Return the streams that combine writes, and what :func:`begun` returns for the next layer."""
    words = norm.words(module, streams[0]) if norm else {}
    x, h, _, *mapped = mhc.combine_pre(*streams, *projection, **words)
    return x, h if words else module(h), *mapped


def collapsed(head: Any, x: Tensor) -> Tensor:
    """Return the hidden state of a head with parameters."""
    variant = _variant(_comb, head.input_norm.eps, head.eps, mhc.DEEPSEEK_V4.sinkhorn_iterations)
    return mhc.head(x, head.hc_fn, head.hc_scale, head.hc_base, variant)


class IndexedLayer:
    """The layers of GLM-5.3-Flash and HY-V4, whose attention passes on the entries that it chose.

    It stands before the library's class among the bases.
    """

    projection: Projection
    norm: Norm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        use_cache: Any = False,
        position_embeddings: Any = None,
        prev_topk_indices: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Return the streams ``[batch, tokens, n, C]``, and the entries that attention chose."""
        layer, original = cast("Any", self), cast("Any", super())
        own = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
            "prev_topk_indices": prev_topk_indices,
        }
        runs = pays(layer, hidden_states) and "past_key_values" not in kwargs
        if runs and not (hooked(layer.attn_hc) or hooked(layer.ffn_hc)):
            norm = type(self).norm if kernels_run(hidden_states) else None
            return _run(layer, hidden_states, type(self).projection, norm, own, kwargs)
        return cast("tuple[Tensor, Any]", original.forward(hidden_states, **own, **kwargs))


def _run(
    layer: Any,
    x: Tensor,
    projection: Projection,
    norm: Norm | None,
    own: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    h, *mapped = begun(x, projection(layer.attn_hc), layer.input_layernorm, norm)
    y, chosen = _attended(layer, h, own, kwargs)
    streams, last = (x, y, *mapped), layer.post_attention_layernorm
    x, h, *mapped = continued(streams, projection(layer.ffn_hc), last, norm)
    return mhc.combine(x, layer.mlp(h), *mapped), chosen


def _attended(
    layer: Any, h: Tensor, own: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    if getattr(layer, "block_type", None) == _LINEAR:
        given = {name: own[name] for name in ("cache", "attention_mask")}
        return layer.self_attn(hidden_states=h, **given, **kwargs), None
    y, _, chosen = layer.self_attn(hidden_states=h, **own, **kwargs)
    return y, chosen


_LINEAR = "linear_attention"


# ---- what the installed library computes --------------------------------------------------------


def check_head(compare: Callable[..., None], original: type[Any]) -> Callable[[str, Any], None]:
    """Return the check of a head of a class."""

    def check(path: str, head: Any) -> None:
        require(path, head, HEAD)
        compare(path, head, head.hc_fn, original, collapsed)

    return check


def leaves(
    cls: type[Any], projection: Projection, norm: Norm
) -> Callable[[type[Any], Any], str | None]:
    """Return the function that tells why indexed layers of a class keep their forward, if so."""

    def reason(original: type[Any], layer: Any) -> str | None:
        if original is not cls or not has_values(layer.attn_hc):
            return None
        require("a layer", layer, LAYER)
        kinds = (_LINEAR, "attention") if hasattr(layer, "block_type") else (None,)
        reasons = [_compared(cls, layer, projection, norm, kind) for kind in kinds]
        return next((found for found in reasons if found), None)

    return reason


def _compared(
    cls: type[Any], layer: Any, projection: Projection, norm: Norm, kind: str | None
) -> str | None:
    stub, x = stub_of(cls, layer), streams_of(layer.attn_hc)
    stub.self_attn, stub.mlp = _linear if kind == _LINEAR else _indexed, torch.sin
    if kind:
        stub.block_type = kind
    values = enumerate(("attention_mask", "position_ids", "cache", "use_cache", *_LAST))
    own = {name: torch.tensor(0.1 * 2**k, device=x.device) for k, name in values}
    count = 1 if kind == _LINEAR else 2  # outputs that are tensors
    return why_left(
        lambda: cls.forward(stub, x, **own, shift=0.25)[:count],
        lambda: _run(stub, x, projection, norm, own, {"shift": 0.25})[:count],
    )


_LAST = ("position_embeddings", "prev_topk_indices")


def _linear(hidden_states: Tensor, cache: Tensor, attention_mask: Tensor, shift: float) -> Tensor:
    return torch.tanh(hidden_states) + cache + 2 * attention_mask + shift


def _indexed(hidden_states: Tensor, shift: float, **own: Tensor) -> tuple[Tensor, None, Tensor]:
    weighted = [(k + 1) * own[name] for k, name in enumerate(sorted(own))]
    given = cast("Tensor", sum(weighted))
    return torch.tanh(hidden_states) + given + shift, None, 3 * given
