"""Discovery and dispatch: each kind of call is decided once, and looked up from then on.

Precedence: ``backend=``, then ``with use_backend(...)``, then ``MHC_BACKEND``, then the arrays' own
library, best backend first. An explicit choice never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from mhc_core._signature import Op, Signature, dtype_name, signature
from mhc_core.backend import API_VERSION, BackendSpec
from mhc_core.errors import BackendUnavailableError, UnknownBackendError, UnsupportedError

__all__ = ["Backend", "backends", "call", "call_vjp", "get_op", "module", "select", "use_backend"]

BUILTINS = "mhc_backends"
"""The package whose ``BUILTINS`` lists its plugins: all that the core knows of the layer above."""

ENTRY_POINTS = "mhc_core.backends"
"""The entry-point group of third-party plugins."""

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
    """A backend on this machine: its declaration and, where it cannot run, the reason.

    Attributes
    ----------
    name
        The name to write in ``MHC_BACKEND`` and ``backend=``.
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
        """Return whether the backend can run here."""
        return self.reason is None


@dataclass(frozen=True)
class Plugin:
    """A discovered plugin, whether it could be loaded or not.

    Attributes
    ----------
    name
        The name to write in ``MHC_DISABLE_PLUGINS``.
    module
        The module of its hooks, as an entry point spells it.
    distribution
        The distribution that contains it, with the version; empty where unknown.
    load
        Imports it.
    """

    name: str
    module: str
    distribution: str
    load: Callable[[], Any]

    @property
    def left_out(self) -> bool:
        """Return whether ``MHC_DISABLE_PLUGINS`` names it; it disables all plugins of a name."""
        names = {name.strip() for name in os.environ.get("MHC_DISABLE_PLUGINS", "").split(",")}
        return bool(names & {self.name, self.name.partition(" (")[0]})


@dataclass
class _Discovered:
    """The backends and plugins found at the first call of the process."""

    plugins: list[Plugin] = field(default_factory=list[Plugin])
    specs: dict[str, BackendSpec] = field(default_factory=dict[str, BackendSpec])
    broken: dict[str, str] = field(default_factory=dict[str, str])
    missing: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    manager: Any = None

    def blame(self, plugin: str, problem: str) -> None:
        """Record that a plugin is broken and warn once; the library keeps working."""
        self.broken[plugin] = f"plugin {plugin!r} is broken: {problem}"
        _warn(self.broken[plugin])


_discovered: _Discovered | None = None
_discovering: ContextVar[bool] = ContextVar("mhc_discovering", default=False)


def _discover() -> _Discovered:
    global _discovered
    if _discovered is None:
        if _discovering.get():
            raise RuntimeError("a plugin asks for backends while they are being discovered")
        token = _discovering.set(True)
        try:
            found = _Discovered()
            found.plugins = list(_builtin(found))
            found.plugins += _installed(found)
            _load(found)
        finally:
            _discovering.reset(token)
        _discovered = found
    return _discovered


def plugins() -> list[tuple[Plugin, str | None]]:
    """Return every plugin, each with the reason if it is not used."""
    found = _discover()
    left_out = {plugin.name for plugin in found.plugins if plugin.left_out}
    reasons = found.broken | dict.fromkeys(left_out, "left out by MHC_DISABLE_PLUGINS")
    return [(plugin, reasons.get(plugin.name)) for plugin in found.plugins]


def _builtin(found: _Discovered) -> Iterator[Plugin]:
    """Return the plugins that come with the core; they need no metadata to be found."""
    from mhc_core import __version__

    try:
        modules = tuple(importlib.import_module(BUILTINS).BUILTINS)
    except BaseException as error:
        found.blame(BUILTINS, _words(error))
        return
    for module in modules:
        name = module.rpartition(".")[2].replace("_", "-")
        load = functools.partial(importlib.import_module, module)
        yield Plugin(name, module, f"mhc-core {__version__}", load)


