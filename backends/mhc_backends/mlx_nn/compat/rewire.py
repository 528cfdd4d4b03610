"""mhc-mlx's wrapper, which puts a static connection around any module."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

import mhc_core as mhc
from mhc_backends.mlx_nn.compat._static import residual_start
from mhc_backends.mlx_nn.compat.layer import MHCLayer
from mhc_core import checks

__all__ = ["MHCRewire"]


class MHCRewire(nn.Module):
    """Put a static connection around a module F, on the n slices of one hidden state.

    ::

        x' = H_post * (F(H_pre * x) + H_res (H_pre * x))

    where ``*`` scales each slice. H_pre, H_post and H_res are the mappings of an :class:`MHCLayer`.

    Parameters
    ----------
    inner
        F, a module that returns x's shape: a Linear, a QuantizedLinear, a convolution, a block.
    dims
        The size of the last axis, a multiple of n.
    n
        The number of slices.
    init
        ``"residual"`` starts at ``x' = F(x) + x``, to 1e-3. ``"mhc-mlx"`` starts as mhc-mlx does:
        H_pre is 6e-6 and H_post 1.2e-5, so that 1e-10 of the signal is left.
    **mhc_kwargs
        Passed to the :class:`MHCLayer`. ``identity_init=False`` starts at zeros with either init.

    Attributes
    ----------
    inner
        The module.
    mhc
        The :class:`MHCLayer`. Its ``rms_weight`` is not used; mhc-mlx saves one, so it exists.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or size; the error names it.

    Notes
    -----
    ``MHCRewire`` of mhc-mlx 0.6.3. Unlike mhc-mlx's, it returns x's dtype, so that a model in half
    precision stays in half precision, and evaluation mode computes the mappings once.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mlx import nn
    >>> from mhc_core.mlx import MHCRewire
    >>> MHCRewire(nn.Linear(64, 64), dims=64, n=4)(mx.ones((2, 7, 64))).shape
    (2, 7, 64)
    """

    def __init__(
        self, inner: nn.Module, dims: int, n: int = 32, *, init: str = "residual", **mhc_kwargs: Any
    ) -> None:
        super().__init__()
        checks.one_of("residual", "mhc-mlx")("MHCRewire", "init", init)
        self.dims = checks.positive_int("MHCRewire", "dims", dims)
        self.n = checks.positive_int("MHCRewire", "n", n)
        if dims % n:
            raise ValueError(f"MHCRewire: dims is {dims}; needs a multiple of n={n}")
        self.inner: Any = inner
        self.mhc = MHCLayer(n=n, C=dims // n, **mhc_kwargs)
        if init == "residual" and self.mhc.identity_init:
            start = residual_start(n)
            self.mhc.H_pre_raw, self.mhc.H_post_raw, self.mhc.H_res_raw = start

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Apply the connection around F.

        Parameters
        ----------
        x
            ``[..., dims]``.
        *args, **kwargs
            Passed to F after ``H_pre * x``, such as a mask or a cache.

        Returns
        -------
        array
            ``[..., dims]`` in x's dtype.

        Raises
        ------
        TypeError, ValueError
            If F does not return one array of x's shape.
        """
        if x.shape[-1] != self.dims:
            raise ValueError(f"MHCRewire: x has shape {x.shape}; needs [..., dims={self.dims}]")
        H_pre, H_post, H_res = self.mhc.mappings()
        backend = self.mhc.backend
        y = self.inner(mhc.pre_scale(x, H_pre, backend=backend), *args, **kwargs)
        self._check(x, y)
        return mhc.gated_combine(x, y, H_pre, H_post, H_res, backend=backend)

    def _check(self, x: mx.array, y: Any) -> None:
        name = type(self.inner).__name__
        if not isinstance(y, mx.array):
            raise TypeError(
                f"MHCRewire: the inner {name} returned a {type(y).__name__}; needs one array"
            )
        if y.shape != x.shape:
            raise ValueError(
                f"MHCRewire: the inner {name} returned shape {y.shape}; needs x's shape {x.shape}"
            )

    def _extra_repr(self) -> str:
        return f"dims={self.dims}, n={self.n}"
