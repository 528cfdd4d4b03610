"""The ops on JAX arrays: jitted once per static configuration, their vjps joined by custom_vjp.

JAX has no forward mode (jvp, linearize, jacfwd) for custom_vjp functions. Inside
``mhc_core.no_grad()`` an op runs its plain formulas, which JAX differentiates itself, in both
modes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.experimental
import numpy
from jax.core import Tracer

from mhc_core import gradients, math
from mhc_core.sharding import Named, channel_axis, channels_over

Static = tuple[tuple[str, Any], ...]


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in math.OPS:
        raise AttributeError(name)

    def op(*arrays: jax.Array, **static: Any) -> Any:
        made = _forward if gradients.wanted() else _plain
        try:
            axis = named_axis()
            if axis is not None:
                check_channels(name, arrays, axis)
            return made(name, tuple(static.items()), axis)(*varying_alike(arrays, axis))
        except TypeError as error:
            if "forward-mode" in str(error):
                raise TypeError(f"{name}: {FORWARD_MODE}") from error
            raise

    return op


FORWARD_MODE = (
    "JAX has no forward mode (jvp, linearize, jacfwd) for functions with a vjp of their own; call "
    "the op inside `with mhc_core.no_grad():`, where JAX differentiates its plain formulas, or use "
    "reverse mode (grad, vjp, jacrev)"
)


def varying_alike(
    arrays: tuple[jax.Array | None, ...], apart: str | None = None
) -> tuple[jax.Array | None, ...]:
    """Make every array vary over all mesh axes of shard_map over which any of them varies.

    A custom vjp must return gradients that vary as their primals do. So a parameter that all
    devices share is marked as varying before the vjp, and JAX sums its gradient over the devices
    (``check_vma``, https://docs.jax.dev/en/latest/notebooks/shard_map.html). The axis ``apart`` is
    left as it is.
    """
    if not any(isinstance(array, Tracer) for array in arrays):
        return arrays
    axes = [frozenset[str]() if array is None else varying_axes(array) for array in arrays]
    union = frozenset[str]().union(*axes) - {apart}
    if not union:
        return arrays
    return tuple(
        None if array is None else _spread(array, tuple(sorted(union - own)))
        for array, own in zip(arrays, axes, strict=True)
    )


def spread_like(array: jax.Array, like: jax.Array, apart: Sequence[str] = ()) -> jax.Array:
    """Make an array vary over all mesh axes over which another one does, but those ``apart``."""
    missing = varying_axes(like) - varying_axes(array) - {*apart}
    return _spread(array, tuple(sorted(missing)))


def named_axis() -> str | None:
    """Return the axis of a mesh over which channels are sharded."""
    axis = channel_axis()
    return axis.name if isinstance(axis, Named) else None


def check_channels(op: str, arrays: tuple[jax.Array | None, ...], axis: str) -> None:
    """Raise unless what has channels, and only that, has a part on each device of an axis.

    Raises
    ------
    ValueError
        For an array that does not fit; the message names it and what is needed.
    """
    for (name, pattern), array in zip(math.load(op).OP.arrays.items(), arrays, strict=False):
        if array is None:
            continue
        varies = axis in varying_axes(array)
        if "C" in pattern and not varies:
            raise ValueError(
                f"{op}: {name} is the same on all devices of axis {axis!r}; needs a part of its "
                "channels on each, inside jax.shard_map with check_vma=True, its default"
            )
        if "C" not in pattern and varies:
            raise ValueError(
                f"{op}: {name} varies over axis {axis!r}; needs to be the same on all its devices"
            )


def varying_axes(array: jax.Array) -> frozenset[str]:
    """Return the mesh axes of shard_map over which an array varies."""
    typeof = getattr(jax, "typeof", None)  # JAX 0.6
    aval: Any = typeof(array) if typeof else None
    axes: frozenset[str] | None = getattr(aval, "vma", None)  # JAX 0.7
    if axes is None:  # JAX 0.10
        axes = getattr(getattr(aval, "manual_axis_type", None), "varying", None)
    return axes or frozenset()


def _spread(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if not axes:
        return array
    lax: Any = jax.lax
    if hasattr(lax, "pcast"):  # JAX 0.8
        return lax.pcast(array, axes, to="varying")
    return lax.pvary(array, axes)


def by_our_rules(function: Callable[..., Any], axis: str | None = None) -> Callable[..., Any]:
    """Trace a function under JAX's default type promotion, even if the caller's is strict.

    ``axis`` is that of the mesh over which channels are sharded, also when the vjp is traced.
    """

    @functools.wraps(function)
    def traced(*arrays: Any) -> Any:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            channels_over(None if axis is None else Named("jax", axis)),
        ):
            return function(*arrays)

    return traced


@functools.cache
def _plain(op: str, static: Static, axis: str | None = None) -> Callable[..., Any]:
    """Return the plain formulas, which JAX differentiates by itself."""
    forward = functools.partial(math.load(op).forward, **dict(static))
    return jax.jit(by_our_rules(forward, axis))


@functools.cache
def _forward(op: str, static: Static, axis: str | None = None) -> Callable[..., Any]:
    module, options = math.load(op), dict(static)

    def forward(*primals: jax.Array) -> Any:
        return module.forward(*primals, **options)

    def with_saved(*primals: jax.Array) -> Any:
        if not hasattr(module, "forward_with_saved"):
            return forward(*primals), (primals, ())
        outputs, saved = module.forward_with_saved(*primals, **options)
        return outputs if len(outputs) > 1 else outputs[0], (primals, tuple(saved))

    def pullback(kept: Any, cotangents: Any) -> Any:
        primals, saved = kept
        several = isinstance(cotangents, tuple)
        return module.vjp(primals, cotangents if several else (cotangents,), saved, **options)

    custom_vjp: Any = jax.custom_vjp  # its own stubs leave the type open
    differentiable = custom_vjp(by_our_rules(forward, axis))
    differentiable.defvjp(by_our_rules(with_saved, axis), by_our_rules(pullback, axis))
    return jax.jit(differentiable)


@functools.cache
def _vjp(op: str, static: Static, axis: str | None = None) -> Callable[..., Any]:
    return jax.jit(by_our_rules(functools.partial(math.load(op).vjp, **dict(static)), axis))


def vjp(
    op: str, primals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...], **static: Any
) -> tuple[jax.Array, ...]:
    """Pull cotangents back by the hand-written vjp, jitted."""
    axis = named_axis()
    if axis is not None:
        check_channels(op, primals, axis)
    spread = varying_alike((*primals, *cotangents), axis)
    count = len(primals)
    return _vjp(op, tuple(static.items()), axis)(spread[:count], spread[count:])


def from_host(array: numpy.ndarray[Any, Any]) -> jax.Array:
    """Return a NumPy array as a JAX array, which does not share its memory."""
    return jax.device_put(numpy.array(array))  # jnp.asarray compiles a copy for every shape


def to_host(array: jax.Array) -> numpy.ndarray[Any, Any]:
    """Return a JAX array as a NumPy array of the same dtype."""
    return numpy.asarray(array)


def grad(function: Callable[..., jax.Array], argnums: Sequence[int]) -> Callable[..., Any]:
    """Apply jax.grad."""
    return cast("Callable[..., Any]", jax.grad(function, argnums=tuple(argnums)))


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply jax.jit."""
    return jax.jit(function)


def composed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply jax.jit: one program takes less time to compile than each call's by itself.

    It is to run once, so on a CPU it is compiled without XLA's fusion emitters and LLVM's
    optimisations, which take four fifths of the time (JAX 0.10); ``compile`` leaves both on.
    """
    return jax.jit(function, **_in_a_hurry())


@functools.cache
def _in_a_hurry() -> dict[str, Any]:
    """Return arguments of jax.jit; none on other devices, and where this XLA knows no such ones."""
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {"compiler_options": options}


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """Apply jax.vmap."""
    return jax.vmap(function, in_axes=tuple(in_axes))


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply jax.checkpoint."""
    return cast("Callable[..., Any]", jax.checkpoint(function))


def dtype_context(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Enter JAX's x64 mode, without which float64 arrays cannot be made."""
    if dtype != "float64":
        return contextlib.nullcontext()
    owner: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return owner.enable_x64(True)