def _installed(found: _Discovered) -> Iterator[Plugin]:
    """Return the plugins of the installed distributions, except those that were found already.

    The metadata of an older mhc-core, which listed the built-ins too, may be left beside a newer
    one.
    """
    from importlib.metadata import entry_points

    try:
        points = list(entry_points(group=ENTRY_POINTS))
    except BaseException as error:  # of somebody's damaged metadata
        found.blame("entry points", _words(error))
        return
    names = {plugin.name for plugin in found.plugins}
    seen: set[str] = set()
    for point in points:
        if point.value in seen or point.value.startswith(f"{BUILTINS}."):
            continue
        name = f"{point.name} ({point.value})" if point.name in names else point.name
        names.add(name)
        seen.add(point.value)
        yield Plugin(name, point.value, _distribution(point), point.load)


def _distribution(point: Any) -> str:
    try:
        return f"{point.dist.name} {point.dist.version}" if point.dist else ""
    except Exception:  # its metadata may be damaged
        return ""


def _load(found: _Discovered) -> None:
    """Register each plugin and add its specs; a failure is recorded under the plugin's name."""
    import pluggy

    from mhc_core import hookspecs

    found.manager = manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for one in found.plugins:
        if one.left_out:
            continue
        try:
            plugin = one.load()
            manager.register(plugin, one.name)
            if not manager.get_hookcallers(plugin):
                raise TypeError("it implements neither mhc_backend_specs nor mhc_select")
            brought = _alone(manager, "mhc_backend_specs", plugin)()
            specs = _checked_specs(found.specs, [spec for specs in brought for spec in specs])
        except BaseException as error:  # anything may go wrong in code that is not ours
            found.blame(one.name, _words(error))
            if manager.has_plugin(one.name):
                manager.unregister(name=one.name)
            continue
        found.specs.update(specs)


def _alone(manager: Any, hook: str, plugin: Any) -> Callable[..., Any]:
    """Return a hook as one plugin implements it, so that errors can be blamed on that plugin."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)


def _words(error: BaseException) -> str:
    """Return the message of an error from a plugin's code; Ctrl-C is raised again.

    ``sys.exit`` counts as an error: a plugin must not end the program.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    try:
        said = str(error)
    except Exception:
        said = "(a message that cannot be read)"
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def _warn(message: str) -> None:
    """Warn through logging: the running program can neither fix this nor should it end for it."""
    import logging

    logging.getLogger("mhc_core").warning("%s", message)


def _checked_specs(known: Mapping[str, BackendSpec], brought: list[Any]) -> dict[str, BackendSpec]:
    """Return a plugin's specs by name; if one is wrong, none is accepted."""
    specs: dict[str, BackendSpec] = {}
    for spec in brought:
        if not isinstance(spec, BackendSpec):
            raise TypeError(f"mhc_backend_specs gave {spec!r}; needs mhc_core.backend.BackendSpec")
        if spec.api_version != API_VERSION:
            raise ValueError(
                f"backend {spec.name!r} was written for version {spec.api_version} of the backend "
                f"contract; this mhc-core has version {API_VERSION}"
            )
        there = known.get(spec.name) or specs.get(spec.name)
        if there:
            raise ValueError(f"backend {spec.name!r} is already there, from {there.module}")
        specs[spec.name] = spec
    return specs


def _missing(spec: BackendSpec) -> str | None:
    """Return why the backend cannot run here, or None; the backend is asked once per process."""
    found = _discover()
    if spec.name not in found.missing:
        try:
            reason: Any = spec.missing() or None
            if reason is not None and not isinstance(reason, str):
                reason = f"missing() gave {reason!r}; needs None or the reason"
        except BaseException as error:
            reason = f"missing() raised {_words(error)}"
            _warn(f"backend {spec.name!r} is broken: {reason}")
        found.missing[spec.name] = reason
    if spec.name == "mlx-metal" and os.environ.get("MHC_MLX_DISABLE_METAL") == "1":
        return "MHC_MLX_DISABLE_METAL=1 is set"
    return found.missing[spec.name]


