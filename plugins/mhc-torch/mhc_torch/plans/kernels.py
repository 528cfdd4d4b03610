"""The ops by plans: called at once on plain tensors, and as PyTorch's custom operators elsewhere.

A compiler, a transform or a mode that watches operators needs an operator that it can see, with the
shapes of its outputs and its gradient. ``mhc_torch::kernels`` is the one for all forwards, and
``mhc_torch::kernels_vjp`` for all vjps. They cost several times a launch, so a plain call does
without them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mhc_backends.kernels.ops import outputs as count_outputs
from mhc_backends.kernels.plan import Axis, Plan, record
from mhc_core import gradients, math
from mhc_core.sharding import channel_axis
from mhc_core.variants import Variant
from mhc_torch import _dtensor, _function
from mhc_torch._variants import key_of, made
from mhc_torch.ops import require_one_device
from mhc_torch.plans.channels import Shared
from mhc_torch.plans.host import DTYPES, Host
from mhc_torch.plans.kinds import recogniser
from mhc_torch.plans.replay import Replay

__all__ = ["Kernels"]

Tensors = tuple[Tensor, ...]
Static = dict[str, Any]

MOST_PLANS = 4096  # of one backend; each is a few kilobytes
MOST_PULLS = 4  # layouts of the tensors of a vjp that are recognised

ABSENT = "absent"
"""Beside the static arguments: the places of primals that are None, which tensors alone do not say.

