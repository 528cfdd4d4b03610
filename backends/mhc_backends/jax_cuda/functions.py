"""The functions of a backend that runs plans in JAX, whatever device runs them.

Functions call each other so that gradients can be taken of gradients, of any order: ``forward``;
``saving``, which also returns what the vjp reads; ``pulled``, the vjp by kernels; and ``_second``,
the vjp of that one by the neutral formulas, which JAX differentiates by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mhc_backends.jax.ops import (
    by_our_rules,
    check_channels,
    named_axis,
    spread_like,
    varying_alike,
)
from mhc_backends.jax_cuda import in_shard_map
from mhc_backends.jax_cuda.library import Device
from mhc_backends.jax_cuda.partition import CHANNELS, LAX, Axes, Layout, Words, distributed, vmapped
from mhc_backends.jax_cuda.replay import Replay
from mhc_backends.kernels.ops import OF_PARTS, OPS
from mhc_backends.kernels.plan import Axis, Plan, record
from mhc_core import gradients, math

__all__ = ["FORWARD_MODE", "Ops"]

Arrays = tuple[jax.Array, ...]
Static = tuple[tuple[str, Any], ...]
There = tuple[bool, ...]
Kinds = tuple[tuple[tuple[int, ...], str], ...]
"""The shapes and dtypes of arrays."""
Function = Callable[..., Any]

SAVING = "forward_with_saved"

FORWARD_MODE = (
    "kernels have no forward mode (jvp, linearize, jacfwd); call the op inside `with "
    "mhc_core.no_grad():` with backend='jax', whose plain formulas have it, or use reverse mode "
    "(grad, vjp, jacrev)"
)

# what JAX says of custom_vjp, of a call through FFI, and of custom_partitioning
NOT_FORWARD = ("forward-mode", "cannot be differentiated", "Differentiation rule")


class _Key(NamedTuple):
    """A plan but for the shapes and dtypes; ``what`` is as for :func:`kernels.plan.record`.

    ``axis`` is that of shard_map's mesh over which the caller shards channels.
    """

    what: str
    op: str
    static: Static
    there: There
    axis: str | None = None


class _Saves(NamedTuple):
    """The results of a forward: its outputs, and then what its vjp reads and is no output.

    ``places`` are those of all that the vjp reads, ``new`` its numbers among these of what is no
    output, and ``words`` those of everything returned, with whether it is the tokens' own.
    """

    outputs: int
    places: tuple[int, ...]
    new: tuple[int, ...]
    words: tuple[tuple[Words, bool], ...]


class Ops:
    """The functions of a backend: an op per attribute, and ``vjp``.

    They are jitted, once per op, static arguments and arrays that are there. A plan is made for
    exact shapes, when JAX traces, in about a millisecond.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._replay = functools.lru_cache(maxsize=4096)(self._recorded)
        self._functions = functools.lru_cache(maxsize=4096)(self._make_function)
        self._saves = functools.lru_cache(maxsize=4096)(self._make_saves)
        self._forward = functools.cache(self._make_forward)
        self._inference = functools.cache(self._make_inference)
        self._vjp = functools.cache(self._make_vjp)

    def __getattr__(self, name: str) -> Function:
        if name not in OPS:
            raise AttributeError(name)
        declared = math.load(name).OP
        count = len(declared.outputs)

        @functools.cache
        def kept(static: Static) -> There:
            return declared.kept(dict(static))

        def op(*arrays: jax.Array | None, **static: Any) -> Any:
            axis = named_axis()
            if axis is not None:
                check_channels(name, arrays, axis)
            key = name, tuple(static.items()), _there(arrays), axis
            made = self._forward if gradients.wanted() else self._inference
            try:
                outputs = made(*key)(*_present(varying_alike(arrays, axis)))
            except (TypeError, ValueError, NotImplementedError) as error:
                if any(words in str(error) for words in NOT_FORWARD):
                    raise TypeError(f"{name}: {FORWARD_MODE}") from error
                raise
            if count == 1:
                return outputs[0]
            return _filled(outputs, kept(key[1]))

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
        there, axis = _there(primals), named_axis()
        if axis is not None:
            check_channels(op, tuple(primals), axis)
        spread = varying_alike((*primals, *cotangents), axis)
        count = len(primals)
        pull = self._vjp(op, tuple(static.items()), there, axis)
        return _filled(pull(_present(spread[:count]), _present(spread[count:])), there)

    # ---- plans -----------------------------------------------------------------------------------

    def _record(self, what: str, key: _Key, kinds: Any, devices: int) -> Plan:
        static, absent = dict(key.static), [k for k, one in enumerate(key.there) if not one]
        return record(what, key.op, kinds, static, "cuda", self._device.memory, absent, devices)

    def _recorded(self, key: _Key, kinds: tuple[Kinds, ...], axes: Axes, devices: int) -> Replay:
        return Replay(self._record(key.what, key, kinds, devices), self._device, axes)

    def _call(self, key: _Key, *groups: Arrays) -> Arrays:
        """Run a plan of arrays that may be sharded, or have a batch axis of vmap."""
        kinds = tuple(map(_kinds, groups))
        return self._functions(key, kinds)(*[one for group in groups for one in group])

    def _make_function(self, key: _Key, kinds: tuple[Kinds, ...]) -> Function:
        layout = self._layout(key, kinds)
        counts = list(map(len, kinds))

        def grouped(arrays: Sequence[jax.Array]) -> list[Arrays]:
            following = iter(arrays)
            return [tuple(next(following) for _ in range(count)) for count in counts]

        def again(*arrays: jax.Array) -> Arrays:
            return self._call(key, *grouped(arrays))

        def run(axes: Axes, devices: int) -> Function:
            if axes and key.op not in OF_PARTS:
                saved = self._saves(key, kinds[0]).new if key.what == SAVING else ()
                formulas = _formulas(key, saved, axes)
                return lambda *arrays: formulas(*grouped(arrays))

            def plan(*arrays: jax.Array) -> Arrays:
                own = tuple(map(_kinds, grouped(arrays)))
                return self._replay(key, own, axes, devices)(arrays)

            return plan

        whole, shared = run((), 1), distributed(run, layout)

        def function(*arrays: jax.Array) -> Arrays:
            if key.axis is not None:
                return run((key.axis,), LAX.psum(1, key.axis))(*arrays)
            one_device = jax.device_count() == 1 or in_shard_map()
            return (whole if one_device else shared)(*arrays)

        return vmapped(function, layout, again)

    def _make_saves(self, key: _Key, kinds: Kinds) -> _Saves:
        leading = _leading(key, kinds)
        marked: list[Any] = []
        for (shape, dtype), (words, _) in zip(kinds, _operands(key, kinds), strict=True):
            marked.append(([*map(_axis, words[:leading]), *shape[leading:]], dtype))
        plan = self._record(SAVING, key, [marked], 1)
        returned = list(plan.outputs)
        outputs = _outputs(key, leading)
        new: list[int] = []
        places: list[int] = []
        for number, value in enumerate(plan.saved):
            place = next((k for k, other in enumerate(returned) if other is value), None)
            if place is None:
                place = len(returned)
                returned.append(value)
                outputs.append(_saved_words(value.shape))
                new.append(number)
            places.append(place)
        return _Saves(len(plan.outputs), tuple(places), tuple(new), tuple(outputs))

    def _layout(self, key: _Key, kinds: tuple[Kinds, ...]) -> Layout:
        """Return the words of a function's arrays: primals, cotangents, what the forward saved."""
        leading = _leading(key, kinds[0])
        primals = _operands(key, kinds[0])
        operands, results = primals, primals
        if key.what == "vjp":
            operands = [*primals, *_outputs(key, leading)]
            if len(kinds) > 2:
                saves = self._saves(key, kinds[0])
                operands += [saves.words[place] for place in saves.places]
        elif key.what == SAVING:
            results = self._saves(key, kinds[0]).words
        else:
            results = _outputs(key, leading)
        return Layout(
            key.op,
            tuple(words for words, _ in operands),
            tuple(words for words, _ in results),
            tuple(own for _, own in (*operands, *results)),
            _either(key, len(operands)),
            key.what == "vjp",
        )

    # ---- functions of the arrays that are there, which return those that are there ---------------

    def _make_inference(self, op: str, static: Static, there: There, axis: str | None) -> Function:
        key = _Key("forward", op, static, there, axis)

        def inference(*primals: jax.Array) -> Arrays:
            return self._call(key, primals)

        return jax.jit(by_our_rules(inference, axis))

    def _make_forward(self, op: str, static: Static, there: There, axis: str | None) -> Function:
        key, with_saved = (_Key(what, op, static, there, axis) for what in ("forward", SAVING))
        pulled = self._make_pulled(op, static, there, axis)

        def forward(*primals: jax.Array) -> Arrays:
            return self._call(key, primals)

        def saving(*primals: jax.Array) -> tuple[Arrays, Arrays]:
            made = self._call(with_saved, primals)
            saves = self._saves(with_saved, _kinds(primals))
            return made[: saves.outputs], tuple(made[k] for k in saves.places)

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
        differentiable_saving = custom_vjp(by_our_rules(saving, axis))
        differentiable_saving.defvjp(saving_forward, saving_backward)
        differentiable = custom_vjp(by_our_rules(forward, axis))
        differentiable.defvjp(forward_forward, forward_backward)
        return jax.jit(differentiable)

    def _make_pulled(self, op: str, static: Static, there: There, axis: str | None) -> Function:
        """Return the vjp of primals, cotangents and what the forward saved, if anything."""
        key = _Key("vjp", op, static, there, axis)

        def pulled(primals: Arrays, cotangents: Arrays, saved: Arrays) -> Arrays:
            groups = (primals, cotangents, saved) if saved else (primals, cotangents)
            return self._call(key, *groups)

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
        differentiable = custom_vjp(by_our_rules(pulled, axis))
        differentiable.defvjp(pulled_forward, by_our_rules(pulled_backward, axis))
        return differentiable

    def _make_vjp(self, op: str, static: Static, there: There, axis: str | None) -> Function:
        pulled = self._make_pulled(op, static, there, axis)

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


