"""The dynamic connection of the paper and of DeepSeek-V4, as ``mlx.nn`` modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
from mlx import nn

import mhc_core
from mhc_backends.mlx_nn.inside import norm_inside
from mhc_backends.nn_common import (
    ALPHA,
    checked_connection,
    checked_sizes,
    deviation,
    head_bias,
    names_of,
    residual_bias,
)
from mhc_core.variants import PAPER, Variant

__all__ = ["HyperConnection", "HyperHead"]

mhc: Any = mhc_core  # the arrays here are those of any library
Names = tuple[str, str, str]  # of phi, scale and bias
Arrays = tuple[mx.array, mx.array, mx.array]


class Projection(nn.Module):
    """The common part of both modules: three float32 parameters that read the streams."""

    def __init__(self, dims: int, n: int, variant: Variant, groups: int, bias: list[float]) -> None:
        super().__init__()
        self.dims, self.n, self.variant = dims, n, variant
        phi, scale, base = self.names
        self[phi] = deviation(dims, n) * mx.random.normal((len(bias), n * dims))
        self[scale] = mx.full((groups,), ALPHA)
        self[base] = mx.array(bias)

    @property
    def names(self) -> Names:
        """Return the parameters' names, in the order phi, scale, bias."""
        return names_of(self.variant)

    @property
    def projection(self) -> Arrays:
        """Return the parameters phi, scale and bias, as the ops take them."""
        phi, scale, bias = self.names
        own = cast("dict[str, mx.array]", self)
        return own[phi], own[scale], own[bias]

    def __setitem__(self, name: str, value: Any) -> None:
        """Set a parameter, in float32 whatever dtype the rest of the model has.

        A value that is loaded or assigned is upcast. A cast of the whole model (``set_dtype``)
        changes nothing, because its new value is the present one, rounded.
        """
        if isinstance(value, mx.array) and value.dtype != mx.float32:
            if not mx.issubdtype(value.dtype, mx.floating):
                raise TypeError(
                    f"{type(self).__name__}: {name} has dtype {value.dtype}; needs a floating one"
                )
            present = cast("mx.array | None", self.get(name))
            value = value.astype(mx.float32) if not _is_applied() else _unrounded(value, present)
        super().__setitem__(name, value)

    def _extra_repr(self) -> str:
        return f"dims={self.dims}, n={self.n}"


def _is_applied() -> bool:
    """Return whether the assignment comes from ``nn.Module.apply``, which ``set_dtype`` calls.

    The value does not tell: ``apply`` and ``load_weights`` both call ``update`` with arrays. So the
    call stack is inspected.
    """
    code = nn.Module.apply.__code__
    frame = inspect.currentframe()
    for _ in range(2):  # to the caller of __setitem__
        frame = frame and frame.f_back
    while frame is not None and frame.f_code.co_filename == code.co_filename:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def _unrounded(value: mx.array, present: mx.array | None) -> mx.array:
    """Return ``value`` in float32, or the present value if ``value`` is its rounding.

    The gradient is that of the upcast, so that casting the parameters inside a loss works.
    """
    upcast = value.astype(mx.float32)
    if present is None or present.shape != value.shape:
        return upcast
    try:
        rounded = mx.array_equal(present.astype(value.dtype), value).item()
    except (RuntimeError, ValueError):  # mx.compile traces: there are no values
        return upcast
    if not rounded:
        return upcast
    finite = mx.isfinite(upcast)  # float16 ends at 65504
    exact = upcast + mx.stop_gradient(mx.where(finite, present - upcast, 0))
    return mx.where(finite, exact, mx.stop_gradient(present))