All functions here take the tensors that are there. An output that is None is no tensor either.
"""

_C: Any = import_module("torch._C")

_BY_NAME: dict[str, Kernels] = {}


class Kernels:
    """The ops on the devices of one host, under a name that custom operators pass on.

    Plans are made for exact shapes, in about a millisecond. They launch functions that many shapes
    share, so a new number of tokens compiles nothing.
    """

    def __init__(self, name: str, host: Host) -> None:
        self.name, self.dialect = name, host.dialect
        self._host = host
        self._replays: dict[Any, Replay] = {}
        self._kinds: dict[Any, _Kind] = {}
        self.shared = Shared(self._of_parts, _present, _launchable)
        _BY_NAME[name] = self

    def replay(
        self,
        key: tuple[Any, ...],
        groups: Sequence[Sequence[Tensor]],
        static: Static,
        devices: int = 1,
    ) -> Replay:
        """Return the plan for an op on tensors like these, on the device of the first.

        The key begins with ``"forward"``, ``"forward_with_saved"`` or ``"vjp"`` and the op's name,
        and says all that a plan depends on. ``devices`` share the channels.
        """
        found = self._replays.get(key)
        if found is None:
            found = self._replays[key] = self._new(key[0], key[1], groups, static, devices)
            if len(self._replays) > MOST_PLANS:
                del self._replays[next(iter(self._replays))]
        return found

    def _of_parts(
        self, what: str, op: str, groups: Sequence[Sequence[Tensor]], static: Static, devices: int
    ) -> Replay:
        """Return the plan for an op on parts of the channels."""
        sizes = tuple(map(len, groups))
        every = [one for group in groups for one in group]
        key = (what, *_key(op, static, every), *sizes, ("devices", devices))
        return self.replay(key, groups, static, devices)

    def _new(self, what: str, op: str, groups: Any, static: Static, devices: int) -> Replay:
        index = groups[0][0].get_device()
        arrays = [[(tuple(one.shape), one.dtype) for one in group] for group in groups]
        memory = self._host.memory(index)
        plan = _recorded(self.dialect, what, op, arrays, static, memory, devices)
        guard = self._host.guard(index)
        if guard is None:
            return Replay(plan, self._host, index)
        with guard:
            return Replay(plan, self._host, index)

    # ---- forwards --------------------------------------------------------------------------------

    def function(self, op: str) -> Callable[..., Any]:
        """Return an op as a function of tensors and its static arguments."""
        declared = math.load(op).OP
        count, names = count_outputs(op), tuple(declared.arrays)
        may_ask = any(output.asked for output in declared.outputs.values())
        may_lack = not may_ask and any(output.mixed for output in declared.outputs.values())
        watched, transformed = _watched, _transformed
        shared, axis = self.shared.apply, channel_axis

        @functools.cache
        def kept(variant: Variant) -> tuple[bool, ...]:
            return declared.kept({"variant": variant})

        def call(*primals: Tensor, **static: Any) -> Any:
            # one loop for all that is asked of every tensor: this is a good part of a small call
            index, plain, graph = primals[0].get_device(), not watched(), False
            key: list[Any] = [index, *static.values()]
            for one in cast("tuple[Tensor | None, ...]", primals):
                if one is None:
                    if _dtensor.is_distributed(primals):
                        return _dtensor.apply(op, call, primals, static, shared)
                    if axis() is not None:
                        require_one_device(op, names, primals)
                        return shared(op, primals, static)
                    there, static = _present(primals, static)
                    return call(*there, **static)
                if one.get_device() != index:
                    require_one_device(op, _named(names, static), primals)
                if type(one) not in _PLAIN:
                    plain = False
                if one.requires_grad:
                    graph = True
                key += (one.shape, one.dtype)
            if not plain and _dtensor.is_distributed(primals):
                return _dtensor.apply(op, call, primals, static, shared)
            if axis() is not None:
                return shared(op, primals, static)
            if transformed():
                results = cast("Any", _OpInTransforms).apply(self, op, static, *primals)
            elif not plain:
                require_one_device(op, _named(names, static), primals)
                results = cast("Any", self._operator(op, static, primals))
            else:
                kind = self._kind((op, *key), static)
                if graph and torch.is_grad_enabled() and gradients.wanted():
                    results = cast("Any", _Op).apply(kind, *primals)
                else:
                    results = kind.forward(primals)
            if may_ask and not all(made := declared.kept(static)):
                return _function.filled(results, made)
            if may_lack and not all(made := kept(static["variant"])):
                return _function.filled(results, made)
            return results[0] if count == 1 else tuple(results[:count])

        def specialise(
            arrays: Sequence[Tensor | None], static: Static
        ) -> tuple[Callable[..., bool], Callable[..., Any]] | None:
            """Return a function that recognises arrays like these, and the op for them."""
            primals, asked = _present(arrays, static)
            if transformed() or not _plain(primals):  # a compiler's sizes may be open
                return None
            if axis() is not None:
                return None
            if (same := recogniser(arrays)) is None:
                return None
            kind = _Kind(self, _key(op, asked, primals), asked, _contiguous(primals))
            graph, made = _differentiable(primals), declared.kept(static)
            absent, whole, alone = len(primals) < len(arrays), all(made), count == 1

            def special(*arrays: Tensor | None) -> Any:
                if watched():
                    return call(*cast("Tensors", arrays), **static)
                there = [one for one in arrays if one is not None] if absent else arrays
                if graph and gradients.wanted():
                    results = _apply_op(kind, *there)
                else:
                    results = kind.forward(cast("Tensors", there))
                if not whole:
                    return _function.filled(results, made)
                return results[0] if alone else tuple(results)

            return same, special

        cast("Any", call).specialise = specialise
        return call

    def _kind(self, key: tuple[Any, ...], static: Static) -> _Kind:
        """Return what is known of an op's calls with tensors of this key, in any layout."""
        found = self._kinds.get(key)
        if found is None:
            found = self._kinds[key] = _Kind(self, key, static, contiguous=False)
            if len(self._kinds) > MOST_PLANS:
                del self._kinds[next(iter(self._kinds))]
        return found

    def _operator(self, op: str, static: Static, primals: Sequence[Tensor]) -> Tensors:
        return tuple(torch.ops.mhc_torch.kernels(self.name, op, _written(static), list(primals)))

    def saving(self, op: str, static: Static, primals: Sequence[Tensor]) -> Tensors:
        """Return an op's outputs and what its vjp reads besides, without a gradient."""
        if _plain(primals):
            key = ("forward_with_saved", *_key(op, static, primals))
            return tuple(self.replay(key, (primals,), static)(primals))
        return self._operator(op, static, primals)

    # ---- vjps ------------------------------------------------------------------------------------

    def vjp(
        self,
        op: str,
        primals: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
        static: Static,
    ) -> tuple[Tensor | None, ...]:
        """Pull cotangents back; None for each primal that is None."""
        there, asked = _present(primals, static)
        given, _ = _present(cotangents, {})
        pulled = self.pull_back(op, there, given, (), asked)
        return _function.filled(pulled, [one is not None for one in primals])

    def pull_back(
        self, op: str, primals: Tensors, cotangents: Tensors, saved: Tensors, static: Static
    ) -> Tensors:
        """Pull cotangents back by an op's vjp kernels; the result can be differentiated again."""
        every = (*primals, *cotangents, *saved)
        if _transformed() or (_plain(every) and _differentiable(every)):
            apply = cast("Any", _PullBack).apply
            return apply(self, op, static, len(primals), *primals, *cotangents)
        if _plain(every):
            return tuple(self.pulling(op, primals, cotangents, saved, static)(every))
        return tuple(
            torch.ops.mhc_torch.kernels_vjp(
                self.name, op, _written(static), list(primals), list(cotangents), list(saved)
            )
        )

    def pulling(
        self, op: str, primals: Tensors, cotangents: Tensors, saved: Tensors, static: Static
    ) -> Replay:
        """Return the plan of an op's vjp on tensors like these."""
        groups = (primals, cotangents, saved) if saved else (primals, cotangents)
        every = (*primals, *cotangents, *saved)
        return self.replay(("vjp", *_key(op, static, every), len(cotangents)), groups, static)