def _formulas(key: _Key, saved: tuple[int, ...], axes: Axes) -> Function:
    """Return the neutral function of one device's part of the channels; its arrays come in groups.

    ``saved`` has the numbers of what a forward saves and does not return as an output.
    """
    module, options = math.load(key.op), dict(key.static)
    kept = module.OP.kept(options)

    def formulas(primals: Arrays, cotangents: Arrays = (), residuals: Arrays = ()) -> Arrays:
        filled = _filled(primals, key.there)
        if key.what == "vjp":
            given = _filled(cotangents, kept), residuals or None
            return _present(module.vjp(filled, *given, **options))
        if key.what == SAVING and hasattr(module, SAVING):
            outputs, found = module.forward_with_saved(*filled, **options)
            return (*_present(outputs), *[found[k] for k in saved])
        made: Any = module.forward(*filled, **options)
        found = module.residuals(*filled, **options) if saved else ()
        return (*_present(made if len(kept) > 1 else (made,)), *[found[k] for k in saved])

    one_or_several: Any = axes[0] if len(axes) == 1 else axes
    return by_our_rules(formulas, one_or_several)


# ---- the axes of arrays --------------------------------------------------------------------------

WORDS = {"C": CHANNELS, "D": CHANNELS, "nC": "nC"}


def _leading(key: _Key, kinds: Kinds) -> int:
    """Return the number of token axes, which an op's first array has."""
    words = next(iter(math.load(key.op).OP.patterns.values()))[0]
    return len(kinds[0][0]) - len(words) + 1


