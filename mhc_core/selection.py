"""Selection: the backend for a kind of call, decided once and looked up from then on.

Precedence: ``backend=``, then ``with use_backend(...)``, then ``MHC_BACKEND``, then the arrays' own
library, best backend first. An explicit choice never falls back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from operator import is_
from typing import Any, NamedTuple

from mhc_core import sharding
from mhc_core._arrays import HOST_TYPE, converting_host_arrays, full_name, is_a
from mhc_core._messages import error_text, nearest, warn
from mhc_core._proofs import advice, not_asked, unproven, unproven_text, warn_once
from mhc_core.backend import BackendSpec
from mhc_core.discovery import (
    Discovered,
    backend_module,
    by_priority,
    discover,
    hook_of,
    missing_reason,
)
from mhc_core.errors import BackendUnavailableError, UnknownBackendError, UnsupportedError
from mhc_core.signature import Signature

__all__ = [
    "recall",
    "registered",
    "remember",
    "select",
    "selected",
    "situation",
    "use_backend",
    "without_proofs",
]

_chosen: ContextVar[str | None] = ContextVar("mhc_backend", default=None)
_SELECTED: dict[Any, Callable[..., Any]] = {}


class _Recalled(NamedTuple):
    """A kind of call whose backend recognises it by itself: nothing else is looked up."""

    backend: str | None
    values: tuple[Any, ...]  # of the static arguments
    situation: tuple[Any, ...]
    same: Callable[..., bool]
    function: Callable[..., Any]


_RECALLED: dict[type, dict[Any, tuple[_Recalled, ...]]] = {}
"""By the first array's type; then by the op, the number of arrays and the first array's shape."""

MOST_SHAPES, MOST_KINDS = 4096, 4  # kept: of one type, and of one shape

# os.environ.get costs 0.7 us for an absent name, more than the rest of a selection; the dict
# behind it costs 0.04 us. Without such a dict, os.environ itself is used.
_environ: Any = getattr(os.environ, "_data", os.environ)
_encode: Callable[[str], Any] = getattr(os.environ, "encodekey", str)
_getenv: Callable[[Any], Any] = _environ.get
_MHC_BACKEND = _encode("MHC_BACKEND")

_switches: Callable[[], Any] = tuple
"""Reads the variables by which specs say that they are disabled, once these are discovered."""


@contextlib.contextmanager
def registered(spec: BackendSpec) -> Generator[None]:
    """Add one backend for the length of a ``with`` block, such as a wrong one of the kit's."""
    specs = discover().specs
    if spec.name in specs:
        raise ValueError(f"backend {spec.name!r} is already there, from {specs[spec.name].module}")
    specs[spec.name] = spec
    _forget()  # it may be the best for some of that
    try:
        yield
    finally:
        del specs[spec.name]
        discover().missing.pop(spec.name, None)
        _forget()  # some of it may be of that backend


@contextlib.contextmanager
def without_proofs() -> Generator[None]:
    """Let every backend run without a proof: for code that measures backends, right or wrong."""
    token = not_asked.set(True)
    _forget()  # it may hold the substitute of an unproven backend
    try:
        yield
    finally:
        not_asked.reset(token)
        _forget()


def _forget() -> None:
    """Forget every selection."""
    _SELECTED.clear()
    _RECALLED.clear()