def _present(arrays: Sequence[Tensor | None], static: Static) -> tuple[Tensors, Static]:
    """Return the tensors that are there, and static arguments that say which are not."""
    absent = tuple(place for place, one in enumerate(arrays) if one is None)
    there = tuple(one for one in arrays if one is not None)
    return there, {**static, ABSENT: absent} if absent else static


def _named(names: Sequence[str], static: Static) -> list[str]:
    """Return the names of the primals that are there."""
    return [name for place, name in enumerate(names) if place not in static.get(ABSENT, ())]


def _split(static: Static) -> tuple[Static, tuple[int, ...]]:
    """Return an op's own static arguments, and the places of primals that are None."""
    own = dict(static)
    return own, own.pop(ABSENT, ())


def _recorded(
    dialect: str,
    what: str,
    op: str,
    arrays: Any,
    static: Static,
    memory: int,
    devices: int = 1,
) -> Plan:
    own, absent = _split(static)
    return record(what, op, arrays, own, dialect, memory, absent, devices)


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors have memory of their own, and nobody watches what is done to them."""
    return not _watched() and all([type(one) in _PLAIN for one in tensors])  # noqa: C419 (faster)


def _launchable(tensors: Sequence[Tensor]) -> bool:
    return _plain(tensors) and not _transformed()


_watched: Callable[[], int] = _C._len_torch_dispatch_stack
"""Return the number of modes that watch operators."""


def _key(op: str, static: Static, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    key: list[Any] = [op, tensors[0].get_device(), *static.values()]
    for one in tensors:
        key += (one.shape, one.dtype)
    return tuple(key)


def _transformed() -> bool:
    """Return whether a transform of torch.func is under way."""
    return _C._functorch.peek_interpreter_stack() is not None


_PLAIN = (Tensor, torch.nn.Parameter)


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(one.is_contiguous() for one in tensors)


def _differentiable(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


class _Kind:
    """An op on plain tensors of one kind: its plans, each from when it is first needed.

    The key is :func:`_key`'s. ``contiguous`` says that all primals are known to be.
    """

    def __init__(
        self, kernels: Kernels, key: tuple[Any, ...], static: Static, contiguous: bool
    ) -> None:
        self._kernels, self._key, self._static = kernels, key, static
        self._contiguous = contiguous
        self._forward: Replay | None = None
        self._saving: Replay | None = None
        self._pulls: list[tuple[Callable[..., bool], bool, Replay]] = []
        self._sought = 0

    def forward(self, primals: Tensors) -> Sequence[Tensor]:
        """Return the op's outputs."""
        replay = self._forward
        if replay is None:
            replay = self._forward = self._replay("forward", primals)
        return replay.run([*primals]) if self._contiguous else replay(primals)

    def forward_with_saved(self, primals: Tensors) -> tuple[Sequence[Tensor], Replay]:
        """Return the op's outputs and what its vjp reads besides, and the plan."""
        replay = self._saving
        if replay is None:
            replay = self._saving = self._replay("forward_with_saved", primals)
        return replay.run([*primals]) if self._contiguous else replay(primals), replay

    def _replay(self, what: str, primals: Tensors) -> Replay:
        return self._kernels.replay((what, *self._key), (primals,), self._static)

    def pull_back(self, primals: Tensors, cotangents: Tensors, saved: Tensors) -> Sequence[Tensor]:
        """Pull cotangents back; the result can be differentiated again."""
        op, static = self._key[0], self._static
        if torch.is_grad_enabled():
            # The saved values are recomputed from the primals, because the vjp has no cotangents
            # for saved values.
            return self._kernels.pull_back(op, primals, cotangents, (), static)
        every = (*primals, *cotangents, *saved)
        for same, contiguous, replay in self._pulls:
            if same(*every) and not _watched():
                return replay.run([*every]) if contiguous else replay(every)
        pulled = self._kernels.pull_back(op, primals, cotangents, saved, static)
        if self._sought < MOST_PULLS and _plain(every) and not _transformed():
            self._sought += 1
            if (same := recogniser(every)) is not None:
                replay = self._kernels.pulling(op, primals, cotangents, saved, static)
                self._pulls.append((same, _contiguous(every), replay))
        return pulled


