"""Which backend answers a call: discovered once, decided once per kind of call, then a lookup.

Who decides: ``backend=``, then ``with use_backend(...)``, then ``MHC_BACKEND``, then the arrays'
own library, best backend first. An explicit choice never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from mhc_core._signature import Op, Signature, check_cotangents, dtype_name, signature
from mhc_core.backend import API_VERSION, BackendSpec
from mhc_core.errors import BackendUnavailableError, UnknownBackendError, UnsupportedError

__all__ = ["Backend", "backends", "call", "call_vjp", "get_op", "module", "select", "use_backend"]

ENTRY_POINTS = "mhc_core.backends"
HOST_TYPE = "numpy.ndarray"

_chosen: ContextVar[str | None] = ContextVar("mhc_backend", default=None)

# os.environ.get costs 0.7 us for an absent name, more than all the rest of a selection;
# the dict behind it answers in 0.04. Where there is none, os.environ itself serves.
_environ: Any = getattr(os.environ, "_data", os.environ)
_encode: Callable[[str], Any] = getattr(os.environ, "encodekey", str)
_MHC_BACKEND = _encode("MHC_BACKEND")
_DISABLE_METAL = _encode("MHC_MLX_DISABLE_METAL")


# ---------------------------------------------------------------------------------- discovery


@dataclass(frozen=True)
class Backend:
    """One backend as it stands here: its declaration and, where it cannot run, the reason.

    Attributes
    ----------
    name
        What people write in ``MHC_BACKEND`` and ``backend=``.
    spec
        Its declaration, or None for a plugin that could not be loaded.
    reason
        Why it cannot run here, or None.
    """

    name: str
    spec: BackendSpec | None
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether it can run here."""
        return self.reason is None


@dataclass
class _Discovered:
    """Everything found at the first call of the process."""

    specs: dict[str, BackendSpec] = field(default_factory=dict[str, BackendSpec])
    broken: dict[str, str] = field(default_factory=dict[str, str])
    missing: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    hook: Any = None


_discovered: _Discovered | None = None


def _discover() -> _Discovered:
    global _discovered
    if _discovered is None:
        from importlib.metadata import entry_points

        found = _Discovered()
        left_out = {name.strip() for name in os.environ.get("MHC_DISABLE_PLUGINS", "").split(",")}
        plugins = {
            point.name: point.load
            for point in entry_points(group=ENTRY_POINTS)
            if point.name not in left_out
        }
        _load(found, plugins)
        _discovered = found
    return _discovered


def _load(found: _Discovered, plugins: Mapping[str, Callable[[], Any]]) -> None:
    """Register each plugin and take in its specs; whatever fails is noted under its name."""
    import pluggy

    from mhc_core import hookspecs

    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    found.hook = manager.hook
    for name, load in plugins.items():
        try:
            plugin = load()
            manager.register(plugin, name)
            others = [p for p in manager.get_plugins() if p is not plugin]
            brought = manager.subset_hook_caller("mhc_backend_specs", others)()
            specs = [spec for specs in brought for spec in specs]
            problem = next(filter(None, (_problem(found, spec) for spec in specs)), None)
            if problem:
                raise TypeError(problem)
        except Exception as error:  # anything may go wrong in code that is not ours
            found.broken[name] = f"plugin {name!r} is broken: {type(error).__name__}: {error}"
            if manager.has_plugin(name):
                manager.unregister(name=name)
            continue
        found.specs.update({spec.name: spec for spec in specs})


def _problem(found: _Discovered, spec: Any) -> str | None:
    if not isinstance(spec, BackendSpec):
        return f"mhc_backend_specs gave {spec!r}; needs mhc_core.backend.BackendSpec"
    if spec.api_version != API_VERSION:
        return (
            f"backend {spec.name!r} was written for version {spec.api_version} of the backend "
            f"contract; this mhc-core has version {API_VERSION}"
        )
    if spec.name in found.specs:
        return f"backend {spec.name!r} is already there, from {found.specs[spec.name].module}"
    return None


