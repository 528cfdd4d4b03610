"""One sublayer of a network together with its connection to the streams."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
from mlx import nn

from mhc_backends.mlx_nn.hyper import HyperConnection
from mhc_core.variants import PAPER, Variant

__all__ = ["HyperConnectedBlock"]


class HyperConnectedBlock(nn.Module):
    """A layer on n streams: ``x' = H_res x + H_post (outer) layer(norm(H_pre x))``.

    Parameters
    ----------
    layer
        F: a module that maps ``[..., dims]``, and any further arguments of the call, to
        ``[..., dims]``.
    dims, n, variant
        As for :class:`HyperConnection`.
    norm
        A module on ``[..., dims]`` that runs before the layer, such as ``nn.RMSNorm(dims)``, which
        kernels apply in the pass that makes h.

    Attributes
    ----------
    connection
        The :class:`HyperConnection`.
    layer, norm
        The arguments; by default the norm is the identity.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    Eq. (3) of arXiv:2512.24880. ``layer`` and ``norm`` must be modules, not functions, because
    arrays that a function captures get no gradient when :class:`HyperConnectedStack` recomputes it.

    Examples
    --------
    >>> import mlx.core as mx, mlx.nn as nn
    >>> from mhc_core.mlx import HyperConnectedBlock
    >>> block = HyperConnectedBlock(nn.Linear(8, 8), 8, norm=nn.RMSNorm(8))
    >>> block(mx.ones((2, 4, 8))).shape
    (2, 4, 8)
    """

    def __init__(
        self,
        layer: nn.Module,
        dims: int,
        n: int = 4,
        variant: Variant = PAPER,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check_module("layer", layer)
        self.connection = HyperConnection(dims, n, variant)
        self.layer = layer
        self.norm = nn.Identity() if norm is None else norm
        _check_module("norm", self.norm)

    def transform(self, h: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Return ``layer(norm(h), *args, **kwargs)``: the layer without its connection."""
        return cast("mx.array", self.layer(self.norm(h), *args, **kwargs))

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Apply the block to the streams ``[..., n, dims]``; further arguments go to the layer."""
        connection = self.connection
        if connection.training:  # its op adds the two gradients of x, which is more than a norm
            return connection(x, self.transform, *args, **kwargs)
        h, h_post, h_res = connection.pre(x, self.norm)
        y = cast("mx.array", self.layer(h, *args, **kwargs))
        return connection.combine(x, y, h_post, h_res)


def _check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"HyperConnectedBlock: {name} is a {type(value).__name__}; needs an mlx.nn.Module"
        )
