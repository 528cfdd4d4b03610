"""The dynamic connection as pure functions of JAX; public as :mod:`mhc_core.jax`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import mhc_core as mhc
from mhc_backends.nn_common import (
    ALPHA,
    GATE_DEVIATION,
    GATE_RANK,
    checked_connection,
    checked_gates,
    checked_sizes,
    deviation,
    head_bias,
    names_of,
    residual_bias,
)
from mhc_core import sharding
from mhc_core.variants import PAPER, Variant

__all__ = ["GatedConnection", "GatedHead", "HyperConnection", "HyperHead", "channels_over"]

Params = dict[str, jax.Array]


@contextlib.contextmanager
def channels_over(axis_name: str) -> Generator[None]:
    """Tell the ops inside a ``jax.shard_map`` that devices of an axis have a part of the channels.

    Streams, layer inputs and outputs, norm weights and phi are then parts; mappings, scale and bias
    are the same on all devices of the axis. What the maths needs of the other parts is summed, in
    one all-reduce each: ``m + 1`` numbers a token in ``mappings``, ``pre`` and ``combine_pre``, and
    for the gradients of H_pre, H_post and H_res as many numbers as these have. Streams are never
    gathered. Other axes of the mesh may have parts of the tokens. The ops are those in
    ``mhc_core.sharding.CHANNEL_OPS``, on the backends ``jax`` and ``jax-cuda``.

    Keep phi as ``[m, n, C]`` outside, to shard it along C.

    Parameters
    ----------
    axis_name
        The name of the axis.

    Raises
    ------
    TypeError
        If ``axis_name`` is no word.
    ValueError
        From an op inside, for an array that is no part, or is one and must not be.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, mhc_core as mhc
    >>> from jax.sharding import AxisType, PartitionSpec as P
    >>> from mhc_core.jax import channels_over
    >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    >>> parts = (P(None, None, "model"), P(None, None, "model"), P(), P())
    >>> @jax.shard_map(mesh=mesh, in_specs=parts, out_specs=(P(None, "model"), P(), P()))
    ... def pre(x, phi, scale, bias):
    ...     with channels_over("model"):
    ...         return mhc.pre(x, phi.reshape(len(phi), -1), scale, bias, mhc.PAPER)
    >>> h, h_post, h_res = pre(jnp.ones((5, 4, 8)), jnp.ones((24, 4, 8)), jnp.ones(3), jnp.ones(24))
    >>> h.shape
    (5, 8)
    """
    if axis_name is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise TypeError("channels_over: axis_name is None; needs the name of an axis")
    _check_axis("channels_over", axis_name)
    with sharding.channels_over(sharding.Named("jax", axis_name)):
        yield


def _check_axis(owner: str, axis_name: Any) -> None:
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(f"{owner}: axis_name is {axis_name!r}; needs the name of an axis")


def _over(axis_name: str | None) -> contextlib.AbstractContextManager[None]:
    """Return the block in which ops sum over C across the devices of an axis, if there is one."""
    return contextlib.nullcontext() if axis_name is None else channels_over(axis_name)


@dataclass(frozen=True)
class _Projection:
    """Sizes and constants, without arrays: hashable, so a static argument of ``jax.jit``."""

    dims: int
    n: int = 4
    variant: Variant = PAPER
    axis_name: str | None = None

    _checked = staticmethod(checked_sizes)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        sizes = self._checked(owner, self.dims, self.n, self.variant)
        for name, value in zip(("dims", "n", "variant"), sizes, strict=True):
            object.__setattr__(self, name, value)
        _check_axis(owner, self.axis_name)

    def _start(self, key: jax.Array, groups: int, bias: list[float]) -> Params:
        shape = (len(bias), self.n * self.dims)
        arrays = (
            deviation(self.dims, self.n) * jax.random.normal(key, shape, jnp.float32),
            jnp.full((groups,), ALPHA, jnp.float32),
            jnp.array(bias, jnp.float32),
        )
        return dict(zip(names_of(self.variant), arrays, strict=True))

    def _arrays(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return phi, scale and bias, as the ops take them; phi may be [m, n, C]."""
        phi, scale, bias = names_of(self.variant)
        return params[phi].reshape(len(params[phi]), -1), params[scale], params[bias]


