"""GLM-5.3-Flash of transformers: the replacements of its classes.

Facts from transformers 5.24, ``models/glm5_next/modeling_glm5_next.py``: a connection returns
H_post, H_res transposed and the layer's input; a layer mixes the streams by matmuls in the
streams' dtype; the head is their mean. :func:`mhc_torch.models.accelerate` compares the installed
code with this one, on random numbers, before it replaces anything.

The classes keep the library's names, by which FSDP's and pipelines' policies find them.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from mhc_backends.acceleration import Swap
from mhc_torch.models.family import WHERE, Family, Norm, classes_of, compare, replaces, require
from mhc_torch.models.sublayers import COMB, IndexedLayer, comb_projection, leaves, mapped

__all__ = ["FAMILY"]

HOME = "transformers.models.glm5_next.modeling_glm5_next"
_Layer, _Connection, _Norm = classes_of(
    HOME, ("Glm5NextTextDecoderLayer", "Glm5NextTextHyperConnection", "Glm5NextTextRMSNorm")
)
NORM = Norm(cls=_Norm)


class Glm5NextTextHyperConnection(_Connection):
    """A hyper-connection on the uniform ops."""

    def forward(self, hidden_streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_post, H_res transposed, and the layer's input."""
        if not replaces(self, hidden_streams):
            return cast("tuple[Tensor, Tensor, Tensor]", super().forward(hidden_streams))
        return mapped(self, hidden_streams)


class Glm5NextTextDecoderLayer(IndexedLayer, _Layer):
    """A layer whose streams are written and read in one pass between attention and the MLP."""

    projection = staticmethod(comb_projection)
    norm = NORM


def _check(path: str, connection: Any) -> None:
    require(path, connection, COMB)
    compare(path, connection, connection.fn, _Connection, mapped)


FAMILY = Family(
    swaps={
        _Layer: Swap(
            Glm5NextTextDecoderLayer,
            f"combine_pre writes its streams and reads them in one pass, {WHERE}",
        ),
        _Connection: Swap(Glm5NextTextHyperConnection, f"runs on mhc-core's ops, {WHERE}", _check),
    },
    leaves=leaves(_Layer, comb_projection, NORM),
)
