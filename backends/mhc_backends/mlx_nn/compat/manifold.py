"""mlx-mhc's connection with static mappings."""

from __future__ import annotations

import math

import mlx.core as mx

import mhc_core as mhc
from mhc_backends.mlx_nn.compat._static import StaticModule, residual_start
from mhc_core import checks

__all__ = ["ManifoldHyperConnection"]


class ManifoldHyperConnection(StaticModule):
    """Replace a residual addition by a static connection on slices of the hidden state.

    In two stages around a layer F, ``*`` scaling each of the slices::

        h = pre_scale(x)                 # H_pre * x
        x' = post_combine(x, F(h))       # H_post * (F(h) + H_res (H_pre * x))

    or in one, ``connection(x, F(x))``, where F does not see H_pre. With
    ``H_pre = sigmoid(h_pre_raw + h_pre_bias)``, ``H_post = 2 sigmoid(h_post_raw + h_post_bias)``
    and ``H_res = sinkhorn_knopp(h_res_raw, sinkhorn_iterations)``. In evaluation mode all three are
    computed once, and again when a parameter changes.

    Parameters
    ----------
    dims
        The size of the last axis, a multiple of ``expansion``.
    expansion
        n, the slices.
    sinkhorn_iterations
        The maximum number of Sinkhorn iterations, from 1 to 1000.
    init
        ``"mlx-mhc"``: H_pre 1/2, H_post 1, H_res random, as mlx-mhc starts. ``"residual"``:
        ``x' = F(x) + x`` to 1e-3, for a network that was trained with plain residuals.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or size; the error names it.

    Notes
    -----
    ``ManifoldHyperConnection`` of mlx-mhc 0.4.1, with its parameters: ``h_res_raw [n, n]``,
    ``h_pre_raw``, ``h_pre_bias``, ``h_post_raw`` and ``h_post_bias``, all ``[n]``. Unlike
    mlx-mhc's, it accepts any leading shape and returns x's dtype.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import ManifoldHyperConnection
    >>> connection = ManifoldHyperConnection(dims=8, expansion=2)
    >>> x = mx.ones((1, 3, 8))
    >>> connection.post_combine(x, mx.tanh(connection.pre_scale(x))).shape
    (1, 3, 8)
    """

    raw = ("h_res_raw", "h_pre_raw", "h_pre_bias", "h_post_raw", "h_post_bias")

    def __init__(
        self,
        dims: int,
        expansion: int = 2,
        sinkhorn_iterations: int = 20,
        *,
        init: str = "mlx-mhc",
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.dims = checks.positive_int(owner, "dims", dims)
        self.expansion = n = checks.positive_int(owner, "expansion", expansion)
        self.sinkhorn_iterations = checks.iterations(
            owner, "sinkhorn_iterations", sinkhorn_iterations
        )
        checks.one_of("mlx-mhc", "residual")(owner, "init", init)
        if dims % n:
            raise ValueError(f"{owner}: dims is {dims}; needs a multiple of expansion={n}")
        self.h_res_raw = mx.random.normal((n, n)) / math.sqrt(n)
        self.h_pre_raw = mx.zeros((n,))
        self.h_pre_bias = mx.zeros((n,))
        self.h_post_raw = mx.zeros((n,))
        self.h_post_bias = mx.zeros((n,))
        if init == "residual":
            self.h_pre_raw, self.h_post_raw, self.h_res_raw = residual_start(n)

    def pre_scale(self, x: mx.array) -> mx.array:
        """Return the layer's input, ``H_pre * x``.

        Parameters
        ----------
        x
            ``[..., dims]``.

        Returns
        -------
        array
            ``[..., dims]`` in x's dtype.

        Raises
        ------
        ValueError
            If x's last axis is not ``dims``.
        """
        self._check(x)
        return mhc.pre_scale(x, self.h_pre())

    def post_combine(self, x: mx.array, layer_output: mx.array) -> mx.array:
        """Combine the residual and a layer's output, ``H_post * (y + H_res (H_pre * x))``.

        Parameters
        ----------
        x
            ``[..., dims]``, before :meth:`pre_scale`.
        layer_output
            ``[..., dims]``, the layer's output for ``pre_scale(x)``.

        Returns
        -------
        array
            ``[..., dims]`` in x's dtype.

        Raises
        ------
        ValueError
            If x's last axis is not ``dims``, or the two shapes differ.
        """
        self._check(x)
        return mhc.gated_combine(x, layer_output, self.h_pre(), self.h_post(), self.h_res())

    def __call__(self, x: mx.array, layer_output: mx.array) -> mx.array:
        """Call :meth:`post_combine`: a connection in one stage."""
        return self.post_combine(x, layer_output)

    def h_pre(self) -> mx.array:
        """Return H_pre ``[n]``, float32."""
        sources = self._parameters("h_pre_raw", "h_pre_bias")
        return self._memoized("h_pre", _gate, *sources)

    def h_post(self) -> mx.array:
        """Return H_post ``[n]``, float32."""
        sources = self._parameters("h_post_raw", "h_post_bias")
        return self._memoized("h_post", _double_gate, *sources)

    def h_res(self) -> mx.array:
        """Return H_res ``[n, n]``, float32."""
        # Not mhc_core.sinkhorn: like mlx-mhc, this stops once both errors are below 1e-6.
        sources = (*self._parameters("h_res_raw"), self.sinkhorn_iterations)
        return self._memoized("h_res", mhc.sinkhorn_knopp, *sources)

    def _check(self, x: mx.array) -> None:
        if x.shape[-1] != self.dims:
            owner = type(self).__name__
            raise ValueError(f"{owner}: x has shape {x.shape}; needs [..., dims={self.dims}]")

    def _extra_repr(self) -> str:
        return f"dims={self.dims}, expansion={self.expansion}"


def _gate(raw: mx.array, bias: mx.array) -> mx.array:
    return mx.sigmoid(raw.astype(mx.float32) + bias.astype(mx.float32))


def _double_gate(raw: mx.array, bias: mx.array) -> mx.array:
    return 2 * _gate(raw, bias)