def backends() -> dict[str, Backend]:
    """Return every backend by name, best first, each with the reason if it cannot run here.

    Broken plugins come last, under their entry point's name.

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
    return good | {name: backend for name, backend in bad.items() if name not in good}


@contextlib.contextmanager
def known(spec: BackendSpec) -> Generator[None]:
    """Add one backend for the length of a ``with`` block, such as a wrong one of the kit's."""
    specs = _discover().specs
    if spec.name in specs:
        raise ValueError(f"backend {spec.name!r} is already there, from {specs[spec.name].module}")
    specs[spec.name] = spec
    _SELECTED.clear()  # it may be the best for some of that
    try:
        yield
    finally:
        del specs[spec.name]
        _discover().missing.pop(spec.name, None)
        _SELECTED.clear()  # some of it may be of that backend


# ------------------------------------------------------------------------------------- proofs

_trusting: ContextVar[bool] = ContextVar("mhc_trusting", default=False)
_warned: set[tuple[Any, ...]] = set()


@contextlib.contextmanager
def trusting() -> Generator[None]:
    """Let every backend run without a proof: for code that measures backends, right or wrong."""
    token = _trusting.set(True)
    _SELECTED.clear()  # it may have what answers in the place of an unproven backend
    try:
        yield
    finally:
        _trusting.reset(token)
        _SELECTED.clear()


def _unproven(what: str, spec: BackendSpec, call: Signature) -> str | None:
    """Return why a backend's proof rejects this kind of call, or None."""
    if spec.proof is None or _trusting.get():
        return None
    trusted = os.environ.get("MHC_TRUST", "").split(",")
    if spec.name in (name.strip() for name in trusted):
        return None
    dtypes = call.dtypes if what == "vjp" else (*call.dtypes, *call.output_dtypes)
    try:
        return spec.proof.verdict(call.op.name, dtypes, call.kind[1]) or None
    except BaseException as error:  # of code that is not ours
        return f"its proof raised {_words(error)}"


def _in_words(spec: BackendSpec, call: Signature, source: str, reason: str) -> str:
    n = "" if call.kind[1] is None else f"n={call.kind[1]}, "
    return (
        f"{call.op.name}: backend {spec.name!r}{source} has not proven itself on this machine for "
        f"{n}{call.stream_dtype}: {reason.rstrip('.')}."
    )


def _what_to_do(spec: BackendSpec, call: Signature) -> str:
    return (
        "Please send this project the report that `mhc conformance "
        f"{spec.name} --op {call.op.name} --report report.html` writes; MHC_TRUST={spec.name} "
        "takes the backend in spite of this."
    )


def _warn_once(spec: BackendSpec, call: Signature, reason: str, instead: BackendSpec) -> None:
    """Warn once that another backend runs a kind of call, and why."""
    about = (spec.name, call.op.name, call.kind[1], call.stream_dtype, reason)
    if about not in _warned:
        _warned.add(about)
        text = f"{_in_words(spec, call, '', reason)} {instead.name!r} answers in its place."
        _warn(f"{text} {_what_to_do(spec, call)}")


# ------------------------------------------------------------------------------------ choice


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
    found = _discover()
    if not isinstance(name, str):
        raise TypeError(f"backend is {name!r}; needs a name such as 'numpy' or 'mlx-compiled'")
    if name not in found.specs:
        if name in found.broken:
            raise BackendUnavailableError(found.broken[name] + source)
        raise UnknownBackendError(
            f"no backend is named {name!r}{source}{_nearest(name, found.specs)}; "
            f"known are {', '.join(sorted(found.specs))}"
            + "".join(f" ({reason})" for reason in found.broken.values())
        )
    reason = _missing(found.specs[name])
    if reason:
        raise BackendUnavailableError(f"backend {name!r}{source} cannot run here: {reason}")
    return found.specs[name]


