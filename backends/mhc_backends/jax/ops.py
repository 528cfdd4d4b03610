"""The ops on JAX arrays: jitted once per static configuration, their vjps joined by custom_vjp.

Forward-mode differentiation (jax.jvp) is not defined for custom_vjp functions, by JAX's rule;
``mhc_core.math.<op>.forward`` under plain JAX has it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.experimental
import jax.numpy as jnp
import numpy

from mhc_core import math

Static = tuple[tuple[str, Any], ...]


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in math.OPS:
        raise AttributeError(name)

    def op(*arrays: jax.Array, **static: Any) -> Any:
        return _forward(name, tuple(static.items()))(*arrays)

    return op


@functools.cache
def _forward(op: str, static: Static) -> Callable[..., Any]:
    module, options = math.load(op), dict(static)

    def forward(*primals: jax.Array) -> Any:
        return module.forward(*primals, **options)

    def saving(*primals: jax.Array) -> Any:
        if not hasattr(module, "saving"):
            return forward(*primals), (primals, ())
        outputs, saved = module.saving(*primals, **options)
        return outputs if len(outputs) > 1 else outputs[0], (primals, tuple(saved))

    def back(kept: Any, cotangents: Any) -> Any:
        primals, saved = kept
        several = isinstance(cotangents, tuple)
        return module.vjp(primals, cotangents if several else (cotangents,), saved, **options)

    custom_vjp: Any = jax.custom_vjp  # its own stubs leave the type open
    differentiable = custom_vjp(forward)
    differentiable.defvjp(saving, back)
    return jax.jit(differentiable)


@functools.cache
def _vjp(op: str, static: Static) -> Callable[..., Any]:
    return jax.jit(functools.partial(math.load(op).vjp, **dict(static)))


def vjp(
    op: str, primals: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...], **static: Any
) -> tuple[jax.Array, ...]:
    """Pull cotangents back by the hand-written vjp, jitted."""
    return _vjp(op, tuple(static.items()))(primals, cotangents)


def from_host(array: numpy.ndarray[Any, Any]) -> jax.Array:
    """Take a NumPy array in."""
    return jnp.asarray(array)


def to_host(array: jax.Array) -> numpy.ndarray[Any, Any]:
    """Give a NumPy array of the same dtype."""
    return numpy.asarray(array)


def grad(function: Callable[..., jax.Array], argnums: Sequence[int]) -> Callable[..., Any]:
    """jax.grad."""
    return cast("Callable[..., Any]", jax.grad(function, argnums=tuple(argnums)))


def compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit."""
    return jax.jit(function)


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """jax.vmap."""
    return jax.vmap(function, in_axes=tuple(in_axes))


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.checkpoint."""
    return cast("Callable[..., Any]", jax.checkpoint(function))


def dtype_context(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Enter JAX's x64 mode, without which float64 arrays cannot be made."""
    if dtype != "float64":
        return contextlib.nullcontext()
    owner: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return owner.enable_x64(True)