def _missing(spec: BackendSpec) -> str | None:
    """Why the backend cannot run here; asked of it once a process."""
    found = _discover()
    if spec.name not in found.missing:
        try:
            found.missing[spec.name] = spec.missing()
        except Exception as error:
            found.missing[spec.name] = f"missing() raised {type(error).__name__}: {error}"
    if spec.name == "mlx-metal" and os.environ.get("MHC_MLX_DISABLE_METAL") == "1":
        return "MHC_MLX_DISABLE_METAL=1 is set"
    return found.missing[spec.name]


def backends() -> dict[str, Backend]:
    """Return every known backend by name, best first, and why some cannot run here.

    Broken plugins are listed too, under their entry point's name.

    Examples
    --------
    >>> import mhc_core as mhc
    >>> mhc.backends()["numpy"].available
    True
    """
    found = _discover()
    ordered = sorted(found.specs.values(), key=lambda spec: -spec.priority)
    good = {spec.name: Backend(spec.name, spec, _missing(spec)) for spec in ordered}
    bad = {name: Backend(name, None, reason) for name, reason in found.broken.items()}
    return {**bad, **good}


# ------------------------------------------------------------------------------------ choice


@contextlib.contextmanager
def use_backend(name: str) -> Generator[None]:
    """Answer every call inside the ``with`` block by one backend.

    It goes before ``MHC_BACKEND`` and after ``backend=``, is local to the thread or task, and may
    be nested.

    Parameters
    ----------
    name
        One of the names that :func:`backends` gives.

    Raises
    ------
    UnknownBackendError
        With the nearest name and all known ones.
    BackendUnavailableError
        With the reason why it cannot run here.

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


def _runnable(name: Any) -> BackendSpec:
    found = _discover()
    if not isinstance(name, str):
        raise TypeError(f"backend is {name!r}; needs a name such as 'numpy' or 'mlx-compiled'")
    if name not in found.specs:
        if name in found.broken:
            raise BackendUnavailableError(found.broken[name])
        near = get_close_matches(name, found.specs, n=1)
        raise UnknownBackendError(
            f"no backend is named {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Known: {', '.join(sorted(found.specs))}."
            + "".join(f" ({reason})" for reason in found.broken.values())
        )
    reason = _missing(found.specs[name])
    if reason:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    return found.specs[name]


class _Choice(NamedTuple):
    spec: BackendSpec
    convert: bool  # whether some arrays are NumPy's and the backend must take them in


_SELECTED: dict[Any, Callable[..., Any]] = {}


def select(
    what: str, call: Signature, backend: str | None, arrays: Sequence[Any]
) -> Callable[..., Any]:
    """Return the backend's function ``what`` (an op's name, or "vjp") for this kind of call."""
    key = (
        what,
        call.op.name,
        call.kind,
        backend,
        _chosen.get(),
        _environ.get(_MHC_BACKEND),
        _environ.get(_DISABLE_METAL),
        *map(type, arrays),
    )
    try:
        return _SELECTED[key]
    except (KeyError, TypeError):  # TypeError: backend is no name at all
        function = _find(what, call, backend, arrays)
    _SELECTED[key] = function
    return function


def _find(
    what: str, call: Signature, backend: str | None, arrays: Sequence[Any]
) -> Callable[..., Any]:
    name = backend if backend is not None else _chosen.get() or os.environ.get("MHC_BACKEND")
    choice = _named(name, call, arrays) if name else _automatic(call, arrays)
    backend_module = module(choice.spec)
    function = getattr(backend_module, what, None)
    if function is None:
        raise UnsupportedError(f"backend {choice.spec.name!r} has no {what}")
    return _taking_host_arrays(function, choice, backend_module) if choice.convert else function


def _named(name: str, call: Signature, arrays: Sequence[Any]) -> _Choice:
    spec = _runnable(name)
    own = [any(_is_a(array, type_name) for type_name in spec.array_types) for array in arrays]
    for index, (array, mine) in enumerate(zip(arrays, own, strict=True)):
        if not mine and not _is_a(array, HOST_TYPE):
            takes = " or ".join(dict.fromkeys((*spec.array_types, HOST_TYPE)))
            raise TypeError(
                f"{call.op.name}: {_argument(call, index)} is a {_full_name(array)}, but backend "
                f"{name!r} was chosen; needs {takes}: convert it with numpy.asarray(...)"
            )
    reason = spec.refuses(call.op.name, call.dtypes, call.kind[1])
    if reason:
        raise UnsupportedError(f"{call.op.name}: backend {name!r} {reason}")
    return _Choice(spec, convert=not all(own))


def _automatic(call: Signature, arrays: Sequence[Any]) -> _Choice:
    """Choose among the backends of the arrays' own library; NumPy arrays are host data."""
    found = _discover()
    specs = sorted(found.specs.values(), key=lambda spec: -spec.priority)
    libraries = {_library(call, i, array, specs): i for i, array in enumerate(arrays)}
    device = [library for library in libraries if library != HOST_TYPE]
    if len(device) > 1:
        first, second = device[:2]
        raise TypeError(
            f"{call.op.name}: {_argument(call, libraries[second])} is a {second} beside "
            f"{_argument(call, libraries[first])}, a {first}; needs arrays of one library: "
            "convert with numpy.asarray(...)"
        )
    library = device[0] if device else HOST_TYPE
    refusals: dict[str, str] = dict(found.broken)
    candidates: list[BackendSpec] = []
    for spec in specs:
        if library in spec.array_types and spec.automatic:
            reason = _missing(spec) or spec.refuses(call.op.name, call.dtypes, call.kind[1])
            if reason:
                refusals[spec.name] = reason
            else:
                candidates.append(spec)
    if not candidates:
        why = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
        raise UnsupportedError(f"{call.op.name}: no backend takes this call on {library} ({why})")
    return _Choice(_preferred(found, call, candidates), convert=len(libraries) > len(device) > 0)