@dataclass(frozen=True)
class HyperConnection(_Projection):
    """Connect a layer F to n streams by mappings that are computed from the streams.

    ::

        H_pre, H_post, H_res = mappings(x);  h = sum_i H_pre_i x_i
        x'_i = sum_j H_res[i, j] x_j + H_post_i F(h)

    It holds no arrays: :meth:`init` makes the parameters, a dict, which every method takes first.
    Wrap it in a module of flax or equinox, or use it as it is.

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
    axis_name
        In ``jax.shard_map``, the axis of the mesh over whose devices the channels are sharded
        (:func:`channels_over`); shard phi, kept as ``[m, n, C]``, along C with the streams.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    The parameters are ``phi``, ``alpha`` and ``bias``, or with the DeepSeek variants ``fn``,
    ``scale`` and ``base``, as in released checkpoints. Keep them in float32. The start is that of
    ``mhc_core.mlx.HyperConnection``: between :func:`mhc_core.expand` and ``contract(x, "mean")`` a
    network starts as the plain residual ``x + F(x)``.

    Eqs. (3), (7-9) and (14-19) of arXiv:2512.24880.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from mhc_core.jax import HyperConnection
    >>> connection = HyperConnection(dims=8)
    >>> params = connection.init(jax.random.key(0))
    >>> connection(params, jnp.ones((2, 4, 8)), jnp.tanh).shape
    (2, 4, 8)
    """

    _checked = staticmethod(checked_connection)

    def init(self, key: jax.Array) -> Params:
        """Return the parameters at the start."""
        parts = self.variant.parts(self.n)
        return self._start(key, parts, residual_bias(self.n, self.variant))

    def mappings(self, params: Params, x: jax.Array) -> Any:
        """Return H_pre, H_post and H_res of the streams x: :func:`mhc_core.mappings`."""
        with _over(self.axis_name):
            return mhc.mappings(x, *self._arrays(params), self.variant)

    def pre(self, params: Params, x: jax.Array) -> Any:
        """Return h, the layer's input, H_post and H_res: :func:`mhc_core.pre`."""
        with _over(self.axis_name):
            return mhc.pre(x, *self._arrays(params), self.variant)

    def combine_pre(
        self,
        params: Params,
        x: jax.Array,
        y: jax.Array,
        h_post: jax.Array,
        h_res: jax.Array,
        h_pre: jax.Array | None = None,
    ) -> Any:
        """End the previous sublayer and begin this one in one pass: :func:`mhc_core.combine_pre`.

        x, H_post and H_res come from the previous connection and y from its layer. Return the
        streams, this layer's input (computed with the h_pre argument, if given) and this
        connection's H_pre, H_post and H_res.
        """
        with _over(self.axis_name):
            return mhc.combine_pre(x, y, h_post, h_res, *self._arrays(params), self.variant, h_pre)

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        layer: Callable[..., jax.Array],
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        h, h_post, h_res = self.pre(params, x)
        y = layer(h, *args, **kwargs)
        with _over(self.axis_name):
            return mhc.combine(x, y, h_post, h_res)


@dataclass(frozen=True)
class HyperHead(_Projection):
    """Collapse the streams before the output, by weights that are computed from the streams.

    ``h = sum_i w_i x_i`` with ``w = sigmoid((vec(x) @ phi.T) r scale + bias) + pre_eps``.

    Parameters
    ----------
    dims, n, variant, axis_name
        As for :class:`HyperConnection`, whose H_pre the weights w start as.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    DeepSeek-V4's ``hc_head``.
    """

    def init(self, key: jax.Array) -> Params:
        """Return the parameters at the start."""
        return self._start(key, 1, head_bias(self.n, self.variant))

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        """Return ``[..., dims]`` from the streams ``[..., n, dims]``: :func:`mhc_core.head`."""
        with _over(self.axis_name):
            return mhc.head(x, *self._arrays(params), self.variant)