@contextlib.contextmanager
def use_backend(name: str) -> Generator[None]:
    """Run every call inside the ``with`` block on one backend.

    It overrides ``MHC_BACKEND`` and yields to ``backend=``; it is local to the thread or task, and
    blocks may be nested.

    Parameters
    ----------
    name
        One of the names that :func:`backends` returns.

    Raises
    ------
    UnknownBackendError
        For an unknown name; the message has the nearest name and all known ones.
    BackendUnavailableError
        For a backend that cannot run here; the message has the reason.

    Examples
    --------
    >>> import numpy, mhc_core as mhc
    >>> with mhc.use_backend("numpy"):
    ...     mhc.sinkhorn(numpy.zeros((2, 2))).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    _runnable(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _runnable(name: Any, source: str = "") -> BackendSpec:
    found = discover()
    if not isinstance(name, str):
        raise TypeError(f"backend is {name!r}; needs a name such as 'numpy' or 'mlx-compiled'")
    if name not in found.specs:
        if name in found.broken:
            raise BackendUnavailableError(found.broken[name] + source)
        raise UnknownBackendError(
            f"no backend is named {name!r}{source}{nearest(name, found.specs)}; "
            f"known are {', '.join(sorted(found.specs))}"
            + "".join(f" ({reason})" for reason in found.broken.values())
        )
    reason = missing_reason(found.specs[name])
    if reason:
        raise BackendUnavailableError(f"backend {name!r}{source} cannot run here: {reason}")
    return found.specs[name]


class _Choice(NamedTuple):
    spec: BackendSpec
    convert: bool  # whether some arrays are NumPy's and the backend must convert them


def select(
    what: str, call: Signature, backend: str | None, arrays: Sequence[Any]
) -> Callable[..., Any]:
    """Return the backend's function ``what`` (an op's name, or "vjp") for this kind of call."""
    key = (
        what,
        call.key,
        backend,
        _chosen.get(),
        _getenv(_MHC_BACKEND),
        _switches(),
        sharding.library(),
        *map(type, arrays),
    )
    try:
        return _SELECTED[key]
    except (KeyError, TypeError):  # TypeError: backend is no name at all
        if _watch_switches():
            return select(what, call, backend, arrays)
        function = _find(what, call, backend, arrays)
    _SELECTED[key] = function
    return function


def recall(
    op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None
) -> Callable[..., Any] | None:
    """Return a function of the arrays for a call like one that was remembered, or None."""
    kinds = _RECALLED.get(type(arrays[0]))  # pyright: ignore[reportUnknownArgumentType]
    if kinds is None:
        return None
    try:
        recalled = kinds[op, len(arrays), arrays[0].shape]
    except (KeyError, TypeError):  # TypeError: a compiler's symbolic sizes
        return None
    now = _chosen.get(), _getenv(_MHC_BACKEND), _switches(), sharding.library()
    for named, values, then, same, function in recalled:
        if named != backend or then != now or not same(*arrays):
            continue
        # values by identity: 1, 1.0 and True are equal, and not all of them pass a check
        if not values or all(map(is_, values, static.values())):
            return function
    return None


def remember(
    op: str,
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    backend: str | None,
    call: Signature,
    function: Callable[..., Any],
) -> None:
    """Keep what a call has found, where its backend recognises calls of the same kind.

    Static arguments that are made anew for every call are not worth it: those remembered are those
    of the first call of its signature.
    """
    specialise = getattr(function, "specialise", None)
    if specialise is None or any(call.static[name] is not static[name] for name in static):
        return
    special = specialise(arrays, call.static)
    if special is None:
        return
    kinds = _RECALLED.setdefault(type(arrays[0]), {})  # pyright: ignore[reportUnknownArgumentType]
    if len(kinds) >= MOST_SHAPES:
        kinds.clear()
    new = _Recalled(backend, tuple(static.values()), situation(), *special)
    key = op, len(arrays), arrays[0].shape
    kinds[key] = (new, *kinds.get(key, ())[: MOST_KINDS - 1])


def situation() -> tuple[Any, ...]:
    """Return what a selection depends on besides the call: the names and switches in force."""
    return _chosen.get(), _getenv(_MHC_BACKEND), _switches(), sharding.library()


def selected(call: Signature, arrays: Sequence[Any]) -> BackendSpec:
    """Return the backend that runs an op's calls of this kind; nothing is remembered."""
    op = call.op.name
    for name, source in _names_in_force():
        if name is not None:
            return _named(op, name, source, call, arrays).spec
    return _automatic(op, call, arrays, {}).spec


def _names_in_force() -> tuple[tuple[str | None, str], ...]:
    return (
        (_chosen.get(), " (from use_backend)"),
        (os.environ.get("MHC_BACKEND") or None, " (from MHC_BACKEND)"),
    )


def _watch_switches() -> bool:
    """Watch the variables by which backends are disabled; return whether they are new ones."""
    global _switches
    names = [spec.disabled_by for spec in discover().specs.values() if spec.disabled_by]
    watched = tuple(map(_encode, dict.fromkeys(names)))
    if getattr(_switches, "args", None) == watched:
        return False
    _switches = partial(_getenv if len(watched) == 1 else _values, *watched)
    return True


