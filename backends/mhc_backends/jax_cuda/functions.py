"""The functions of a backend that runs plans in JAX, whatever device runs them.

Functions call each other so that gradients can be taken of gradients, of any order: ``forward``;
``saving``, which also returns what the vjp reads; ``pulled``, the vjp by kernels; and ``_second``,
the vjp of that one by the neutral formulas, which JAX differentiates by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mhc_backends.jax.ops import by_our_rules, spread_like, varying_alike
from mhc_backends.jax_cuda.library import Device
from mhc_backends.jax_cuda.replay import Replay
from mhc_backends.kernels.ops import OPS
from mhc_backends.kernels.plan import record
from mhc_core import gradients, math

__all__ = ["FORWARD_MODE", "Ops"]

Arrays = tuple[jax.Array, ...]
Static = tuple[tuple[str, Any], ...]
There = tuple[bool, ...]
Function = Callable[..., Any]

FORWARD_MODE = (
    "kernels have no forward mode (jvp, linearize, jacfwd); call the op inside `with "
    "mhc_core.no_grad():` with backend='jax', whose plain formulas have it, or use reverse mode "
    "(grad, vjp, jacrev)"
)


class Ops:
    """The functions of a backend: an op per attribute, and ``vjp``.

    They are jitted, once per op, static arguments and arrays that are there. A plan is made for
    exact shapes, when JAX traces, in about a millisecond.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._replay = functools.lru_cache(maxsize=4096)(self._recorded)
        self._forward = functools.cache(self._make_forward)
        self._inference = functools.cache(self._make_inference)
        self._vjp = functools.cache(self._make_vjp)

    def __getattr__(self, name: str) -> Function:
        if name not in OPS:
            raise AttributeError(name)
        count = len(math.load(name).OP.outputs)

        def op(*arrays: jax.Array | None, **static: Any) -> Any:
            key = name, tuple(static.items()), _there(arrays)
            made = self._forward if gradients.wanted() else self._inference
            try:
                outputs = made(*key)(*_present(varying_alike(arrays)))
            except (TypeError, ValueError) as error:
                if "forward-mode" in str(error) or "cannot be differentiated" in str(error):
                    raise TypeError(f"{name}: {FORWARD_MODE}") from error
                raise
            if count == 1:
                return outputs[0]
            return _filled(outputs, math.load(name).OP.kept(static))

        setattr(self, name, op)
        return op

    def vjp(
        self,
        op: str,
        primals: Sequence[jax.Array | None],
        cotangents: Sequence[jax.Array | None],
        **static: Any,
    ) -> tuple[jax.Array | None, ...]:
        """Pull cotangents back by the op's vjp kernels."""
        there = _there(primals)
        spread = varying_alike((*primals, *cotangents))
        count = len(primals)
        pull = self._vjp(op, tuple(static.items()), there)
        return _filled(pull(_present(spread[:count]), _present(spread[count:])), there)

    # ---- plans -----------------------------------------------------------------------------------

    def _recorded(self, what: str, op: str, static: Static, there: There, kinds: Any) -> Replay:
        absent = [place for place, one in enumerate(there) if not one]
        plan = record(what, op, kinds, dict(static), "cuda", self._device.memory, absent)
        return Replay(plan, self._device)

    def _plan(self, what: str, op: str, static: Static, there: There, *groups: Arrays) -> Replay:
        kinds = tuple(tuple((one.shape, str(one.dtype)) for one in group) for group in groups)
        return self._replay(what, op, static, there, kinds)

    # ---- functions of the arrays that are there, which return those that are there ---------------

    def _make_inference(self, op: str, static: Static, there: There) -> Function:
        def inference(*primals: jax.Array) -> Arrays:
            return self._plan("forward", op, static, there, primals)(primals)

        return jax.jit(by_our_rules(inference))

    def _make_forward(self, op: str, static: Static, there: There) -> Function:
        key = op, static, there
        pulled = self._make_pulled(op, static, there)

        def forward(*primals: jax.Array) -> Arrays:
            return self._plan("forward", *key, primals)(primals)

        def saving(*primals: jax.Array) -> tuple[Arrays, Arrays]:
            replay = self._plan("forward_with_saved", *key, primals)
            made = replay(primals)
            return made[: replay.outputs], tuple(made[k] for k in replay.saved)

        def saving_forward(*primals: jax.Array) -> Any:
            outputs, saved = differentiable_saving(*primals)
            return (outputs, saved), (primals, saved)

        def saving_backward(kept: Any, cotangents: Any) -> Arrays:
            return pulled(kept[0], cotangents[0], kept[1])

        def forward_forward(*primals: jax.Array) -> Any:
            outputs, saved = differentiable_saving(*primals)
            return outputs, (primals, saved)

        def forward_backward(kept: Any, cotangents: Any) -> Arrays:
            return pulled(kept[0], cotangents, kept[1])

        custom_vjp: Any = jax.custom_vjp  # its own stubs leave the type open
        differentiable_saving = custom_vjp(by_our_rules(saving))
        differentiable_saving.defvjp(saving_forward, saving_backward)
        differentiable = custom_vjp(by_our_rules(forward))
        differentiable.defvjp(forward_forward, forward_backward)
        return jax.jit(differentiable)

    def _make_pulled(self, op: str, static: Static, there: There) -> Function:
        """Return the vjp of primals, cotangents and what the forward saved, if anything."""
        key = op, static, there

        def pulled(primals: Arrays, cotangents: Arrays, saved: Arrays) -> Arrays:
            groups = (primals, cotangents, saved) if saved else (primals, cotangents)
            replay = self._plan("vjp", *key, *groups)
            return replay([*primals, *cotangents, *saved])

        def pulled_forward(primals: Arrays, cotangents: Arrays, saved: Arrays) -> Any:
            return differentiable(primals, cotangents, saved), (primals, cotangents, saved)

        def pulled_backward(kept: Any, cotangents: Arrays) -> Any:
            primals, given, saved = kept
            # it starts from the primals, so what the forward saved has no derivative of its own
            second = _second(op, static, there, primals, given, cotangents)
            return (
                *second,
                tuple([spread_like(jnp.zeros(one.shape, one.dtype), one) for one in saved]),
            )

        custom_vjp: Any = jax.custom_vjp
        differentiable = custom_vjp(by_our_rules(pulled))
        differentiable.defvjp(pulled_forward, by_our_rules(pulled_backward))
        return differentiable

    def _make_vjp(self, op: str, static: Static, there: There) -> Function:
        pulled = self._make_pulled(op, static, there)

        def unsaved(primals: Arrays, cotangents: Arrays) -> Arrays:
            return pulled(primals, cotangents, ())

        return jax.jit(unsaved)


def _second(
    op: str, static: Static, there: There, primals: Arrays, given: Arrays, cotangents: Arrays
) -> tuple[Arrays, Arrays]:
    """Pull cotangents of a vjp back through the neutral vjp, to its primals and its cotangents."""
    module, options = math.load(op), dict(static)
    kept = module.OP.kept(options)

    def neutral(primals: Arrays, given: Arrays) -> Arrays:
        return _present(module.vjp(_filled(primals, there), _filled(given, kept), **options))

    library: Any = jax  # its own stubs leave the type open
    return library.vjp(neutral, primals, given)[1](cotangents)


def _there(arrays: Sequence[Any]) -> There:
    return tuple([array is not None for array in arrays])


def _present(arrays: Sequence[Any]) -> Arrays:
    return tuple([array for array in arrays if array is not None])


def _filled(arrays: Sequence[jax.Array], there: Sequence[bool]) -> tuple[jax.Array | None, ...]:
    """Return arrays in their places, with None for those that are not there."""
    following = iter(arrays)
    return tuple(next(following) if one else None for one in there)