@dataclass(frozen=True)
class _Gates:
    """Sizes and the constant of a gated residual: hashable, as :class:`_Projection`."""

    dims: int
    n: int = 4
    rank: int = GATE_RANK
    eps: float = 1e-6
    axis_name: str | None = None

    def __post_init__(self) -> None:
        owner, names = type(self).__name__, ("dims", "n", "rank", "eps")
        sizes = checked_gates(owner, *(getattr(self, name) for name in names))
        for name, value in zip(names, sizes, strict=True):
            object.__setattr__(self, name, value)
        _check_axis(owner, self.axis_name)

    def _start(self, key: jax.Array, rows: dict[str, tuple[int, int]]) -> Params:
        keys = jax.random.split(key, len(rows))
        matrices = {
            name: GATE_DEVIATION * jax.random.normal(one, shape, jnp.float32)
            for one, (name, shape) in zip(keys, rows.items(), strict=True)
        }
        return {"norm": jnp.zeros(self.n * self.dims, jnp.float32), **matrices}

    @property
    def _gates(self) -> dict[str, tuple[int, int]]:
        columns = self.n * self.dims
        return {"down": (self.rank, columns), "up": (columns, self.rank)}

    def _weights(self, params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the weights of both modules; n and C may be axes of their own there."""
        norm, down, up = (params[name] for name in ("norm", "down", "up"))
        return norm.reshape(-1), down.reshape(self.rank, -1), up.reshape(-1, self.rank)


@dataclass(frozen=True)
class GatedConnection(_Gates):
    """Connect a layer F to n streams by gates for each channel; the streams are not mixed.

    ::

        u_i = x_i / sqrt(mean(x_i^2) + eps) (1 + norm_i)
        z = silu(vec(u) @ down.T / n) @ up.T;  h = mean_i sigmoid(z_i) u_i
        x'_i = x_i + 2 sigmoid(vec(u) @ inject.T / n)_i F(h)

    It holds no arrays: :meth:`init` makes the parameters, a dict, which every method takes first.

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
    axis_name
        In ``jax.shard_map``, the axis of the mesh over whose devices the channels are sharded
        (:func:`channels_over`); shard the parameters, kept with n and C as axes of their own
        (``[n, C]``, ``[rank, n, C]``, ``[n, C, rank]`` and ``[n, n, C]``), along C.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    The parameters are ``norm``, ``down``, ``up`` and ``inject``, as :func:`mhc_core.gated_pre`
    takes them. The start is that of ``mhc_core.mlx.GatedConnection``.

    The gated residual of Qwen4-Exp (transformers 5.24, ``Qwen4ExpTextGatedResidual``).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from mhc_core.jax import GatedConnection
    >>> connection = GatedConnection(dims=8, rank=2)
    >>> params = connection.init(jax.random.key(0))
    >>> connection(params, jnp.ones((2, 4, 8)), jnp.tanh).shape
    (2, 4, 8)
    """

    def init(self, key: jax.Array) -> Params:
        """Return the parameters at the start."""
        return self._start(key, {**self._gates, "inject": (self.n, self.n * self.dims)})

    def pre(self, params: Params, x: jax.Array) -> Any:
        """Return h, the layer's input, H_post and None for H_res: :func:`mhc_core.gated_pre`."""
        inject = params["inject"].reshape(self.n, -1)
        with _over(self.axis_name):
            h, h_post = mhc.gated_pre(x, *self._weights(params), inject, self.eps)
        return h, h_post, None

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        layer: Callable[..., jax.Array],
        *args: Any,
        **kwargs: Any,
    ) -> jax.Array:
        """Apply ``layer(h, *args, **kwargs)`` to the streams ``[..., n, dims]``."""
        h, h_post, _ = self.pre(params, x)
        y = layer(h, *args, **kwargs)
        with _over(self.axis_name):
            return mhc.combine(x, y, h_post, None)


@dataclass(frozen=True)
class GatedHead(_Gates):
    """Collapse the streams before the output by gates for each channel.

    ``h = mean_i sigmoid(z_i) u_i`` with z and u as in :class:`GatedConnection`.

    Parameters
    ----------
    dims, n, rank, eps, axis_name
        As for :class:`GatedConnection`, whose parameters it has, without ``inject``.

    Raises
    ------
    TypeError, ValueError
        For arguments of the wrong type or size; the error names them.

    Notes
    -----
    Qwen4-Exp's ``hyper_connection_mixer``.
    """

    def init(self, key: jax.Array) -> Params:
        """Return the parameters at the start."""
        return self._start(key, self._gates)

    def __call__(self, params: Params, x: jax.Array) -> jax.Array:
        """Return ``[..., dims]`` from ``[..., n, dims]``: :func:`mhc_core.gated_head`."""
        with _over(self.axis_name):
            return mhc.gated_head(x, *self._weights(params), self.eps)