class HyperConnection(Projection):
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

    Attributes
    ----------
    phi, alpha, bias
        ``[m, n * dims]``, ``[3]`` and ``[m]``, with m = 2 n + n * n for Sinkhorn and
        ``variant.columns(n)`` for any mixer; alpha is ``[2]`` for a mixer without logits. With the
        DeepSeek variants they are named ``fn``, ``scale`` and ``base``, as in released checkpoints.
        They are always float32: values that are loaded or assigned in another float dtype are
        upcast.
        ``set_dtype``, ``apply`` with a cast, and ``nn.quantize`` leave them unchanged.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    **Start.** A network of these connections between :func:`mhc_core.expand` and
    ``contract(x, "mean")`` or :class:`HyperHead` starts as the plain residual ``x + F(x)``, to
    about 1e-3 of F. alpha is 0.01, and with c_k = cos(pi k (i + 1/2) / n) the bias gives

    - H_pre_i = (1 + c_1 / 2) / n, whose sum is 1;
    - H_post_i = 1 + c_2 / 2, whose mean is 1, with equal weights and with those of H_pre;
    - H_res = 0.99 on the diagonal, equal elsewhere, or where another mixer starts.

    So H_pre reads the plain network's hidden state, however often this H_res has mixed the streams.
    The bias corrects for pre_eps and post_scale; ``sinkhorn_eps`` lets the rows and columns of
    H_res sum to 1 within about ``n * sinkhorn_eps``. phi is normal with variance
    ``0.01 / (n * dims)``, which changes the logits by about 1e-3. With n = 1, H_pre is 0.999, since
    no sigmoid reaches 1.

    **Gradients.** Mixing equal streams changes nothing, so H_res would have no gradient if all
    streams were equal. H_post makes the streams differ, and H_pre, whose weights have another
    pattern, makes the output depend on the difference. With n = 2 there are not two such patterns:
    only phi makes a difference, and the first gradients of H_res are a hundred times smaller. The
    first connection after ``expand`` always sees equal streams. If columns are normalised first
    (PAPER, DeepSeek), its H_res has no effect and no gradient; with rows first (LIGER), that is so
    for the last connection before the mean.

    Eqs. (3), (7-9) and (14-19) of arXiv:2512.24880.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import HyperConnection
    >>> connection = HyperConnection(dims=8)
    >>> connection(mx.ones((2, 4, 8)), mx.tanh).shape
    (2, 4, 8)
    """

    def __init__(self, dims: int, n: int = 4, variant: Variant = PAPER) -> None:
        dims, n, variant = checked_connection("HyperConnection", dims, n, variant)
        super().__init__(dims, n, variant, variant.parts(n), residual_bias(n, variant))

    def mappings(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return H_pre, H_post and H_res of the streams x: :func:`mhc_core.mappings`."""
        return mhc.mappings(x, *self.projection, self.variant)

    def pre(
        self, x: mx.array, norm: nn.Module | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return h, the layer's input, H_post and H_res: :func:`mhc_core.pre`.

        With ``norm``, h is normalised by this module. Kernels apply an ``nn.RMSNorm`` in the same
        pass, unless its weight is wider than the streams.
        """
        arrays = (x, *self.projection)
        words = norm_inside("pre", arrays, norm, self.variant)
        h, *mapped = mhc.pre(*arrays, self.variant, **words)
        return (_normed(h, norm, words), *mapped)

    def combine(self, x: mx.array, y: mx.array, h_post: mx.array, h_res: mx.array) -> mx.array:
        """Return the streams after a layer that returned y: :func:`mhc_core.combine`."""
        return mhc.combine(x, y, h_post, h_res)

    def combine_pre(
        self,
        x: mx.array,
        y: mx.array,
        h_post: mx.array,
        h_res: mx.array,
        h_pre: mx.array | None = None,
        norm: nn.Module | None = None,
    ) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
        """End the previous sublayer and begin this one in one pass: :func:`mhc_core.combine_pre`.

        x, H_post and H_res come from the previous connection and y from its layer. The mappings
        that are returned are this connection's.

        Returns
        -------
        x, h, h_pre, h_post, h_res
            The streams, this layer's input (computed with the h_pre argument, if given, and
            normalised by ``norm`` as in :meth:`pre`) and the mappings.
        """
        arrays = (x, y, h_post, h_res, *self.projection)
        words = norm_inside("combine_pre", arrays, norm, self.variant)
        x, h, *mapped = mhc.combine_pre(*arrays, self.variant, h_pre, **words)
        return (x, _normed(h, norm, words), *mapped)

    def __call__(
        self, x: mx.array, layer: Callable[..., mx.array], *args: Any, **kwargs: Any
    ) -> mx.array:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        if self.training:  # x comes back, so that its two gradients are added in one pass
            h, h_post, h_res, x = mhc.pre_residual(x, *self.projection, self.variant)
        else:
            h, h_post, h_res = self.pre(x)
        return self.combine(x, layer(h, *args, **kwargs), h_post, h_res)


def _normed(h: mx.array, norm: nn.Module | None, words: dict[str, Any]) -> mx.array:
    """Return h after its norm, unless the op with these words has applied it."""
    return h if norm is None or words else cast("mx.array", norm(h))


class HyperHead(Projection):
    """Collapse the streams before the output, by weights that are computed from the streams.

    ``h = sum_i w_i x_i`` with ``w = sigmoid((vec(x) @ phi.T) r scale + bias) + pre_eps``.

    Parameters
    ----------
    dims, n, variant
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

    def __init__(self, dims: int, n: int = 4, variant: Variant = PAPER) -> None:
        dims, n, variant = checked_sizes("HyperHead", dims, n, variant)
        super().__init__(dims, n, variant, 1, head_bias(n, variant))

    def __call__(self, x: mx.array) -> mx.array:
        """Return ``[..., dims]`` from the streams ``[..., n, dims]``: :func:`mhc_core.head`."""
        return mhc.head(x, *self.projection, self.variant)
