"""Dispatch: check a call, select its backend, and run it.

A compiler that traces Python code, such as torch.compile, cannot follow a selection, which reads
context variables and the environment. Its backend's module tells it to keep a call of each function
in :data:`OPAQUE` as one step, and :func:`prepare` imports that module before the first such step is
traced.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from mhc_core._arrays import class_named, is_a
from mhc_core._messages import nearest
from mhc_core.backend import TRACE_TIME_MARKS
from mhc_core.discovery import backend_module, by_priority, discover, missing_reason
from mhc_core.errors import BackendUnavailableError
from mhc_core.selection import recall, remember, select
from mhc_core.signature import Op, Signature, signature

__all__ = [
    "FUNCTIONS",
    "NUMBERS",
    "OPAQUE",
    "call",
    "call_vjp",
    "checked_call",
    "checked_number",
    "checked_vjp",
    "get_op",
    "prepare",
]

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""The API's functions by name, which it enters itself: the defaults of an op's vjp are there."""

NUMBERS: dict[str, Callable[..., Any]] = {}
"""The functions of :mod:`mhc_core.diagnostics` by name, which it enters itself."""

_OPS: dict[str, Op] = {}
_PREPARED: set[type] = set()


def get_op(name: str) -> Op:
    """Return the declaration of an op; its module is imported on first use."""
    if name not in _OPS:
        from mhc_core import math

        _OPS[name] = math.load(name).OP
    return _OPS[name]


def prepare(array_type: type) -> None:
    """Import the backend of an array type when the first array of that type arrives.

    Where the call is being traced, that module tells the compiler of :data:`OPAQUE` in time.
    """
    if array_type in _PREPARED:
        return
    for spec in by_priority():
        own = any(issubclass(array_type, class_named(type_name)) for type_name in spec.array_types)
        if own and spec.automatic and not missing_reason(spec):
            with contextlib.suppress(BackendUnavailableError):  # the call itself will say why
                backend_module(spec)
            break
    _PREPARED.add(array_type)


for _mark in TRACE_TIME_MARKS:
    setattr(prepare, _mark, True)


def call(op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None) -> Any:
    """Check a call of an op and run it on its backend."""
    prepare(type(arrays[0]))  # pyright: ignore[reportUnknownArgumentType]
    return checked_call(op, arrays, static, backend)


def checked_call(
    op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None
) -> Any:
    """Check and dispatch one call, in a function that a tracing compiler can keep as one step."""
    function = recall(op, arrays, static, backend)
    if function is not None:
        return function(*arrays)
    try:
        checked = signature(get_op, op, arrays, static)
        function = select(op, checked, backend, _there(checked, arrays))
    except TypeError:
        if (unwrapped := _unwrapped(arrays)) is None:
            raise
        return checked_call(op, unwrapped, static, backend)
    result = function(*arrays, **checked.static)
    remember(op, arrays, static, backend, checked, function)
    return result


def _there(checked: Signature, arrays: Sequence[Any]) -> Sequence[Any]:
    """Return the arrays that are not None."""
    return [array for array in arrays if array is not None] if checked.absent else arrays


def _unwrapped(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return arrays for objects with a backend's ``protocol``, or None if there are none.

    Called only for objects that no backend accepts as they are, so calls on arrays pay nothing for
    it.
    """
    methods = {spec.protocol for spec in discover().specs.values() if spec.protocol}
    known = {name for spec in discover().specs.values() for name in spec.array_types}

    def unwrap(value: Any) -> Any:
        if not any(is_a(value, name) for name in known):
            for method in methods:
                if callable(getattr(cast("Any", type(value)), method, None)):
                    return getattr(value, method)()
        return value

    unwrapped = tuple(map(unwrap, values))
    changed = any(new is not old for new, old in zip(unwrapped, values, strict=True))
    return unwrapped if changed else None


def call_vjp(
    op: str | Callable[..., Any],
    primals: Sequence[Any],
    cotangents: Any,
    static: Mapping[str, Any],
    backend: str | None,
) -> tuple[Any, ...]:
    """Check a call of an op's vjp and run it on its backend."""
    if isinstance(primals, (tuple, list)) and primals:
        prepare(type(primals[0]))  # pyright: ignore[reportUnknownArgumentType]
    return checked_vjp(getattr(op, "__name__", op), primals, cotangents, static, backend)


def checked_vjp(
    op: Any, primals: Any, cotangents: Any, static: Mapping[str, Any], backend: str | None
) -> tuple[Any, ...]:
    """Check and dispatch one vjp, in a function that a tracing compiler can keep as one step."""
    name = _op_name(op)
    declared = get_op(name)
    primals = _primals(declared, primals)
    if len(declared.outputs) == 1 and not isinstance(cotangents, (tuple, list)):
        cotangents = (cotangents,)
    cotangents = _tuple(declared, "cotangents", cotangents)
    try:
        checked = signature(get_op, name, primals, _with_defaults(declared, static), cotangents)
        given = [array for array in (*primals, *cotangents) if array is not None]
        function = select("vjp", checked, backend, given)
    except TypeError:
        if (unwrapped := _unwrapped((*primals, *cotangents))) is None:
            raise
        count = len(primals)
        return checked_vjp(op, unwrapped[:count], unwrapped[count:], static, backend)
    return function(name, primals, cotangents, **checked.static)


def checked_number(name: str, *given: Any, **named: Any) -> Any:
    """Run a function of :data:`NUMBERS`, so that a tracing compiler can keep it as one step."""
    return NUMBERS[name](*given, **named)


OPAQUE = (checked_call, checked_vjp, checked_number)
"""The functions that a tracing compiler must not look into: it keeps a call of each as one step."""


def _op_name(op: Any) -> str:
    from mhc_core.math import OPS

    name = getattr(op, "__name__", op)
    if name not in OPS:
        raise ValueError(f"vjp: op is {name!r}{nearest(name, OPS)}; needs one of {', '.join(OPS)}")
    return name


def _primals(op: Op, primals: Any) -> tuple[Any, ...]:
    names = list(op.arrays)
    least = max((k + 1 for k, name in enumerate(names) if name not in op.optional), default=0)
    arrays = _tuple(op, "primals", primals)
    if not least <= len(arrays) <= len(names):
        raise ValueError(
            f"vjp of {op.name}: primals has length {len(arrays)}; needs {', '.join(names[:least])}"
            + (f" and perhaps {', '.join(names[least:])}" if names[least:] else "")
        )
    return arrays


def _tuple(op: Op, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        given = type(value).__name__
        raise TypeError(f"vjp of {op.name}: {name} is a {given}; needs a tuple of arrays")
    return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


@functools.cache
def _defaults(op: str) -> dict[str, Any]:
    """Return an op's static arguments and their defaults, read from its public function."""
    parameters = inspect.signature(FUNCTIONS[op]).parameters
    return {name: parameters[name].default for name in get_op(op).static}


def _with_defaults(op: Op, static: Mapping[str, Any]) -> dict[str, Any]:
    known = _defaults(op.name)
    for name in static:
        if name in op.arrays:
            raise TypeError(f"vjp of {op.name}: {name} is an array; needs it among the primals")
        if name not in known:
            raise TypeError(
                f"vjp of {op.name}: {name} is no argument of {op.name}{nearest(name, known)}; "
                f"known are {', '.join(known) or 'none'}"
            )
    filled = {**known, **static}
    for name, value in filled.items():
        if value is inspect.Parameter.empty:
            raise TypeError(f"vjp of {op.name}: {name} is missing; {op.name} needs it")
    return filled
