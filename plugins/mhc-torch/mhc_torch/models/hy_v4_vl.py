"""HY-V4 with images of transformers: the replacements of its classes, under their names."""

from __future__ import annotations

from mhc_torch.models import identity
from mhc_torch.models.family import Norm, classes_of

__all__ = ["FAMILY"]

HOME = "transformers.models.hy_v4_vl.modeling_hy_v4_vl"
_Layer, _Connection, _Head, _Norm = classes_of(
    HOME, ("HYV4VLDecoderLayer", "HYV4VLHyperConnection", "HYV4VLHyperHead", "HYV4VLRMSNorm")
)
NORM = Norm(cls=_Norm)


class HYV4VLHyperConnection(identity.Connection, _Connection):
    """A hyper-connection on the uniform ops."""


class HYV4VLHyperHead(identity.Head, _Head):
    """The collapse before the output."""


class HYV4VLDecoderLayer(identity.Layer, _Layer):
    """A layer whose streams are written and read in one pass between attention and the MLP."""

    norm = NORM


FAMILY = identity.family(
    (_Layer, _Connection, _Head), (HYV4VLDecoderLayer, HYV4VLHyperConnection, HYV4VLHyperHead), NORM
)