def _values(*variables: Any) -> tuple[Any, ...]:
    return tuple(map(_getenv, variables))


def _find(
    what: str, call: Signature, backend: str | None, arrays: Sequence[Any]
) -> Callable[..., Any]:
    if sharding.library() is not None:
        sharding.check_op(call.op.name)
    for name, source in ((backend, ""), *_names_in_force()):
        if name is not None:
            choice = _named(what, name, source, call, arrays)
            function = _function(what, call, choice)
            takes = choice.spec.takes
            return function if takes is None else _guarded(what, call, choice, takes, source)
    return _found(what, call, arrays, {})


def _found(
    what: str, call: Signature, arrays: Sequence[Any], refused: Mapping[str, str]
) -> Callable[..., Any]:
    """Return the function of the best backend that is not among the refused ones.

    If that backend looks at the arrays of every call, the function passes those that it does not
    take to the next backend, which is selected when the first such call arrives.
    """
    choice = _automatic(what, call, arrays, refused)
    function, takes = _function(what, call, choice), choice.spec.takes
    if takes is None:
        return function
    others: list[Callable[..., Any]] = []

    def routed(*given: Any, **static: Any) -> Any:
        reason = takes(given[1] if what == "vjp" else given)
        if reason is None:
            return function(*given, **static)
        if not others:
            others.append(_found(what, call, arrays, {**refused, choice.spec.name: reason}))
        return others[0](*given, **static)

    return _specialising(routed, function, takes)


def _guarded(
    what: str, call: Signature, choice: _Choice, takes: Callable[..., str | None], source: str
) -> Callable[..., Any]:
    """Return the function of a backend chosen by name, which raises for arrays it does not take."""
    function = _function(what, call, choice)

    def guarded(*given: Any, **static: Any) -> Any:
        reason = takes(given[1] if what == "vjp" else given)
        if reason is not None:
            raise UnsupportedError(f"{call.op.name}: backend {choice.spec.name!r}{source} {reason}")
        return function(*given, **static)

    return _specialising(guarded, function, takes)


def _specialising(
    asking: Any, function: Callable[..., Any], takes: Callable[..., str | None]
) -> Callable[..., Any]:
    """Return a function that asks first, with its backend's ``specialise`` for what is taken."""
    if (specialise := getattr(function, "specialise", None)) is not None:

        def of_taken(arrays: Sequence[Any], static: Mapping[str, Any]) -> Any:
            return specialise(arrays, static) if takes(arrays) is None else None

        asking.specialise = of_taken
    return asking


def _function(what: str, call: Signature, choice: _Choice) -> Callable[..., Any]:
    function = getattr(backend_module(choice.spec), what, None)
    if function is None:
        raise UnsupportedError(
            f"{call.op.name}: backend {choice.spec.name!r} is broken, {choice.spec.module} has no "
            f"function {what!r}"
        )
    return converting_host_arrays(function, choice.spec, call) if choice.convert else function


def _named(what: str, name: Any, source: str, call: Signature, arrays: Sequence[Any]) -> _Choice:
    spec = _runnable(name, source)
    own = [any(is_a(array, type_name) for type_name in spec.array_types) for array in arrays]
    for argument, array, mine in zip(call.names, arrays, own, strict=True):
        if not mine and not is_a(array, HOST_TYPE):
            takes = " or ".join(dict.fromkeys((*spec.array_types, HOST_TYPE)))
            raise TypeError(
                f"{call.op.name}: {argument} is a {full_name(array)}; backend {name!r}{source} "
                f"needs {takes}: convert it with numpy.asarray(...)"
            )
    reason = _refused(spec, call)
    if reason:
        raise UnsupportedError(f"{call.op.name}: backend {name!r}{source} {reason}")
    reason = unproven(what, spec, call)
    if reason:
        said = unproven_text(spec, call, source, reason)
        raise BackendUnavailableError(f"{said} {advice(spec, call)}")
    return _Choice(spec, convert=not all(own))