def _preferred(found: _Discovered, call: Signature, candidates: list[BackendSpec]) -> BackendSpec:
    name = found.hook.mhc_select(op=call.op.name, candidates=tuple(candidates))
    if name is None:
        return candidates[0]
    for spec in candidates:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in candidates)
    raise UnknownBackendError(f"a plugin's mhc_select answered {name!r}; the candidates: {known}")


def _library(call: Signature, index: int, array: Any, specs: Sequence[BackendSpec]) -> str:
    for spec in specs:
        for type_name in spec.array_types:
            if _is_a(array, type_name):
                return type_name
    known = sorted({type_name for spec in specs for type_name in spec.array_types})
    broken = "".join(f" ({reason})" for reason in _discover().broken.values())
    raise TypeError(
        f"{call.op.name}: {_argument(call, index)} is a {_full_name(array)}; no backend takes it. "
        f"Known are {', '.join(known)}: convert with numpy.asarray(...){broken}"
    )


def _argument(call: Signature, index: int) -> str:
    names = list(call.op.arrays)[: len(call.dtypes)]
    outputs = [f"the cotangent of {name}" for name in call.op.outputs]
    return [*names, *outputs][index]


def _is_a(array: Any, dotted: str) -> bool:
    """Whether ``array`` is of the class of that name; a library not imported has no arrays.

    By isinstance, which is the only test that JAX's tracers pass.
    """
    owner, _, name = dotted.rpartition(".")
    cls = getattr(sys.modules.get(owner), name, None)
    return cls is not None and isinstance(array, cls)


def _full_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def module(spec: BackendSpec) -> Any:
    """Import the backend's module with its functions."""
    try:
        return importlib.import_module(spec.module)
    except ImportError as error:
        raise BackendUnavailableError(f"backend {spec.name!r} cannot run here: {error}") from error


