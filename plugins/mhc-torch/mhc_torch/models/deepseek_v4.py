"""DeepSeek-V4 of transformers: the replacements of its classes.

Facts from transformers 5.24 and 5.17, ``models/deepseek_v4/modeling_deepseek_v4.py``: a connection
returns H_post, H_res transposed and the layer's input; a layer mixes the streams by matmuls in the
streams' dtype. :func:`mhc_torch.models.accelerate` compares the installed code with this one, on
random numbers, before it replaces anything.

The classes keep the library's names, by which FSDP's and pipelines' policies find them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

import mhc_core as mhc
from mhc_backends.acceleration import Swap
from mhc_torch.models.family import (
    WHERE,
    Family,
    Norm,
    classes_of,
    compare,
    has_values,
    hooked,
    kernels_run,
    pays,
    replaces,
    require,
    streams_of,
    stub_of,
    why_left,
)
from mhc_torch.models.sublayers import (
    COMB,
    LAYER,
    begun,
    check_head,
    collapsed,
    comb_projection,
    continued,
    mapped,
)

__all__ = ["FAMILY"]

HOME = "transformers.models.deepseek_v4.modeling_deepseek_v4"
_Layer, _Connection, _Head, _Norm = classes_of(
    HOME,
    (
        "DeepseekV4DecoderLayer",
        "DeepseekV4HyperConnection",
        "DeepseekV4HyperHead",
        "DeepseekV4RMSNorm",
    ),
)
NORM = Norm(cls=_Norm, keeps_dtype=True)


class DeepseekV4HyperConnection(_Connection):
    """A hyper-connection on the uniform ops."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_post, H_res transposed, and the layer's input."""
        if not replaces(self, hidden_streams):
            return cast("tuple[Tensor, Tensor, Tensor]", super().forward(hidden_streams))
        return mapped(self, hidden_streams)


class DeepseekV4HyperHead(_Head):
    """The collapse before the output."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden state ``[batch, tokens, C]``."""
        return collapsed(self, x) if replaces(self, x) else cast("Tensor", super().forward(x))


class DeepseekV4DecoderLayer(_Layer):
    """A layer whose streams are written and read in one pass between attention and experts."""

    def forward(self, hidden_states: Tensor, input_ids: Any = None, **kwargs: Any) -> Tensor:
        """Return the streams ``[batch, tokens, n, C]``."""
        # a connection with a hook is called
        if pays(self, hidden_states) and not (hooked(self.attn_hc) or hooked(self.ffn_hc)):
            return _run(self, hidden_states, input_ids, kwargs, kernels_run(hidden_states))
        return cast("Tensor", super().forward(hidden_states, input_ids=input_ids, **kwargs))


def _run(layer: Any, x: Tensor, input_ids: Any, kwargs: dict[str, Any], inside: bool) -> Tensor:
    """Run a layer; its norms are ``inside`` the passes over the streams, or modules."""
    norm = NORM if inside else None
    h, *mapped = begun(x, comb_projection(layer.attn_hc), layer.input_layernorm, norm)
    y, _ = layer.self_attn(h, **kwargs)
    streams, projection = (x, y, *mapped), comb_projection(layer.ffn_hc)
    x, h, *mapped = continued(streams, projection, layer.post_attention_layernorm, norm)
    return mhc.combine(x, layer.mlp(h, input_ids=input_ids), *mapped)


# ---- what the installed library computes --------------------------------------------------------


def _check_connection(path: str, connection: Any) -> None:
    require(path, connection, COMB)
    compare(path, connection, connection.fn, _Connection, mapped)


def _stub(layer: Any) -> Any:
    """Return a layer with random connections around functions instead of attention and experts."""

    def attention(h: Tensor, shift: float) -> tuple[Tensor, None]:
        return torch.tanh(h) + shift, None

    def experts(h: Tensor, input_ids: float) -> Tensor:
        return torch.sin(h) + input_ids

    stub = stub_of(_Layer, layer)
    stub.self_attn, stub.mlp = attention, experts
    return stub


def _leaves(original: type[Any], layer: Any) -> str | None:
    """Return why layers keep their forward: the installed one does not what ours does."""
    if original is not _Layer or not has_values(layer.attn_hc):
        return None
    require("a layer", layer, LAYER)
    stub, x = _stub(layer), streams_of(layer.attn_hc)
    return why_left(
        lambda: _Layer.forward(stub, x, input_ids=0.5, shift=0.25),
        lambda: _run(stub, x, 0.5, {"shift": 0.25}, True),
    )


FAMILY = Family(
    swaps={
        _Layer: Swap(
            DeepseekV4DecoderLayer,
            f"combine_pre writes its streams and reads them in one pass, {WHERE}",
        ),
        _Connection: Swap(
            DeepseekV4HyperConnection, f"runs on mhc-core's ops, {WHERE}", _check_connection
        ),
        _Head: Swap(
            DeepseekV4HyperHead, f"runs on mhc-core's head, {WHERE}", check_head(compare, _Head)
        ),
    },
    leaves=_leaves,
)