def _nearest(name: Any, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(str(name), known, n=1)
    return f"; the nearest is {near[0]!r}" if near else ""


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
    if backend is not None:
        choice = _named(what, backend, "", call, arrays)
    elif _chosen.get() is not None:
        choice = _named(what, _chosen.get(), " (from use_backend)", call, arrays)
    elif os.environ.get("MHC_BACKEND"):
        choice = _named(what, os.environ["MHC_BACKEND"], " (from MHC_BACKEND)", call, arrays)
    else:
        choice = _automatic(what, call, arrays)
    function = getattr(module(choice.spec), what, None)
    if function is None:
        raise UnsupportedError(
            f"{call.op.name}: backend {choice.spec.name!r} is broken, {choice.spec.module} has no "
            f"function {what!r}"
        )
    return _taking_host_arrays(function, choice.spec, call) if choice.convert else function


def _named(what: str, name: Any, source: str, call: Signature, arrays: Sequence[Any]) -> _Choice:
    spec = _runnable(name, source)
    own = [any(_is_a(array, type_name) for type_name in spec.array_types) for array in arrays]
    for argument, array, mine in zip(call.names, arrays, own, strict=True):
        if not mine and not _is_a(array, HOST_TYPE):
            takes = " or ".join(dict.fromkeys((*spec.array_types, HOST_TYPE)))
            raise TypeError(
                f"{call.op.name}: {argument} is a {_full_name(array)}; backend {name!r}{source} "
                f"needs {takes}: convert it with numpy.asarray(...)"
            )
    reason = spec.refuses(call.op.name, *call.kind)
    if reason:
        raise UnsupportedError(f"{call.op.name}: backend {name!r}{source} {reason}")
    reason = _unproven(what, spec, call)
    if reason:
        said = _in_words(spec, call, source, reason)
        raise BackendUnavailableError(f"{said} {_what_to_do(spec, call)}")
    return _Choice(spec, convert=not all(own))


def _automatic(what: str, call: Signature, arrays: Sequence[Any]) -> _Choice:
    """Choose among the backends of the arrays' own library; NumPy arrays may go to any library."""
    found = _discover()
    specs = sorted(found.specs.values(), key=lambda spec: -spec.priority)
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
    refusals: dict[str, str] = dict(found.broken)
    candidates: list[BackendSpec] = []
    for spec in specs:
        if library in spec.array_types:
            reason = _missing(spec) or spec.refuses(call.op.name, *call.kind)
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
    found: _Discovered,
    call: Signature,
    candidates: list[BackendSpec],
    refusals: dict[str, str],
) -> BackendSpec | None:
    """Return the preferred candidate that is importable and proven; warn of those that are not."""
    failed: dict[str, BackendUnavailableError] = {}
    unproven: dict[str, str] = {}
    while candidates:
        spec = _preferred(found, call, candidates)
        candidates = [other for other in candidates if other is not spec]
        try:
            module(spec)
        except BackendUnavailableError as error:
            failed[spec.name] = error
            continue
        reason = _unproven(what, spec, call)
        if reason is not None:
            unproven[spec.name] = reason
            continue
        for name, error in failed.items():
            found.missing[name] = _words(error.__cause__ or error)
            _warn(f"{error}; its calls go to {spec.name!r}")
        for name, why in unproven.items():
            _warn_once(found.specs[name], call, why, instead=spec)
        return spec
    if failed:
        raise next(iter(failed.values())) from None
    refusals |= unproven
    return None