def _taking_host_arrays(function: Callable[..., Any], choice: _Choice, owner: Any):
    own = choice.spec.array_types

    def take_in(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(take_in(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
        if not _is_a(value, HOST_TYPE) or HOST_TYPE in own:
            return value
        taken = owner.from_host(value)
        if dtype_name(taken.dtype) != dtype_name(value.dtype):
            raise TypeError(
                f"backend {choice.spec.name!r} has no {value.dtype} here (it would become "
                f"{dtype_name(taken.dtype)}): convert it first, nothing is narrowed silently"
            )
        return taken

    def converting(*arrays: Any, **static: Any) -> Any:
        return function(*map(take_in, arrays), **static)

    return converting


# -------------------------------------------------------------------------------------- calls

_OPS: dict[str, Op] = {}


def get_op(name: str) -> Op:
    """Return the declaration of an op; its module is imported at its first use."""
    if name not in _OPS:
        from mhc_core import math

        _OPS[name] = math.load(name).OP
    return _OPS[name]


def call(op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None) -> Any:
    """Check a call of an op and have its backend answer it."""
    checked = signature(get_op, op, arrays, static)
    return select(op, checked, backend, arrays)(*arrays, **checked.static)


def call_vjp(
    op: str | Callable[..., Any],
    primals: Sequence[Any],
    cotangents: Any,
    static: Mapping[str, Any],
    backend: str | None,
) -> tuple[Any, ...]:
    """Check a call of an op's vjp and have its backend answer it."""
    name = _op_name(op)
    declared = get_op(name)
    primals = _sequence(declared, primals)
    if len(declared.outputs) == 1 and not isinstance(cotangents, (tuple, list)):
        cotangents = (cotangents,)
    checked = signature(get_op, name, primals, _with_defaults(name, static))
    check_cotangents(checked, cotangents)
    function = select("vjp", checked, backend, (*primals, *cotangents))
    return function(name, tuple(primals), tuple(cotangents), **checked.static)


def _op_name(op: Any) -> str:
    from mhc_core.math import OPS

    name = getattr(op, "__name__", op)
    if name not in OPS:
        near = get_close_matches(str(name), OPS, n=1)
        raise ValueError(
            f"vjp: op is {name!r}; needs one of {', '.join(OPS)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return name


def _sequence(op: Op, primals: Any) -> Sequence[Any]:
    names = list(op.arrays)
    least = len(names) - (op.optional is not None)
    if not isinstance(primals, (tuple, list)):
        raise TypeError(f"vjp of {op.name}: primals is a {_full_name(primals)}; needs a tuple")
    if not least <= len(primals) <= len(names):  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(
            f"vjp of {op.name}: primals has {len(primals)} arrays; needs "  # pyright: ignore[reportUnknownArgumentType]
            f"{', '.join(names[:least])}" + (f" and perhaps {op.optional}" if op.optional else "")
        )
    return primals  # pyright: ignore[reportUnknownVariableType]


@functools.cache
def _defaults(op: str) -> dict[str, Any]:
    """Read an op's static arguments and their defaults off its public function."""
    from mhc_core import _api

    parameters = inspect.signature(getattr(_api, op)).parameters
    return {name: parameters[name].default for name in get_op(op).static}


def _with_defaults(op: str, static: Mapping[str, Any]) -> dict[str, Any]:
    known = _defaults(op)
    unknown = [name for name in static if name not in known]
    if unknown:
        raise TypeError(
            f"vjp of {op}: {unknown[0]} is no argument of {op}; known are {', '.join(known) or 'none'}"
        )
    filled = {**known, **static}
    for name, value in filled.items():
        if value is inspect.Parameter.empty:
            raise TypeError(f"vjp of {op}: {name} is missing; {op} needs it")
    return filled
