"""The program of the separate process: it runs an op's kernels and compares them with the oracle.

It reports each step on its standard output as a line of JSON, so that its parent knows how far it
came if it never ends, or is ended by a fault of the GPU.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal

__all__ = ["KINDS", "FaultError", "first_line", "main", "named", "stored", "teller"]


KINDS: tuple[Literal["forward"], Literal["gradient"]] = ("forward", "gradient")


class FaultError(Exception):
    """A kernel is wrong; the message says how, in one line."""


def main(request: dict[str, Any]) -> None:
    """Prove one kind of call.

    Parameters
    ----------
    request
        ``op``, ``dtypes`` and ``n``; ``launcher``, such as ``"mlx.core:fast.metal_kernel"``;
        ``compiled``, whether kernels may be called under ``mx.compile``; ``limit``, the seconds
        after which this process ends itself if its parent has not done so.
    """
    tell, launcher = teller(request["limit"]), named(request["launcher"])
    kind = request["op"], tuple(request["dtypes"]), request["n"]
    from mhc_backends.proof.launches import calls, launches

    chosen = calls(*kind)
    tell(classes=sorted({one.class_ for call in chosen for one in launches(call)}))
    try:
        for number, call in enumerate(chosen):
            _prove(call, launcher, tell)
            if number == 0:
                _prove_whole(call, launcher, request["compiled"], tell)
    except FaultError as fault:
        tell(fault=str(fault))
    else:
        tell(proven=True)


def teller(limit: float) -> Callable[..., None]:
    """Return a function that reports a step; the process ends itself after ``limit`` seconds."""
    faulthandler.dump_traceback_later(limit, exit=True)
    # what libraries print must not come between the lines
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def tell(**said: Any) -> None:
        lines.write(json.dumps(said) + "\n")

    return tell


def named(name: str) -> Any:
    """Return what a name such as ``"mlx.core:fast.metal_kernel"`` is of."""
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _prove(call: Any, launcher: Any, tell: Any) -> None:
    """Run a call's kernels one by one."""
    import mlx.core as mx

    from mhc_backends.kernels import ops
    from mhc_backends.kernels.mlx import Kernels
    from mhc_backends.mlx_common import as_tuple, present, to_host
    from mhc_backends.proof.launches import Launched, Watched, run
    from mhc_backends.proof.numbers import fault, inputs, wanted

    ran: list[Launched] = []

    def told(kernel: Any, launched: Launched, arguments: Any) -> Any:
        tell(at=f"kernel {launched.kernel}", trying=launched.class_)
        ran.append(launched)
        try:
            outputs = kernel(**arguments)
            mx.eval(*outputs)
        except Exception as error:
            tell(failed=[launched.class_])
            raise FaultError(f"kernel {launched.kernel}: {first_line(error)}") from error
        return outputs

    tell(at="the oracle")
    given = inputs(call)
    arrays = [_own(array, call.offset) for array in given.all_primals]
    cotangents = [_own(array, call.offset) for array in given.all_cotangents]
    kernels = Kernels(Watched(launcher, told), "metal")
    results = [
        [to_host(array) for array in present(as_tuple(result))[:count]]
        for result, count in zip(run(kernels, call, arrays, cotangents), _counts(call), strict=True)
    ]
    tell(at="the oracle")
    plain, with_saved, pulled = results

    def again(asked: Any) -> Any:
        return ops.load(asked.op).forward(kernels, *call.placed(arrays), **asked.options)

    kept = stored(call, plain, again, to_host)
    outputs = wanted(call, "forward", given, kept)
    gradients = wanted(call, "gradient", given, kept)
    for got, want in ((plain, outputs), (with_saved, outputs), (pulled, gradients)):
        if wrong := fault(call, got, want):
            names = ", ".join(dict.fromkeys(one.kernel for one in ran))
            tell(failed=sorted({one.class_ for one in ran}))
            raise FaultError(f"{wrong} ({call.name}; kernels {names})")
    tell(held=sorted({one.class_ for one in ran}))


def _prove_whole(call: Any, launcher: Any, compiled: bool, tell: Any) -> None:
    """Run a call and its gradients as users do, compiled and differentiated by MLX."""
    import mlx.core as mx

    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels
    from mhc_backends.mlx_common import as_tuple, present, to_host
    from mhc_backends.proof.numbers import fault, inputs, wanted

    call = call.differentiated
    given = inputs(call)
    arrays = [_own(array, call.offset) for array in given.all_primals]
    cotangents = [_own(array, call.offset) for array in given.all_cotangents]
    op = getattr(Ops(Kernels(launcher, "metal"), mx.compile if compiled else None), call.op)

    def function(*primals: Any) -> list[Any]:
        return list(present(as_tuple(op(*call.placed(primals), **call.options))))

    tell(at=f"{call.op}, differentiated by MLX")
    try:
        results = [list(map(to_host, result)) for result in mx.vjp(function, arrays, cotangents)]
    except Exception as error:
        raise FaultError(f"{call.op}, differentiated by MLX: {first_line(error)}") from error

    def again(asked: Any) -> Any:
        return op(*call.placed(arrays), **asked.options)

    kept = stored(call, results[0], again, to_host)
    for kind, got in zip(KINDS, results, strict=True):
        if wrong := fault(call, got, wanted(call, kind, given, kept)):
            raise FaultError(f"{wrong} ({call.name}; differentiated by MLX)")


def _counts(call: Any) -> Sequence[int]:
    outputs = len(call.cotangents)
    return outputs, outputs, len(call.arrays)


def stored(call: Any, outputs: Sequence[Any], again: Any, to_host: Any) -> dict[str, Any]:
    """Return the outputs that an op reads back, as the backend rounded them.

    Where not all of them were asked for, ``again`` runs the call that asks for all.
    """
    from mhc_conformance.answers import seams
    from mhc_core.math import load

    names, asked = seams(call.op), call.asked
    if not names:
        return {}
    if asked != call:
        outputs = [to_host(array) for array in again(asked) if array is not None]
    named = dict(zip(load(call.op).OP.outputs_of(asked.options), outputs, strict=True))
    return {name: named[output] for name, output in names.items()}


def _own(array: Any, offset: int) -> Any:
    """Return an MLX array that begins ``offset`` elements into its memory."""
    import mlx.core as mx

    from mhc_backends.mlx_common import from_host

    whole = from_host(array)
    if offset:
        ahead = mx.zeros(offset, whole.dtype)
        whole = mx.concatenate([ahead, whole.reshape(-1)])[offset:].reshape(whole.shape)
    mx.eval(whole)
    return whole


def first_line(error: BaseException) -> str:
    """Return the first line of a message, such as a compiler's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if "error:" in line), next(iter(lines), ""))
    return f"{found or type(error).__name__}"