def _preferred(found: _Discovered, call: Signature, candidates: list[BackendSpec]) -> BackendSpec:
    """Return the first candidate that a plugin names, else the first candidate."""
    manager = found.manager
    for one in reversed(manager.hook.mhc_select.get_hookimpls()):
        try:
            ask = _alone(manager, "mhc_select", one.plugin)
            name = ask(op=call.op.name, candidates=tuple(candidates))
        except BaseException as error:  # of code that is not ours
            found.blame(one.plugin_name, f"its mhc_select raised {_words(error)}")
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
            if _is_a(array, type_name):
                return type_name
    known = sorted({type_name for spec in specs for type_name in spec.array_types})
    broken = "".join(f" ({reason})" for reason in _discover().broken.values())
    raise TypeError(
        f"{call.op.name}: {argument} is a {_full_name(array)}, which no backend takes; needs one "
        f"of {', '.join(known)}: convert it with numpy.asarray(...){broken}"
    )


def _is_a(array: Any, dotted: str) -> bool:
    """Return whether ``array`` is of the named class; False if its library is not imported.

    Uses isinstance, the only test that JAX's tracers pass.
    """
    return isinstance(array, _class(dotted))


def _class(dotted: str) -> Any:
    """Return the class of that name, or () where its library is not imported."""
    owner, _, name = dotted.rpartition(".")
    return getattr(sys.modules.get(owner), name, ())


def _full_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def module(spec: BackendSpec) -> Any:
    """Import the backend's module with its functions."""
    try:
        return importlib.import_module(spec.module)
    except BaseException as error:  # of code that is not ours
        raise BackendUnavailableError(
            f"backend {spec.name!r} cannot run here: {_words(error)}"
        ) from error


def _taking_host_arrays(
    function: Callable[..., Any], spec: BackendSpec, call: Signature
) -> Callable[..., Any]:
    """Convert NumPy arrays to the backend's own, unless that would change their dtype."""
    from_host = module(spec).from_host

    def take_in(value: Any, names: Iterator[str]) -> Any:
        if isinstance(value, str):  # the op's name, ahead of a vjp's arrays
            return value
        if isinstance(value, tuple):
            return tuple(take_in(item, names) for item in value)  # pyright: ignore[reportUnknownVariableType]
        name = next(names)
        if not _is_a(value, HOST_TYPE):
            return value
        taken = from_host(value)
        if dtype_name(taken.dtype) != dtype_name(value.dtype):
            raise TypeError(
                f"{call.op.name}: {name} has dtype {value.dtype}; backend {spec.name!r} has none "
                f"here and would make it {dtype_name(taken.dtype)}: convert it first (nothing is "
                "narrowed silently)"
            )
        return taken

    def converting(*arrays: Any, **static: Any) -> Any:
        names = iter(call.names)
        return function(*[take_in(array, names) for array in arrays], **static)

    return converting


# -------------------------------------------------------------------------------------- calls

_OPS: dict[str, Op] = {}


def get_op(name: str) -> Op:
    """Return the declaration of an op; its module is imported on first use."""
    if name not in _OPS:
        from mhc_core import math

        _OPS[name] = math.load(name).OP
    return _OPS[name]


_PREPARED: set[type] = set()


def prepare(kind: type) -> None:
    """Import the backend of an array type when the first array of that type arrives.

    A compiler that cannot trace dispatch, such as PyTorch's, must be told to treat ``answer`` as
    opaque before it traces it, and only a module of the backend can tell it.
    """
    if kind in _PREPARED:
        return
    for spec in sorted(_discover().specs.values(), key=lambda spec: -spec.priority):
        own = any(issubclass(kind, _class(type_name)) for type_name in spec.array_types)
        if own and spec.automatic and not _missing(spec):
            with contextlib.suppress(BackendUnavailableError):  # the call itself will say why
                module(spec)
            break
    _PREPARED.add(kind)


# PyTorch's compiler runs a function with this mark, once, instead of tracing it
prepare._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def call(op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None) -> Any:
    """Check a call of an op and run it on its backend."""
    prepare(type(arrays[0]))  # pyright: ignore[reportUnknownArgumentType]
    return answer(op, arrays, static, backend)


