"""The gated residual of Qwen4-Exp, as ``mlx.nn`` modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx import nn

import mhc_core
from mhc_backends.nn_common import GATE_DEVIATION, GATE_RANK, checked_gates

__all__ = ["GatedConnection", "GatedHead"]

mhc: Any = mhc_core  # the arrays here are those of any library


class StreamNorm(nn.Module):
    """The norm of each stream by itself, with a weight of ``1 + weight``."""

    def __init__(self, dims: int, n: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((n * dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., n * dims]`` from the streams ``[..., n, dims]``."""
        scaled = mx.fast.rms_norm(x.astype(mx.float32), None, self.eps).flatten(-2)
        return (scaled * (1 + self.weight.astype(mx.float32))).astype(x.dtype)


class Gates(nn.Module):
    """The common part of both modules: the norm, and the projections that read the streams."""

    def __init__(self, dims: int, n: int, rank: int, eps: float) -> None:
        super().__init__()
        self.dims, self.n, self.rank = dims, n, rank
        self.hc_norm = StreamNorm(dims, n, eps)
        self.input_mix_weight_down = projection(n * dims, rank)
        self.input_mix_weight_up = projection(rank, n * dims)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Return the layers whose weights the ops take after the norm's."""
        return self.input_mix_weight_down, self.input_mix_weight_up

    def weights(self) -> list[mx.array] | None:
        """Return the weights as the ops take them; None if a projection is not a plain matrix."""
        if any(type(layer) is not nn.Linear for layer in self.projections):
            return None  # quantised, or with an adapter
        return [self.hc_norm.weight, *(cast("mx.array", one.weight) for one in self.projections)]

    def mixed(self, x: mx.array, u: mx.array) -> mx.array:
        """Return h by the layers themselves, from u, the normalised streams."""
        low = cast("mx.array", nn.silu(self.input_mix_weight_down(u) / self.n))
        gated = mx.sigmoid(self.input_mix_weight_up(low)).astype(mx.float32) * u
        return gated.reshape(x.shape).mean(-2).astype(x.dtype)

    def _extra_repr(self) -> str:
        return f"dims={self.dims}, n={self.n}, rank={self.rank}"


def projection(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = GATE_DEVIATION * mx.random.normal((outputs, inputs))
    return layer


class GatedConnection(Gates):
    """Connect a layer F to n streams by gates for each channel; the streams are not mixed.

    ::

        u_i = x_i / sqrt(mean(x_i^2) + eps) (1 + norm_i)
        z = silu(vec(u) @ down.T / n) @ up.T;  h = mean_i sigmoid(z_i) u_i
        x'_i = x_i + 2 sigmoid(vec(u) @ inject.T / n)_i F(h)

    Parameters
    ----------
    dims
        C, the channels of a stream.
    n
        The number of streams.
    rank
        The rank of the gates' projection.
    eps
        Added to the mean square of each stream.

    Attributes
    ----------
    hc_norm, input_mix_weight_down, input_mix_weight_up, block_inject_weight
        Modules with one ``weight`` each, norm, down, up and inject, named as in released
        checkpoints: ``[n * dims]``, ``[rank, n * dims]``, ``[n * dims, rank]`` and
        ``[n, n * dims]``. The last three are ``nn.Linear``, with the dtype of the rest of the
        model, and may be quantised or get adapters. Then they compute the gates themselves, in the
        streams' dtype, beside formulas instead of :func:`mhc_core.gated_pre`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    It starts as Qwen4-Exp's models do: norm 0, the matrices normal with a deviation of 0.02. Then
    the gates are about 1/2 and each stream gets about ``F(h)``. F needs no norm before it.

    The gated residual of Qwen4-Exp (transformers 5.24, ``Qwen4ExpTextGatedResidual``).

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import GatedConnection
    >>> connection = GatedConnection(dims=8, rank=2)
    >>> connection(mx.ones((2, 4, 8)), mx.tanh).shape
    (2, 4, 8)
    """

    def __init__(self, dims: int, n: int = 4, rank: int = GATE_RANK, eps: float = 1e-6) -> None:
        super().__init__(*checked_gates("GatedConnection", dims, n, rank, eps))
        self.block_inject_weight = projection(n * dims, n)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Return the layers whose weights the ops take after the norm's."""
        return *super().projections, self.block_inject_weight

    def pre(self, x: mx.array) -> tuple[mx.array, mx.array, None]:
        """Return h, the layer's input, H_post and None for H_res: :func:`mhc_core.gated_pre`."""
        weights = self.weights()
        if weights is not None:
            h, h_post = mhc.gated_pre(x, *weights, self.hc_norm.eps)
            return h, h_post, None
        u = self.hc_norm(x)
        injected = self.block_inject_weight(u).astype(mx.float32) / self.n
        return self.mixed(x, u), 2 * mx.sigmoid(injected), None

    def combine(self, x: mx.array, y: mx.array, h_post: mx.array, h_res: None = None) -> mx.array:
        """Return the streams after a layer that returned y: :func:`mhc_core.combine`."""
        return mhc.combine(x, y, h_post, h_res)

    def __call__(
        self, x: mx.array, layer: Callable[..., mx.array], *args: Any, **kwargs: Any
    ) -> mx.array:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        h, h_post, _ = self.pre(x)
        return self.combine(x, layer(h, *args, **kwargs), h_post)


class GatedHead(Gates):
    """Collapse the streams before the output by gates for each channel.

    ``h = mean_i sigmoid(z_i) u_i`` with z and u as in :class:`GatedConnection`.

    Parameters
    ----------
    dims, n, rank, eps
        As for :class:`GatedConnection`.

    Attributes
    ----------
    hc_norm, input_mix_weight_down, input_mix_weight_up
        As those of :class:`GatedConnection`, with the same start.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    Qwen4-Exp's ``hyper_connection_mixer``.
    """

    def __init__(self, dims: int, n: int = 4, rank: int = GATE_RANK, eps: float = 1e-6) -> None:
        super().__init__(*checked_gates("GatedHead", dims, n, rank, eps))

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., dims]`` from ``[..., n, dims]``: :func:`mhc_core.gated_head`."""
        weights = self.weights()
        if weights is not None:
            return mhc.gated_head(x, *weights, self.hc_norm.eps)
        return self.mixed(x, self.hc_norm(x))