def _operands(key: _Key, kinds: Kinds) -> list[tuple[Words, bool]]:
    """Return the words of an op's arrays, and whether they are the tokens' own."""
    patterns = math.load(key.op).OP.patterns.values()
    present = [one for one, there in zip(patterns, key.there, strict=False) if there]
    leading = _leading(key, kinds)
    found: list[tuple[Words, bool]] = []
    for alternatives, (shape, _) in zip(present, kinds, strict=True):
        every = [_words(alternative, leading) for alternative in alternatives]
        found.append(next(one for one in every if len(one[0]) == len(shape)))
    return found


def _either(key: _Key, count: int) -> tuple[bool, ...]:
    """Return whether an op's arrays may be one for all tokens or their own; the others may not."""
    patterns = math.load(key.op).OP.patterns.values()
    several = [len(one) > 1 for one, there in zip(patterns, key.there, strict=False) if there]
    return (*several, *[False] * (count - len(several)))


def _outputs(key: _Key, leading: int) -> list[tuple[Words, bool]]:
    outputs = math.load(key.op).OP.outputs_of(dict(key.static)).values()
    return [_words(out.shape.split(), leading) for out in outputs]


def _words(declared: Sequence[str], leading: int) -> tuple[Words, bool]:
    own = declared[0] == "..."
    tokens = map(str, range(leading)) if own else ()
    return (*tokens, *[WORDS.get(word, "") for word in declared[own:]]), own


def _axis(word: str) -> Any:
    return Axis.of(word) if word.isdigit() else 1


def _saved_words(shape: Sequence[int]) -> tuple[Words, bool]:
    """Return the words of what a forward saves, whose token axes are those of its inputs."""
    words = tuple(one.length if isinstance(one, Axis) else "" for one in shape)
    return words, any(words)


def _kinds(arrays: Sequence[jax.Array]) -> Kinds:
    return tuple((one.shape, str(one.dtype)) for one in arrays)


def _there(arrays: Sequence[Any]) -> There:
    return tuple([array is not None for array in arrays])


def _present(arrays: Sequence[Any]) -> Arrays:
    return tuple([array for array in arrays if array is not None])


def _filled(arrays: Sequence[jax.Array], there: Sequence[bool]) -> tuple[jax.Array | None, ...]:
    """Return arrays in their places, with None for those that are not there."""
    following = iter(arrays)
    return tuple(next(following) if one else None for one in there)
