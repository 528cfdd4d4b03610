"""``torch.nn`` modules on the uniform ops: ``from mhc_torch.nn import HyperConnection``.

They are those of :mod:`mhc_core.mlx`: the same parameters and names, the same start, the same
options, and with the same weights the same outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import mhc_core
from mhc_backends.nn_common import (
    ALPHA,
    Recompute,
    calls,
    check_stack,
    checked_connection,
    checked_recompute,
    checked_sizes,
    collapse,
    deviation,
    head_bias,
    is_repeatable,
    names_of,
    received,
    residual_bias,
    run_sublayers,
    segment,
    sent,
)
from mhc_core import checks
from mhc_core.variants import PAPER, Variant
from mhc_torch._norms import is_changed, norm_inside
from mhc_torch._variants import key_of, variant_of
from mhc_torch.gated import GatedConnection, GatedHead
from mhc_torch.ops import checkpoint

mhc: Any = mhc_core  # the arrays here are those of any library

__all__ = [
    "GatedConnection",
    "GatedHead",
    "HyperConnectedBlock",
    "HyperConnectedStack",
    "HyperConnection",
    "HyperHead",
]


class _Projection(nn.Module):
    """The common part of both modules: three parameters that read the streams."""

    def __init__(
        self,
        dims: int,
        n: int,
        variant: Variant,
        groups: int,
        bias: list[float],
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.dims, self.n, self._variant = dims, n, key_of(variant)
        self._bias = bias
        shapes = (len(bias), n * dims), (groups,), (len(bias),)
        for name, shape in zip(names_of(variant), shapes, strict=True):
            empty = torch.empty(shape, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(empty))
        self.reset_parameters()

    @property
    def variant(self) -> Variant:
        """Return the constants and the layout of the parameters."""
        return variant_of(self._variant)

    def reset_parameters(self) -> None:
        """Set the parameters to the start, as after ``to_empty`` of a module on the device meta."""
        phi, scale, bias = (self.get_parameter(name) for name in names_of(self.variant))
        with torch.no_grad():
            phi.normal_(std=deviation(self.dims, self.n))
            scale.fill_(ALPHA)
            if not bias.is_meta:
                bias.copy_(torch.tensor(self._bias, dtype=torch.float32, device="cpu"))

    @property
    def projection(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the parameters phi, scale and bias, as the ops take them."""
        phi, scale, bias = (cast("Tensor", getattr(self, name)) for name in names_of(self.variant))
        return phi, scale, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the parameters, but never round them: ``bfloat16()`` and the like leave float32."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            rounded = result.is_floating_point() and result.itemsize < 4
            return tensor.to(result.device, torch.float32) if rounded else result

        return super()._apply(moved, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Upcast what is loaded: with ``assign=True`` the parameters would take its dtype."""
        for name in names_of(self.variant):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                state_dict[prefix + name] = value.float()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the sizes, for ``print``."""
        return f"dims={self.dims}, n={self.n}"


class HyperConnection(_Projection):
    """Connect a layer F to n streams by mappings that are computed from the streams.

    ::

        H_pre, H_post, H_res = mappings(x);  h = sum_i H_pre_i x_i
        x'_i = sum_j H_res[i, j] x_j + H_post_i F(h)

    Parameters
    ----------
    dims
        C, the channels of a stream.
    n
        The number of streams.
    variant
        The constants and the layout of the parameters: :data:`mhc_core.PAPER`, or
        :data:`mhc_core.DEEPSEEK_V4` or ``DEEPSEEK_V41`` for released checkpoints. Its mixer makes
        H_res; with ``"identity"`` there is none, and the methods take and return None for it.
    device
        Where the parameters are; by default PyTorch's default device.

    Attributes
    ----------
    phi, alpha, bias
        ``[m, n * dims]``, ``[3]`` and ``[m]``, with m = 2 n + n * n for Sinkhorn and
        ``variant.columns(n)`` for any mixer; alpha is ``[2]`` for a mixer without logits. With the
        DeepSeek variants they are named ``fn``, ``scale`` and ``base``, as in released checkpoints.
        They are float32
        whatever dtype the rest of the model has: ``half()``, ``bfloat16()`` and ``to`` leave them
        so, and values that are loaded are upcast. ``double()`` is for float64 streams.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    A network of these connections between :func:`mhc_core.expand` and ``contract(x, "mean")`` or
    :class:`HyperHead` starts as the plain residual ``x + F(x)``, as ``mhc_core.mlx`` documents.

    ``forward`` and the other methods use the parameters. FSDP2 gathers them for ``forward`` alone:
    shard the module that calls the methods, or name them by ``register_fsdp_forward_method``.

    Eqs. (3), (7-9) and (14-19) of arXiv:2512.24880.

    Examples
    --------
    >>> import torch
    >>> from mhc_torch.nn import HyperConnection
    >>> connection = HyperConnection(dims=8)
    >>> connection(torch.ones(2, 4, 8), torch.tanh).shape
    torch.Size([2, 4, 8])
    """

    def __init__(
        self,
        dims: int,
        n: int = 4,
        variant: Variant = PAPER,
        device: torch.device | str | None = None,
    ) -> None:
        dims, n, variant = checked_connection("HyperConnection", dims, n, variant)
        bias = residual_bias(n, variant)
        super().__init__(dims, n, variant, variant.parts(n), bias, device)

    def mappings(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_pre, H_post and H_res of the streams x: :func:`mhc_core.mappings`."""
        return mhc.mappings(x, *self.projection, self.variant)

    def pre(self, x: Tensor, norm: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return h, the layer's input, H_post and H_res: :func:`mhc_core.pre`.

        With ``norm``, h is normalised by this module. Kernels apply an ``nn.RMSNorm`` in the same
        pass, if its weight has the streams' dtype and it has no hooks.
        """
        words = norm_inside(norm, x)
        h, *mapped = mhc.pre(x, *self.projection, self.variant, **words)
        return (_normed(h, norm, words), *mapped)

    def combine(self, x: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
        """Return the streams after a layer that returned y: :func:`mhc_core.combine`."""
        return mhc.combine(x, y, h_post, h_res)

    def combine_pre(
        self,
        x: Tensor,
        y: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        h_pre: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """End the previous sublayer and begin this one in one pass: :func:`mhc_core.combine_pre`.

        x, H_post and H_res come from the previous connection and y from its layer. Return the
        streams, this layer's input (computed with the h_pre argument, if given, and normalised by
        ``norm`` as in :meth:`pre`) and this connection's H_pre, H_post and H_res.
        """
        words = norm_inside(norm, x)
        arrays = (x, y, h_post, h_res, *self.projection)
        x, h, *mapped = mhc.combine_pre(*arrays, self.variant, h_pre, **words)
        return (x, _normed(h, norm, words), *mapped)

    def forward(self, x: Tensor, layer: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        h, h_post, h_res = self.pre(x)
        return self.combine(x, layer(h, *args, **kwargs), h_post, h_res)


def _normed(h: Tensor, norm: nn.Module | None, words: dict[str, Any]) -> Tensor:
    """Return h after its norm, unless the op with these words has applied it."""
    return h if norm is None or words else norm(h)


class HyperHead(_Projection):
    """Collapse the streams before the output, by weights that are computed from the streams.

    ``h = sum_i w_i x_i`` with ``w = sigmoid((vec(x) @ phi.T) r scale + bias) + pre_eps``.

    Parameters
    ----------
    dims, n, variant, device
        As for :class:`HyperConnection`.

    Attributes
    ----------
    phi, alpha, bias
        ``[n, n * dims]``, ``[1]`` and ``[n]``, named and kept in float32 as in
        :class:`HyperConnection`. The weights w start as its H_pre.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    DeepSeek-V4's ``hc_head``.
    """

    def __init__(
        self,
        dims: int,
        n: int = 4,
        variant: Variant = PAPER,
        device: torch.device | str | None = None,
    ) -> None:
        dims, n, variant = checked_sizes("HyperHead", dims, n, variant)
        super().__init__(dims, n, variant, 1, head_bias(n, variant), device)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., dims]`` from the streams ``[..., n, dims]``: :func:`mhc_core.head`."""
        return mhc.head(x, *self.projection, self.variant)


class HyperConnectedBlock(nn.Module):
    """A layer on n streams: ``x' = H_res x + H_post (outer) layer(norm(H_pre x))``.

    Parameters
    ----------
    layer
        F: a module that maps ``[..., dims]``, and any further arguments of the call, to
        ``[..., dims]``.
    dims, n, variant, device
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
    Eq. (3) of arXiv:2512.24880.
    """

    def __init__(
        self,
        layer: nn.Module,
        dims: int,
        n: int = 4,
        variant: Variant = PAPER,
        norm: nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        norm = nn.Identity() if norm is None else norm
        _check_module("layer", layer)
        _check_module("norm", norm)
        self.connection = HyperConnection(dims, n, variant, device)
        self.layer = layer
        self.norm = norm

    def transform(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``layer(norm(h), *args, **kwargs)``: the layer without its connection."""
        return self.layer(self.norm(h), *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the block to the streams ``[..., n, dims]``; further arguments go to the layer."""
        connection = self.connection
        if is_changed(connection) or not norm_inside(self.norm, x):
            return connection(x, self.transform, *args, **kwargs)
        h, h_post, h_res = connection.pre(x, self.norm)
        return connection.combine(x, self.layer(h, *args, **kwargs), h_post, h_res)


def _check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"HyperConnectedBlock: {name} is a {type(value).__name__}; needs a torch.nn.Module"
        )


class HyperConnectedStack(nn.Module):
    """Run connected layers from one hidden state to the next: expand, run the layers, collapse.

    One :func:`mhc_core.combine_pre` between two layers reads the streams once, and kernels apply
    the next layer's ``nn.RMSNorm`` in it.

    Parameters
    ----------
    blocks
        :class:`HyperConnectedBlock`, one for each sublayer: attention, MLP, attention, and so on.
    n
        The streams; every block must have as many.
    single_pass
        False is the order of the paper and of DeepSeek-V4: each layer's input is computed with the
        H_pre of its own connection. True is that of DeepSeek-V4.1: the input is computed with the
        H_pre of the previous connection, the first layer reads stream 0, and the last H_pre
        collapses the output.
    recompute
        The size of a segment: in training, that many consecutive sublayers drop their activations
        and run again, layers included, for the gradients. ``"auto"`` is ``sqrt(n L / (n + 2))`` for
        L sublayers; False recomputes nothing.
    head
        A :class:`HyperHead` that collapses the streams; by default their mean does. The single-pass
        order has no head.
    first, last
        False for a stack that is a later, or an earlier, stage of a pipeline. A stage that is not
        the first begins with what the stage before returned: the streams, and in the single-pass
        order also H_pre, as a second argument. One that is not the last returns them.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    **Recomputation** (section 4.3.2 of arXiv:2512.24880) is ``torch.utils.checkpoint`` of each
    segment, without reentrance; dropout draws the same numbers again. Nothing is recomputed in eval
    mode, without gradients, and in calls with arguments that are not tensors or plain data, such as
    a cache, which a layer would write to twice. A layer must not change state when it runs.

    **Hooks**: blocks and their connections are not called, unless one of them has a hook, such as
    pruning's, or a ``forward`` of its own. Then the blocks run one by one; the single-pass order
    has no such form, and raises RuntimeError.

    **FSDP2**: call ``fully_shard`` on the ``layer`` of each block, then on the stack or the model
    around it.

    Sections 3 and 4.3 of arXiv:2512.24880.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from mhc_torch.nn import HyperConnectedBlock, HyperConnectedStack
    >>> stack = HyperConnectedStack([HyperConnectedBlock(nn.Linear(8, 8), 8) for _ in range(6)])
    >>> stack(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    """

    head: HyperHead | None

    def __init__(
        self,
        blocks: Sequence[HyperConnectedBlock],
        n: int = 4,
        single_pass: bool = False,
        recompute: Recompute = "auto",
        head: HyperHead | None = None,
        *,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.first = checks.boolean(owner, "first", first)
        self.last = checks.boolean(owner, "last", last)
        self.n = checks.positive_int(owner, "n", n)
        self.single_pass = checks.boolean(owner, "single_pass", single_pass)
        self.recompute: Recompute = checked_recompute(owner, recompute)
        blocks = list(blocks)
        kinds = HyperConnectedBlock, HyperHead
        check_stack(owner, blocks, self.n, head, single_pass, kinds, last)
        self.blocks = nn.ModuleList(blocks)
        self.register_module("head", head)

    @property
    def segment(self) -> int:
        """Return the number of sublayers in a segment; a single segment is not recomputed."""
        return segment(self.recompute, self.n, len(self.blocks))

    def forward(
        self,
        h: Tensor,
        *args: Any,
        each: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run ``[..., dims]`` through all blocks, to ``[..., dims]``.

        Every layer gets ``args`` and ``kwargs`` after its input, and the layer of block k also gets
        the keyword arguments ``each[k]``.
        """
        blocks, size = list(self.blocks), self.segment
        more = received(self.first, self.single_pass) - 1
        state: tuple[Tensor, ...] = (h, *args[:more])
        args = args[more:]
        arguments = calls(type(self).__name__, len(blocks), args, each, kwargs)
        wanted = self.training and torch.is_grad_enabled()
        recompute = wanted and size < len(blocks)
        recompute = recompute and is_repeatable(arguments, (Tensor, torch.dtype, torch.device))
        called = self._must_call(blocks)
        for start in range(0, len(blocks), size):
            stop = min(start + size, len(blocks))

            def run(*state: Tensor, start: int = start, stop: int = stop) -> tuple[Tensor, ...]:
                part, given = blocks[start : stop + 1], arguments[start:stop]
                if called:
                    return self._call(part, start, given, state)
                return run_sublayers(part, start, given, state, self.single_pass, self.first)

            state = checkpoint(run)(*state) if recompute else run(*state)
        if not self.last:
            return sent(state, self.single_pass)
        return collapse(state, self.single_pass, self.head)

    def _must_call(self, blocks: Sequence[Any]) -> bool:
        """Return whether the blocks must be called; raise if their order cannot do that."""
        for k, block in enumerate(blocks):
            for one, path in ((block, ""), (block.connection, ".connection")):
                if not is_changed(one):
                    continue
                if self.single_pass:
                    raise RuntimeError(
                        f"{type(self).__name__}: blocks[{k}]{path} has a hook or a forward of its "
                        "own, which the single-pass order does not call; remove it, or make the "
                        "parameter by torch.nn.utils.parametrize"
                    )
                return True
        return False

    def _call(
        self, blocks: Sequence[Any], start: int, arguments: Sequence[Any], state: tuple[Tensor, ...]
    ) -> tuple[Any, ...]:
        """Call blocks one by one, from number ``start`` on, as a hook on one of them needs."""
        x = mhc.expand(*state, self.n) if start == 0 and self.first else state[0]
        for block, (args, kwargs) in zip(blocks, arguments, strict=False):
            x = block(x, *args, **kwargs)
        return x, None