class _Op(torch.autograd.Function):
    """An op on plain tensors as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, *primals: Tensor) -> Tensors:
        results, replay = kind.forward_with_saved(primals)
        ctx.kind, ctx.count = kind, len(primals)
        ctx.save_for_backward(*primals, *[results[k] for k in replay.saved])
        return tuple(results[: replay.outputs])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        kept, count = ctx.saved_tensors, ctx.count  # a checkpoint recomputes them at each access
        return None, *ctx.kind.pull_back(kept[:count], cotangents, kept[count:])


_apply_op: Callable[..., Tensors] = cast("Any", super(torch.autograd.Function, _Op)).apply
"""``_Op.apply`` without its search for transforms and for tensors that are left from one."""


class _OpInTransforms(torch.autograd.Function):
    """An op inside torch.func.grad and the like, which need its context apart from its forward.

    PyTorch looks at the signature of such a forward at every call, which takes longer than the op.
    """

    @staticmethod
    def forward(kernels: Kernels, op: str, static: Static, *primals: Tensor) -> Tensors:
        return kernels.saving(op, static, primals)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        kernels, op, static, *primals = inputs
        saved, outputs = _places(kernels.dialect, op, _written(static), primals)
        ctx.given = kernels, op, static, len(primals), outputs
        ctx.save_for_backward(*primals, *[output[k] for k in saved])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        kernels, op, static, count, outputs = ctx.given
        kept = ctx.saved_tensors
        saved = () if torch.is_grad_enabled() else kept[count:]
        pulled = kernels.pull_back(op, kept[:count], cotangents[:outputs], saved, static)
        return None, None, None, *pulled


class _PullBack(torch.autograd.Function):
    """A vjp, differentiated in turn through the neutral formulas."""

    @staticmethod
    def forward(kernels: Kernels, op: str, static: Static, count: int, *given: Tensor) -> Tensors:
        return kernels.pull_back(op, given[:count], given[count:], (), static)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        _, op, static, count = inputs[:4]
        ctx.given = op, static, count
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        op, static, count = ctx.given
        return None, None, None, None, *_second(op, static, count, ctx.saved_tensors, cotangents)


def _by_formulas(op: str, static: Static, count: int, arrays: Tensors) -> Tensors:
    """Return the neutral vjp of ``count`` primals, and of the cotangents after them."""
    own, absent = _split(static)
    primals: list[Tensor | None] = list(arrays[:count])
    for place in absent:
        primals.insert(place, None)
    cotangents = _function.filled(arrays[count:], math.load(op).OP.kept(own))
    pulled = _function.pull_back(op, tuple(primals), cotangents, None, own)
    return tuple(one for one in pulled if one is not None)


def _second(
    op: str, static: Static, count: int, given: Tensors, cotangents: Sequence[Tensor]
) -> Tensors:
    """Pull cotangents of a vjp back through the neutral vjp."""

    def pulled(*arrays: Tensor) -> Tensors:
        return _by_formulas(op, static, count, arrays)

    outputs, pull = cast("Any", torch.func.vjp)(pulled, *given)
    typed = (one.to(output.dtype) for one, output in zip(cotangents, outputs, strict=True))
    return cast("Tensors", pull(tuple(typed)))


# ---- custom operators ----------------------------------------------------------------------------


@torch.library.custom_op("mhc_torch::kernels", mutates_args=())
def _forward(backend: str, op: str, static: str, arrays: Sequence[Tensor]) -> list[Tensor]:
    """Return an op's outputs, and then what else its vjp reads."""
    options = _read(static)
    key = ("forward_with_saved", *_key(op, options, arrays))
    replay = _BY_NAME[backend].replay(key, (arrays,), options)
    return _separate(replay(arrays), arrays)


@_forward.register_fake
def _(backend: str, op: str, static: str, arrays: Sequence[Tensor]) -> list[Tensor]:
    shapes = _described(_BY_NAME[backend].dialect, op, static, arrays).shapes
    device = arrays[0].device
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]


class _Described(NamedTuple):
    """All results of an op: their shapes and dtypes, the indices of those that the vjp reads, and
    the number of outputs, which come first.
    """

    shapes: list[tuple[tuple[Any, ...], torch.dtype]]
    saved: list[int]
    outputs: int


_PLACES: dict[tuple[str, str, int, str], tuple[list[int], int]] = {}