def _refused(spec: BackendSpec, call: Signature) -> str | None:
    return spec.refuses(
        call.op.name, call.dtypes, call.n, call.mixers, call.fields, sharding.library()
    )


def _automatic(
    what: str, call: Signature, arrays: Sequence[Any], refused: Mapping[str, str]
) -> _Choice:
    """Choose among the backends of the arrays' own library; NumPy arrays may go to any library."""
    found = discover()
    specs = by_priority()
    libraries: dict[str, str] = {}
    for argument, array in zip(call.names, arrays, strict=True):
        libraries.setdefault(_library(call, argument, array, specs), argument)
    device = [library for library in libraries if library != HOST_TYPE]
    if len(device) > 1:
        first, second = device[:2]
        raise TypeError(
            f"{call.op.name}: {libraries[second]} is a {second} beside {libraries[first]}, a "
            f"{first}; needs arrays of one library: convert with numpy.asarray(...)"
        )
    library = device[0] if device else HOST_TYPE
    refusals: dict[str, str] = {**found.broken, **refused}
    candidates: list[BackendSpec] = []
    for spec in specs:
        if library in spec.array_types and spec.name not in refused:
            reason = missing_reason(spec) or _refused(spec, call)
            if not spec.automatic:
                refusals[spec.name] = "runs only when chosen by name"
            elif reason:
                refusals[spec.name] = reason
            else:
                candidates.append(spec)
    spec = _usable(what, found, call, candidates, refusals)
    if spec is None:
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise UnsupportedError(f"{call.op.name}: no backend takes this call on {library} ({why})")
    return _Choice(spec, convert=len(libraries) > len(device) > 0)


def _usable(
    what: str,
    found: Discovered,
    call: Signature,
    candidates: list[BackendSpec],
    refusals: dict[str, str],
) -> BackendSpec | None:
    """Return the preferred candidate that is importable and proven; warn of those that are not."""
    failed: dict[str, BackendUnavailableError] = {}
    rejected: dict[str, str] = {}
    while candidates:
        spec = _preferred(found, call, candidates)
        candidates = [other for other in candidates if other is not spec]
        try:
            backend_module(spec)
        except BackendUnavailableError as error:
            failed[spec.name] = error
            continue
        reason = unproven(what, spec, call)
        if reason is not None:
            rejected[spec.name] = reason
            continue
        for name, error in failed.items():
            found.missing[name] = error_text(error.__cause__ or error)
            warn(f"{error}; its calls go to {spec.name!r}")
        for name, why in rejected.items():
            warn_once(found.specs[name], call, why, instead=spec)
        return spec
    if failed:
        raise next(iter(failed.values())) from None
    refusals |= rejected
    return None


def _preferred(found: Discovered, call: Signature, candidates: list[BackendSpec]) -> BackendSpec:
    """Return the first candidate that a plugin names, else the first candidate."""
    manager = found.manager
    for one in reversed(manager.hook.mhc_select.get_hookimpls()):
        try:
            ask = hook_of(manager, "mhc_select", one.plugin)
            name = ask(op=call.op.name, candidates=tuple(candidates))
        except BaseException as error:  # of code that is not ours
            found.blame(one.plugin_name, f"its mhc_select raised {error_text(error)}")
            manager.unregister(one.plugin)
            continue
        if name is None:
            continue
        for spec in candidates:
            if spec.name == name:
                return spec
        known = ", ".join(spec.name for spec in candidates)
        raise UnknownBackendError(
            f"{call.op.name}: mhc_select of plugin {one.plugin_name!r} answered {name!r}; needs "
            f"one of {known}"
        )
    return candidates[0]


def _library(call: Signature, argument: str, array: Any, specs: Sequence[BackendSpec]) -> str:
    for spec in specs:
        for type_name in spec.array_types:
            if is_a(array, type_name):
                return type_name
    known = sorted({type_name for spec in specs for type_name in spec.array_types})
    broken = "".join(f" ({reason})" for reason in discover().broken.values())
    raise TypeError(
        f"{call.op.name}: {argument} is a {full_name(array)}, which no backend takes; needs one "
        f"of {', '.join(known)}: convert it with numpy.asarray(...){broken}"
    )
