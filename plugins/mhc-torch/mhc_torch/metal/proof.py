"""The program that proves torch-metal on a machine, in a process of its own.

The calls, their numbers and the verdict are those of ``mlx-metal``
(:mod:`mhc_backends.proof`), with the launches of plans in place of MLX's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Literal, cast

import torch

from mhc_backends.proof.cache import identity_with
from mhc_backends.proof.child import FaultError, first_line, named, stored, teller
from mhc_backends.proof.launches import Call, calls, planned
from mhc_backends.proof.numbers import fault, inputs, wanted
from mhc_torch.ops import from_host, to_host
from mhc_torch.plans.functions import functions
from mhc_torch.plans.kernels import Kernels

__all__ = ["identity", "main"]

Quantity = Literal["forward", "gradient"]


def identity() -> dict[str, str]:
    """Return what a verdict depends on: the kernels, PyTorch, the system and the chip."""
    # by which torch/csrc/mps/Module.cpp has the device's name
    name: Any = getattr(import_module("torch._C"), "_mps_get_name", lambda: "unknown")
    return identity_with(torch=f"{torch.__version__}", chip=name())


def main(request: dict[str, Any]) -> None:
    """Prove one kind of call; ``request`` is that of :func:`mhc_backends.proof.child.main`.

    Its ``launcher`` names a function that returns a host, such as ``"mhc_torch.metal.host:Metal"``.
    """
    tell, host = teller(request["limit"]), named(request["launcher"])()
    op, dtypes, n = request["op"], tuple(request["dtypes"]), request["n"]
    chosen = calls(op, dtypes, n, planned)
    tell(classes=sorted({one.class_ for call in chosen for one in planned(call)}))
    by_name, vjp = functions(Kernels("torch-metal-proof", host))
    try:
        for call in chosen:
            _prove(call, by_name(op), vjp, host.device, tell)
    except FaultError as wrong:
        tell(fault=str(wrong))
    else:
        tell(proven=True)


def _prove(
    call: Call, op: Callable[..., Any], vjp: Callable[..., Any], device: str, tell: Any
) -> None:
    """Run a call without gradients, with PyTorch's own, and its vjp, and compare every number."""
    classes = sorted({one.class_ for one in planned(call)})
    kernels = ", ".join(dict.fromkeys(one.kernel for one in planned(call)))
    try:
        for how, quantity, own, got in _results(call, op, vjp, device, tell):
            tell(at="the oracle")
            given = inputs(own)
            arrays = _take(given.all_primals, call.offset, device)

            def again(asked: Call, arrays: Sequence[Any] = arrays) -> list[Any]:
                return _several(op(*asked.placed(arrays), **asked.options))

            outputs = got if quantity == "forward" else [to_host(a) for a in again(own)]
            kept = stored(own, outputs, again, to_host)
            if wrong := fault(own, got, wanted(own, quantity, given, kept)):
                raise FaultError(f"{wrong} ({call.name}; {how}; kernels {kernels})")
    except FaultError:
        tell(failed=classes)
        raise
    tell(held=classes)


def _results(
    call: Call, op: Callable[..., Any], vjp: Callable[..., Any], device: str, tell: Any
) -> Iterator[tuple[str, Quantity, Call, list[Any]]]:
    """Yield each way to run a call: its name, what it computes, for which call, and the numbers."""

    def run(how: str, compute: Callable[[], Sequence[Any]]) -> list[Any]:
        tell(at=f"{call.op} ({call.name}; {how})")
        try:
            return [to_host(one) for one in compute()]
        except Exception as error:
            raise FaultError(f"{call.op}: {first_line(error)} ({call.name}; {how})") from error

    def taken(own: Call) -> tuple[list[Any], list[Any]]:
        given = inputs(own)
        arrays = _take(given.all_primals, call.offset, device)
        return arrays, _take(given.all_cotangents, call.offset, device)

    arrays, cotangents = taken(call)
    placed, options = call.placed(arrays), call.options
    yield (
        "forward", "forward", call, run("forward", lambda: _several(op(*placed, **options)))
    )  # fmt: skip
    pulled = run(
        "vjp", lambda: _several(vjp(call.op, placed, call.placed_cotangents(cotangents), **options))
    )
    yield "vjp", "gradient", call, pulled
    own = call.differentiated
    arrays, cotangents = taken(own)
    leaves = [one.requires_grad_() for one in arrays]
    outputs: list[Any] = []

    def whole() -> Sequence[Any]:
        outputs.extend(_several(op(*own.placed(leaves), **options)))
        return outputs

    yield "differentiated by PyTorch", "forward", own, run("differentiated by PyTorch", whole)
    gradients = run(
        "differentiated by PyTorch", lambda: torch.autograd.grad(outputs, leaves, cotangents)
    )
    yield "differentiated by PyTorch", "gradient", own, gradients


def _several(outputs: Any) -> list[Any]:
    many = isinstance(outputs, (tuple, list))
    every = cast("Sequence[Any]", outputs if many else (outputs,))
    return [one for one in every if one is not None]


def _take(arrays: Sequence[Any], offset: int, device: str) -> list[Any]:
    """Return tensors that begin ``offset`` elements into their memory."""
    whole = [from_host(array).to(device) for array in arrays]
    if not offset:
        return whole
    return [torch.cat([a.new_zeros(offset), a.flatten()])[offset:].view(a.shape) for a in whole]
