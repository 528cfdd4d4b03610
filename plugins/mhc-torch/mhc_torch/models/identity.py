"""Hunyuan HY-V4 of transformers, alone and with images: what both families of classes share.

Facts from transformers 5.24, ``models/hy_v4/modeling_hy_v4.py`` and
``models/hy_v4_vl/modeling_hy_v4_vl.py``: a connection returns H_post and the layer's input, hc_eps
is in H_pre, H_post and the head, and a layer adds in float32 and rounds the streams once.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

import mhc_core as mhc
from mhc_backends.acceleration import Swap
from mhc_torch.models.family import WHERE, Family, Norm, compare, replaces, require
from mhc_torch.models.sublayers import (
    IDENTITY,
    IndexedLayer,
    check_head,
    collapsed,
    identity_projection,
    leaves,
)

__all__ = ["Connection", "Head", "Layer", "family"]


def _mapped(connection: Any, streams: Tensor) -> tuple[Tensor, Tensor]:
    h, h_post, _ = mhc.pre(streams, *identity_projection(connection))
    return h_post, h


class Connection:
    """A hyper-connection on the uniform ops; it stands before the library's class."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor]:
        """Return H_post and the layer's input."""
        if not replaces(cast("Any", self), hidden_streams):
            original = cast("Any", super())
            return cast("tuple[Tensor, Tensor]", original.forward(hidden_streams))
        return _mapped(self, hidden_streams)


class Head:
    """The collapse before the output; it stands before the library's class."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden state ``[batch, tokens, C]``."""
        if not replaces(cast("Any", self), x):
            return cast("Tensor", cast("Any", super()).forward(x))
        return collapsed(self, x)


class Layer(IndexedLayer):
    """A layer whose streams are written and read in one pass; it stands before the library's."""

    projection = staticmethod(identity_projection)


def family(
    originals: tuple[type[Any], type[Any], type[Any]],
    ours: tuple[type[Any], type[Any], type[Any]],
    norm: Norm,
) -> Family:
    """Return the family of these classes, their replacements and the norm."""
    layer, connection, head = originals

    def check(path: str, module: Any) -> None:
        require(path, module, IDENTITY)
        compare(path, module, module.fn, connection, _mapped)

    return Family(
        swaps={
            layer: Swap(
                ours[0], f"combine_pre writes its streams and reads them in one pass, {WHERE}"
            ),
            connection: Swap(ours[1], f"runs on mhc-core's ops, {WHERE}", check),
            head: Swap(ours[2], f"runs on mhc-core's head, {WHERE}", check_head(compare, head)),
        },
        leaves=leaves(layer, identity_projection, norm),
    )
