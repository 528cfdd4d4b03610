"""mhc-mlx's layer with static mappings, and its fused residual addition."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

import mhc_core as mhc
from mhc_backends.mlx_nn.compat._static import StaticModule
from mhc_core import checks

__all__ = ["MHCLayer", "residual_add_agg"]

CLOSED = -12.0  # the logit of a gate at the start: sigmoid(-12) = 6e-6
HALVES = (mx.float16, mx.bfloat16)

Triple = tuple[mx.array, mx.array, mx.array]


class MHCLayer(StaticModule):
    """A whole layer on n streams with static mappings, F being an RMS norm.

    ::

        x' = H_res x + H_post (outer) rms_norm(sum_i H_pre_i x_i, rms_weight)

    with ``H_pre = sigmoid(H_pre_raw)``, ``H_post = 2 sigmoid(H_post_raw)`` and
    ``H_res = sinkhorn(H_res_raw, first="rows")``.

    Parameters
    ----------
    n, C
        The streams, and the channels of each.
    sinkhorn_iters
        The number of Sinkhorn iterations, from 1 to 1000.
    eps
        The norm's eps, at least 0.
    use_metal
        False runs the layer on the backend ``mlx-compiled`` only.
    identity_init
        True starts at ``x' = x``, to about 1e-5; False at H_pre 1/2, H_post 1, H_res 1/n.
    threads_per_group, auto_dispatch, compile_reference, fused_backward, mix_kernel
        Settings by which mhc-mlx chooses among its kernels. They are checked and kept as
        attributes, but have no effect: here the table of launch shapes decides.
    dispatch_policy, hybrid_latency, hybrid_min_C
        The same.
    latency_avoid_fused_n32_max_C, latency_avoid_fused_B1_min_n
        The same.
    throughput_allow_fused_n32_min_B, throughput_allow_fused_n32_min_C
        The same.
    throughput_allow_fused_n32_small_C
        The same.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or size; the error names it.

    Notes
    -----
    ``MHCLayer`` of mhc-mlx 0.6.3, with its parameters: ``H_pre_raw [n]``, ``H_post_raw [n]``,
    ``H_res_raw [n, n]`` and ``rms_weight [C]``. The op is :func:`mhc_core.static_layer`.

    Examples
    --------
    >>> import mlx.core as mx
    >>> from mhc_core.mlx import MHCLayer
    >>> MHCLayer(n=4, C=8)(mx.ones((2, 4, 8))).shape
    (2, 4, 8)
    """

    raw = ("H_pre_raw", "H_post_raw", "H_res_raw")

    def __init__(
        self,
        n: int,
        C: int,
        sinkhorn_iters: int = 20,
        eps: float = 1e-5,
        use_metal: bool = True,
        threads_per_group: int | None = 256,
        identity_init: bool = True,
        auto_dispatch: bool = True,
        compile_reference: bool | None = None,
        dispatch_policy: str = "auto",
        hybrid_latency: bool = False,
        hybrid_min_C: int = 8192,
        latency_avoid_fused_n32_max_C: int = 2048,
        latency_avoid_fused_B1_min_n: int = 16,
        throughput_allow_fused_n32_min_B: int = 8,
        throughput_allow_fused_n32_min_C: int = 4096,
        throughput_allow_fused_n32_small_C: int = 512,
        fused_backward: bool = False,
        mix_kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.n = checks.positive_int("MHCLayer", "n", n)
        self.C = checks.positive_int("MHCLayer", "C", C)
        self.sinkhorn_iters = checks.iterations("MHCLayer", "sinkhorn_iters", sinkhorn_iters)
        self.eps = checks.non_negative("MHCLayer", "eps", eps)
        self.use_metal = bool(use_metal)
        self.identity_init = bool(identity_init)
        self._keep_hints(
            threads_per_group=threads_per_group,
            auto_dispatch=auto_dispatch,
            compile_reference=compile_reference,
            dispatch_policy=dispatch_policy,
            hybrid_latency=hybrid_latency,
            hybrid_min_C=hybrid_min_C,
            latency_avoid_fused_n32_max_C=latency_avoid_fused_n32_max_C,
            latency_avoid_fused_B1_min_n=latency_avoid_fused_B1_min_n,
            throughput_allow_fused_n32_min_B=throughput_allow_fused_n32_min_B,
            throughput_allow_fused_n32_min_C=throughput_allow_fused_n32_min_C,
            throughput_allow_fused_n32_small_C=throughput_allow_fused_n32_small_C,
            fused_backward=fused_backward,
            mix_kernel=mix_kernel,
        )
        start = CLOSED if self.identity_init else 0.0
        self.H_pre_raw = mx.full((self.n,), start)
        self.H_post_raw = mx.full((self.n,), start)
        self.H_res_raw = start * (1 - mx.eye(self.n))
        self.rms_weight = mx.ones((self.C,))

    def _keep_hints(self, **hints: Any) -> None:
        """Check the settings for mhc-mlx's kernels, as it does, and store them as attributes."""
        choices = {
            "dispatch_policy": checks.one_of("auto", "throughput", "latency"),
            "mix_kernel": checks.one_of("auto", "1d", "2d"),
        }
        for name, value in hints.items():
            if name in choices:
                choices[name]("MHCLayer", name, value)
            elif type(value) is int and name != "throughput_allow_fused_n32_small_C":
                checks.positive_int("MHCLayer", name, value)
            setattr(self, name, value)

    @property
    def backend(self) -> str | None:
        """Return the backend that this layer requires, or None for whichever is selected."""
        return None if self.use_metal else "mlx-compiled"

    def mappings(self) -> Triple:
        """Return H_pre ``[n]``, H_post ``[n]`` and H_res ``[n, n]``, float32.

        In evaluation mode they are computed once, and again when a parameter changes.
        """
        sources = (*self._parameters(*self.raw), self.sinkhorn_iters, self.backend)
        return self._memoized("mappings", self._map, *sources)

    @staticmethod
    def _map(pre: mx.array, post: mx.array, res: mx.array, iterations: int, backend: Any) -> Triple:
        return mhc.static_mappings(pre, post, res, iterations, backend=backend)

    def mixing_matrix(self) -> mx.array:
        """Return H_res ``[n, n]``, Sinkhorn's result for ``H_res_raw``."""
        return self.mappings()[2]

    def post_combine(self, x_reshaped: mx.array, y_inner_reshaped: mx.array) -> mx.array:
        """Connect a layer's input and output, ``H_post * (y + H_res (H_pre * x))``.

        Parameters
        ----------
        x_reshaped, y_inner_reshaped
            ``[..., n, C]``: the input before H_pre scaled it, and the output.

        Returns
        -------
        array
            ``[..., n, C]`` in the input's dtype.
        """
        self._check("x_reshaped", x_reshaped)
        x, y = x_reshaped.flatten(-2), y_inner_reshaped.flatten(-2)
        out = mhc.gated_combine(x, y, *self.mappings(), backend=self.backend)
        return out.reshape(x_reshaped.shape)

    def __call__(self, x_expanded: mx.array, *, return_dtype: mx.Dtype | None = None) -> mx.array:
        """Apply the layer.

        Parameters
        ----------
        x_expanded
            ``[..., n, C]`` streams.
        return_dtype
            The dtype of the result. None returns float32, as in mhc-mlx, also for half-precision
            streams. The streams' own dtype is fastest: no float32 copy of them is made.

        Returns
        -------
        array
            ``[..., n, C]``.

        Raises
        ------
        ValueError
            If the streams have another n or C.
        """
        self._check("x_expanded", x_expanded)
        pre, post, res = self._parameters(*self.raw)
        keep_dtype = return_dtype is not None and return_dtype == x_expanded.dtype
        x = x_expanded if keep_dtype else _upcast(x_expanded)
        out = mhc.static_layer(
            x, pre, post, res, self.rms_weight, self.eps, self.sinkhorn_iters, backend=self.backend
        )
        return out if return_dtype is None else out.astype(return_dtype)

    def _check(self, name: str, x: mx.array) -> None:
        if x.shape[-2:] != (self.n, self.C):
            raise ValueError(
                f"MHCLayer: {name} has shape {x.shape}; needs [..., n={self.n}, C={self.C}]"
            )

    def _should_use_metal(self, B: int, n: int, C: int) -> bool:
        """Return whether Metal kernels may run; private in mhc-mlx too, whose tests call it."""
        return self.use_metal and os.environ.get("MHC_MLX_DISABLE_METAL") != "1"

    def _extra_repr(self) -> str:
        return f"n={self.n}, C={self.C}, sinkhorn_iters={self.sinkhorn_iters}"


def residual_add_agg(x: mx.array, res: mx.array, H_pre: mx.array) -> tuple[mx.array, mx.array]:
    """Add a residual and take the next layer's input, ``x' = x + res; h = sum_i H_pre_i x'_i``.

    Parameters
    ----------
    x, res
        ``[..., n, C]`` both.
    H_pre
        ``[n]``, or ``[..., n]`` per token; already activated.

    Returns
    -------
    x, h
        ``[..., n, C]`` and ``[..., C]``; float32 for half-precision streams too.

    Notes
    -----
    ``residual_add_agg`` of mhc-mlx 0.6.3. :func:`mhc_core.residual_add_aggregate` returns the same
    in the streams' dtype, and moves half the bytes for half-precision streams.
    Errors: see :mod:`mhc_core._api`.
    """
    return mhc.residual_add_aggregate(_upcast(x), _upcast(res), H_pre)


def _upcast(x: mx.array) -> mx.array:
    return x.astype(mx.float32) if x.dtype in HALVES else x
