"""Discovery: the plugins and backends of this process, found once, and why some cannot run.

Built-in backends are plugins like third-party ones. A plugin that cannot be loaded is reported, and
breaks nothing.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mhc_core._messages import error_text, nearest, warn
from mhc_core.backend import API_VERSION, BackendSpec
from mhc_core.errors import BackendUnavailableError
from mhc_core.mixer import BUILTINS as BUILTIN_MIXERS
from mhc_core.mixer import Mixer

__all__ = [
    "Backend",
    "Discovered",
    "Plugin",
    "backend_module",
    "backends",
    "by_priority",
    "discover",
    "hook_of",
    "missing_reason",
    "mixer_named",
    "mixers",
    "plugins",
]

BUILTINS = "mhc_backends"
"""The package whose ``BUILTINS`` lists its plugins: all that the core knows of the layer above."""

ENTRY_POINTS = "mhc_core.backends"
"""The entry-point group of third-party plugins."""


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
class Discovered:
    """The backends and plugins found at the first call of the process."""

    plugins: list[Plugin] = field(default_factory=list[Plugin])
    specs: dict[str, BackendSpec] = field(default_factory=dict[str, BackendSpec])
    mixers: dict[str, Mixer] = field(default_factory=dict[str, Mixer])
    broken: dict[str, str] = field(default_factory=dict[str, str])
    missing: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    manager: Any = None

    def blame(self, plugin: str, problem: str) -> None:
        """Record that a plugin is broken and warn once; the library keeps working."""
        self.broken[plugin] = f"plugin {plugin!r} is broken: {problem}"
        warn(self.broken[plugin])


_discovered: Discovered | None = None
_discovering: ContextVar[bool] = ContextVar("mhc_discovering", default=False)


def discover() -> Discovered:
    """Return the plugins and backends, found at the first call of the process."""
    global _discovered
    if _discovered is None:
        if _discovering.get():
            raise RuntimeError("a plugin asks for backends while they are being discovered")
        token = _discovering.set(True)
        try:
            found = Discovered()
            found.plugins = list(_builtin(found))
            found.plugins += _installed(found)
            _load(found)
        finally:
            _discovering.reset(token)
        _discovered = found
    return _discovered


def plugins() -> list[tuple[Plugin, str | None]]:
    """Return every plugin, each with the reason if it is not used."""
    found = discover()
    left_out = {plugin.name for plugin in found.plugins if plugin.left_out}
    reasons = found.broken | dict.fromkeys(left_out, "left out by MHC_DISABLE_PLUGINS")
    return [(plugin, reasons.get(plugin.name)) for plugin in found.plugins]


def _builtin(found: Discovered) -> Iterator[Plugin]:
    """Return the plugins that come with the core; they need no metadata to be found."""
    try:
        package = importlib.import_module(BUILTINS)
        modules, distribution = tuple(package.BUILTINS), str(package.DISTRIBUTION)
    except BaseException as error:
        found.blame(BUILTINS, error_text(error))
        return
    for module in modules:
        name = module.rpartition(".")[2].replace("_", "-")
        load = functools.partial(importlib.import_module, module)
        yield Plugin(name, module, distribution, load)


def _installed(found: Discovered) -> Iterator[Plugin]:
    """Return the plugins of the installed distributions, except those that were found already.

    The metadata of an older mhc-core, which listed the built-ins too, may be left beside a newer
    one.
    """
    from importlib.metadata import entry_points

    try:
        points = list(entry_points(group=ENTRY_POINTS))
    except BaseException as error:  # of somebody's damaged metadata
        found.blame("entry points", error_text(error))
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


def _load(found: Discovered) -> None:
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
                raise TypeError("it implements none of mhc_backend_specs, mhc_mixers, mhc_select")
            brought = hook_of(manager, "mhc_backend_specs", plugin)()
            specs = _checked_specs(found.specs, [spec for specs in brought for spec in specs])
            brought = hook_of(manager, "mhc_mixers", plugin)()
            own = _checked_mixers(found.mixers, [mixer for mixers in brought for mixer in mixers])
        except BaseException as error:  # anything may go wrong in code that is not ours
            found.blame(one.name, error_text(error))
            if manager.has_plugin(one.name):
                manager.unregister(name=one.name)
            continue
        found.specs.update(specs)
        found.mixers.update(own)


def hook_of(manager: Any, hook: str, plugin: Any) -> Callable[..., Any]:
    """Return a hook as one plugin implements it, so that errors can be blamed on that plugin."""
    others = [other for other in manager.get_plugins() if other is not plugin]
    return manager.subset_hook_caller(hook, others)


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


def _checked_mixers(known: Mapping[str, Mixer], brought: list[Any]) -> dict[str, Mixer]:
    """Return a plugin's mixers by name; if one is wrong, none is accepted."""
    mixers: dict[str, Mixer] = {}
    for mixer in brought:
        if not isinstance(mixer, Mixer):
            raise TypeError(f"mhc_mixers gave {mixer!r}; needs mhc_core.mixer.Mixer")
        if mixer.name in (*BUILTIN_MIXERS, *known, *mixers):
            raise ValueError(f"mixer {mixer.name!r} is already there")
        mixers[mixer.name] = mixer
    return mixers


