"""Hunyuan HY-V4 of transformers: the replacements of its classes, under the library's names."""

from __future__ import annotations

from mhc_torch.models import identity
from mhc_torch.models.family import Norm, classes_of

__all__ = ["FAMILY"]

HOME = "transformers.models.hy_v4.modeling_hy_v4"
_Layer, _Connection, _Head, _Norm = classes_of(
    HOME, ("HYV4DecoderLayer", "HYV4HyperConnection", "HYV4HyperHead", "HYV4RMSNorm")
)
NORM = Norm(cls=_Norm)


class HYV4HyperConnection(identity.Connection, _Connection):
    """A hyper-connection on the uniform ops."""


class HYV4HyperHead(identity.Head, _Head):
    """The collapse before the output."""


class HYV4DecoderLayer(identity.Layer, _Layer):
    """A layer whose streams are written and read in one pass between attention and the MLP."""

    norm = NORM


FAMILY = identity.family(
    (_Layer, _Connection, _Head), (HYV4DecoderLayer, HYV4HyperConnection, HYV4HyperHead), NORM
)