def _places(dialect: str, op: str, static: str, arrays: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return the last two of these, which the shapes of an op's arrays do not change."""
    key = dialect, op, len(arrays), static
    if key not in _PLACES:
        _PLACES[key] = _described(dialect, op, static, arrays)[1:]
    return _PLACES[key]


def _described(dialect: str, op: str, static: str, arrays: Sequence[Tensor]) -> _Described:
    """Describe the results of an op.

    A length that a compiler leaves open is passed through the plan as an :class:`Axis`, which comes
    back in the results' shapes.
    """
    given = [(tuple(_length(n) for n in one.shape), one.dtype) for one in arrays]
    plan = _recorded(dialect, "forward_with_saved", op, [given], _read(static), 1 << 17)
    results = list(plan.outputs)
    for value in plan.saved:
        if not any(value is other for other in results):
            results.append(value)
    saved = [next(k for k, one in enumerate(results) if one is value) for value in plan.saved]
    shapes = [
        (tuple(getattr(size, "length", size) for size in one.shape), DTYPES[one.dtype])
        for one in results
    ]
    return _Described(shapes, saved, len(plan.outputs))


def _length(length: Any) -> int:
    return length if isinstance(length, int) else Axis.of(length)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    backend, op, static, arrays = inputs
    saved, count = _places(_BY_NAME[backend].dialect, op, static, arrays)
    ctx.given = backend, op, static, len(arrays), count
    ctx.save_for_backward(*arrays, *[output[k] for k in saved])


def _forward_backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    backend, op, static, number, count = ctx.given
    kept = ctx.saved_tensors
    shapes = _described(_BY_NAME[backend].dialect, op, static, kept[:number]).shapes
    given = [
        torch.zeros(shape, dtype=dtype, device=kept[0].device) if one is None else one
        for one, (shape, dtype) in zip(cotangents[:count], shapes[:count], strict=True)
    ]
    saved = () if torch.is_grad_enabled() else kept[number:]
    pulled = torch.ops.mhc_torch.kernels_vjp(
        backend, op, static, list(kept[:number]), given, list(saved)
    )
    return None, None, None, list(pulled)


_forward.register_autograd(_forward_backward, setup_context=_forward_context)


@torch.library.custom_op("mhc_torch::kernels_vjp", mutates_args=())
def _vjp(
    backend: str,
    op: str,
    static: str,
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradients of an op's arrays; without saved values it computes them again."""
    options, every = _read(static), [*primals, *cotangents, *saved]
    groups = tuple(primals), tuple(cotangents), tuple(saved)
    return _separate(_BY_NAME[backend].pulling(op, *groups, options)(every), every)


@_vjp.register_fake
def _(
    backend: str,
    op: str,
    static: str,
    primals: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(one, memory_format=torch.contiguous_format) for one in primals]


def _vjp_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, op, static, primals, cotangents, saved = inputs
    ctx.given = op, static, len(primals), len(saved)
    ctx.save_for_backward(*primals, *cotangents)


def _vjp_backward(ctx: Any, cotangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
    op, static, count, saved = ctx.given
    given = ctx.saved_tensors
    wanted = [
        torch.zeros_like(primal) if one is None else one
        for one, primal in zip(cotangents, given[:count], strict=True)
    ]
    pulled = _second(op, _read(static), count, given, wanted)
    return None, None, None, list(pulled[:count]), list(pulled[count:]), [None] * saved


_vjp.register_autograd(_vjp_backward, setup_context=_vjp_context)


def _separate(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Copy results that share memory: each output of an operator has its own."""
    taken = {one.untyped_storage().data_ptr() for one in given}
    separate: list[Tensor] = []
    for one in results:
        memory = one.untyped_storage()
        alone = memory.nbytes() == one.nbytes and memory.data_ptr() not in taken
        separate.append(one if alone or not one.numel() else one.clone())
        taken.add(memory.data_ptr())
    return separate


def _written(static: Static) -> str:
    """Write static arguments as an operator's string."""
    return json.dumps(
        {k: {"variant": key_of(v)} if isinstance(v, Variant) else v for k, v in static.items()}
    )


@functools.cache
def _parsed(text: str) -> Static:
    parsed: dict[str, Any] = json.loads(text)
    for name, value in parsed.items():
        if name == ABSENT:
            parsed[name] = tuple(cast("list[int]", value))
        elif isinstance(value, dict):
            parsed[name] = made(cast("dict[str, str]", value)["variant"])
    return parsed


def _read(text: str) -> Static:
    return dict(_parsed(text))
