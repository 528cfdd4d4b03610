"""The gated residual of Qwen4-Exp; public in :mod:`mhc_torch.nn`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import mhc_core
import mhc_torch.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from mhc_backends.nn_common import GATE_DEVIATION, GATE_RANK, checked_gates
from mhc_torch._dtensor import is_distributed
from mhc_torch._norms import is_changed
from mhc_torch._variants import number_of

__all__ = ["GatedConnection", "GatedHead"]

mhc: Any = mhc_core  # the arrays here are those of any library
Device = torch.device | str | None


def _wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is that."""
    return x.float() if x.itemsize < 4 else x


def is_matrix(layer: nn.Module) -> bool:
    """Return whether a layer multiplies by a plain matrix: not quantised, not with an adapter.

    A layer with a hook must be called: pruning makes the weight in one, calibration looks at x.
    Quantisers replace the module, or as torchao the weight by a tensor of a class of its own.
    """
    if type(layer) is not nn.Linear or is_changed(layer):
        return False
    weight: Any = layer.weight
    part = weight.to_local() if is_distributed([weight]) else weight
    return type(part) in (nn.Parameter, Tensor)


class StreamNorm(nn.Module):
    """The norm of each stream by itself, with a weight of ``1 + weight``."""

    def __init__(self, dims: int, n: int, eps: float, device: Device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n * dims, device=device))
        self._eps = repr(eps)

    @property
    def eps(self) -> float:
        """Return what is added to the mean square of each stream."""
        return number_of(self._eps)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., n * dims]`` from the streams ``[..., n, dims]``."""
        wide = _wide(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled.flatten(-2) * (1 + self.weight)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the constant, for ``print``."""
        return f"eps={self._eps}"


class Gates(nn.Module):
    """The common part of both modules: the norm, and the projections that read the streams."""

    def __init__(self, dims: int, n: int, rank: int, eps: float, device: Device) -> None:
        super().__init__()
        self.dims, self.n, self.rank = dims, n, rank
        self.hc_norm = StreamNorm(dims, n, eps, device)
        self.input_mix_weight_down = nn.Linear(n * dims, rank, bias=False, device=device)
        self.input_mix_weight_up = nn.Linear(rank, n * dims, bias=False, device=device)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Return the layers whose weights the ops take after the norm's."""
        return self.input_mix_weight_down, self.input_mix_weight_up

    def reset_parameters(self) -> None:
        """Set the parameters to the start, as after ``to_empty`` of a module on the device meta."""
        with torch.no_grad():
            self.hc_norm.weight.zero_()
            for layer in self.projections:
                layer.get_parameter("weight").normal_(std=GATE_DEVIATION)

    def weights(self) -> list[Tensor] | None:
        """Return the weights as the ops take them; None if a part must be called."""
        if not all(map(is_matrix, self.projections)) or is_changed(self.hc_norm):
            return None
        return [self.hc_norm.weight, *(layer.get_parameter("weight") for layer in self.projections)]

    def mixed(self, x: Tensor, u: Tensor) -> Tensor:
        """Return h by the layers themselves, from u, the normalised streams."""
        low = functional.silu(self.input_mix_weight_down(u) / self.n)
        gated = _wide(torch.sigmoid(self.input_mix_weight_up(low))) * u
        return gated.reshape(x.shape).mean(-2).to(x.dtype)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return f"dims={self.dims}, n={self.n}, rank={self.rank}"


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
    device
        Where the parameters are; by default PyTorch's default device.

    Attributes
    ----------
    hc_norm, input_mix_weight_down, input_mix_weight_up, block_inject_weight
        Modules with one ``weight`` each, norm, down, up and inject, named as in released
        checkpoints: ``[n * dims]``, ``[rank, n * dims]``, ``[n * dims, rank]`` and
        ``[n, n * dims]``. The last three are ``nn.Linear``, with the dtype of the rest of the
        model. Where another class replaces one or its weight, quantised or with an adapter, or one
        has a hook, the layers compute the gates themselves, beside formulas instead of
        :func:`mhc_core.gated_pre`.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    It starts as Qwen4-Exp's models do: norm 0, the matrices normal with a deviation of 0.02.

    The gated residual of Qwen4-Exp (transformers 5.24, ``Qwen4ExpTextGatedResidual``).

    Examples
    --------
    >>> import torch
    >>> from mhc_torch.nn import GatedConnection
    >>> connection = GatedConnection(dims=8, rank=2)
    >>> connection(torch.ones(2, 4, 8), torch.tanh).shape
    torch.Size([2, 4, 8])
    """

    def __init__(
        self,
        dims: int,
        n: int = 4,
        rank: int = GATE_RANK,
        eps: float = 1e-6,
        device: Device = None,
    ) -> None:
        dims, n, rank, eps = checked_gates("GatedConnection", dims, n, rank, eps)
        super().__init__(dims, n, rank, eps, device)
        self.block_inject_weight = nn.Linear(n * dims, n, bias=False, device=device)
        self.reset_parameters()

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """Return the layers whose weights the ops take after the norm's."""
        return self.input_mix_weight_down, self.input_mix_weight_up, self.block_inject_weight

    def pre(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return h, the layer's input, H_post and None for H_res: :func:`mhc_core.gated_pre`."""
        weights = self.weights()
        if weights is not None:
            h, h_post = mhc.gated_pre(x, *weights, self.hc_norm.eps)
            return h, h_post, None
        u = self.hc_norm(x)
        injected = _wide(self.block_inject_weight(u)) / self.n
        return self.mixed(x, u), 2 * torch.sigmoid(injected), None

    def combine(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: None = None) -> Tensor:
        """Return the streams after a layer that returned y: :func:`mhc_core.combine`."""
        return mhc.combine(x, y, h_post, h_res)

    def forward(self, x: Tensor, layer: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        h, h_post, _ = self.pre(x)
        return self.combine(x, layer(h, *args, **kwargs), h_post)


class GatedHead(Gates):
    """Collapse the streams before the output by gates for each channel.

    ``h = mean_i sigmoid(z_i) u_i`` with z and u as in :class:`GatedConnection`.

    Parameters
    ----------
    dims, n, rank, eps, device
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

    def __init__(
        self,
        dims: int,
        n: int = 4,
        rank: int = GATE_RANK,
        eps: float = 1e-6,
        device: Device = None,
    ) -> None:
        dims, n, rank, eps = checked_gates("GatedHead", dims, n, rank, eps)
        super().__init__(dims, n, rank, eps, device)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., dims]`` from ``[..., n, dims]``: :func:`mhc_core.gated_head`."""
        weights = self.weights()
        if weights is not None:
            return mhc.gated_head(x, *weights, self.hc_norm.eps)
        return self.mixed(x, self.hc_norm(x))