def mixer_named(name: str) -> Mixer:
    """Return a mixer; its module is imported, or the plugins are asked, on first use.

    Raises
    ------
    ValueError
        For an unknown name; the message has the nearest name and all known ones.
    """
    if name in BUILTIN_MIXERS:
        return importlib.import_module(BUILTIN_MIXERS[name]).MIXER
    found = discover()
    if name not in found.mixers:
        known = (*BUILTIN_MIXERS, *found.mixers)
        raise ValueError(
            f"no mixer is named {name!r}{nearest(name, known)}; known are {', '.join(known)}"
            + "".join(f" ({reason})" for reason in found.broken.values())
        )
    return found.mixers[name]


def mixers() -> dict[str, Mixer]:
    """Return every mixer by name, those of mhc-core first.

    Examples
    --------
    >>> import mhc_core as mhc
    >>> mhc.mixers()["identity"].logits(4)
    0
    """
    return {name: mixer_named(name) for name in BUILTIN_MIXERS} | discover().mixers


def missing_reason(spec: BackendSpec) -> str | None:
    """Return why the backend cannot run here, or None; the backend is asked once per process."""
    found = discover()
    if spec.name not in found.missing:
        try:
            reason: Any = spec.missing() or None
            if reason is not None and not isinstance(reason, str):
                reason = f"missing() gave {reason!r}; needs None or the reason"
        except BaseException as error:
            reason = f"missing() raised {error_text(error)}"
            warn(f"backend {spec.name!r} is broken: {reason}")
        found.missing[spec.name] = reason
    if spec.disabled_by and os.environ.get(spec.disabled_by) == "1":
        return f"{spec.disabled_by}=1 is set"
    return found.missing[spec.name]


def by_priority() -> list[BackendSpec]:
    """Return every spec, best first."""
    return sorted(discover().specs.values(), key=lambda spec: -spec.priority)


def backends() -> dict[str, Backend]:
    """Return every backend by name, best first, each with the reason if it cannot run here.

    Broken plugins come last, under their entry point's name.

    Examples
    --------
    >>> import mhc_core as mhc
    >>> mhc.backends()["numpy"].available
    True
    """
    found = discover()
    good = {spec.name: Backend(spec.name, spec, missing_reason(spec)) for spec in by_priority()}
    bad = {name: Backend(name, None, reason) for name, reason in found.broken.items()}
    return good | {name: backend for name, backend in bad.items() if name not in good}


def backend_module(spec: BackendSpec) -> Any:
    """Import the backend's module with its functions."""
    try:
        return importlib.import_module(spec.module)
    except BaseException as error:  # of code that is not ours
        raise BackendUnavailableError(
            f"backend {spec.name!r} cannot run here: {error_text(error)}"
        ) from error