def answer(op: str, arrays: Sequence[Any], static: Mapping[str, Any], backend: str | None) -> Any:
    """Check and dispatch one call, in a function that torch.compile can treat as opaque."""
    try:
        checked = signature(get_op, op, arrays, static)
        function = select(op, checked, backend, arrays)
    except TypeError:
        if (unwrapped := _unwrapped(arrays)) is None:
            raise
        return answer(op, unwrapped, static, backend)
    return function(*arrays, **checked.static)


def _unwrapped(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return arrays for objects with a backend's ``protocol``, or None if there are none.

    Called only for objects that no backend accepts as they are, so calls on arrays pay nothing for
    it.
    """
    methods = {spec.protocol for spec in _discover().specs.values() if spec.protocol}
    known = {name for spec in _discover().specs.values() for name in spec.array_types}

    def unwrap(value: Any) -> Any:
        if not any(_is_a(value, name) for name in known):
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
    return answer_vjp(getattr(op, "__name__", op), primals, cotangents, static, backend)


def answer_vjp(
    op: Any, primals: Any, cotangents: Any, static: Mapping[str, Any], backend: str | None
) -> tuple[Any, ...]:
    """Check and dispatch one vjp, in a function that torch.compile can treat as opaque."""
    name = _op_name(op)
    declared = get_op(name)
    primals = _primals(declared, primals)
    if len(declared.outputs) == 1 and not isinstance(cotangents, (tuple, list)):
        cotangents = (cotangents,)
    cotangents = _tuple(declared, "cotangents", cotangents)
    try:
        checked = signature(get_op, name, primals, _with_defaults(declared, static), cotangents)
        function = select("vjp", checked, backend, (*primals, *cotangents))
    except TypeError:
        if (unwrapped := _unwrapped((*primals, *cotangents))) is None:
            raise
        count = len(primals)
        return answer_vjp(op, unwrapped[:count], unwrapped[count:], static, backend)
    return function(name, primals, cotangents, **checked.static)


def _op_name(op: Any) -> str:
    from mhc_core.math import OPS

    name = getattr(op, "__name__", op)
    if name not in OPS:
        raise ValueError(f"vjp: op is {name!r}{_nearest(name, OPS)}; needs one of {', '.join(OPS)}")
    return name


def _primals(op: Op, primals: Any) -> tuple[Any, ...]:
    names = list(op.arrays)
    least = len(names) - (op.optional is not None)
    arrays = _tuple(op, "primals", primals)
    if not least <= len(arrays) <= len(names):
        raise ValueError(
            f"vjp of {op.name}: primals has length {len(arrays)}; needs {', '.join(names[:least])}"
            + (f" and perhaps {op.optional}" if op.optional else "")
        )
    return arrays


def _tuple(op: Op, name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        kind = type(value).__name__
        raise TypeError(f"vjp of {op.name}: {name} is a {kind}; needs a tuple of arrays")
    return tuple(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


@functools.cache
def _defaults(op: str) -> dict[str, Any]:
    """Return an op's static arguments and their defaults, read from its public function."""
    from mhc_core import _api

    parameters = inspect.signature(getattr(_api, op)).parameters
    return {name: parameters[name].default for name in get_op(op).static}


def _with_defaults(op: Op, static: Mapping[str, Any]) -> dict[str, Any]:
    known = _defaults(op.name)
    for name in static:
        if name in op.arrays:
            raise TypeError(f"vjp of {op.name}: {name} is an array; needs it among the primals")
        if name not in known:
            raise TypeError(
                f"vjp of {op.name}: {name} is no argument of {op.name}{_nearest(name, known)}; "
                f"known are {', '.join(known) or 'none'}"
            )
    filled = {**known, **static}
    for name, value in filled.items():
        if value is inspect.Parameter.empty:
            raise TypeError(f"vjp of {op.name}: {name} is missing; {op.name} needs it")
    return filled
