"""The hooks of mhc-core. Built-in and third-party backends use the same ones.

A distribution points the entry-point group ``mhc_core.backends`` at a module that implements
``mhc_backend_specs``, ``mhc_mixers`` or both with :data:`hookimpl`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from mhc_core.backend import BackendSpec
from mhc_core.mixer import Mixer

__all__ = ["PROJECT", "hookimpl", "mhc_backend_specs", "mhc_mixers", "mhc_select"]

PROJECT = "mhc_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mhc_backend_specs() -> Sequence[BackendSpec] | None:
    """Return the backends of this plugin; called once per process."""


@hookspec
def mhc_mixers() -> Sequence[Mixer] | None:
    """Return the mixers of this plugin; called once per process."""


@hookspec(firstresult=True)
def mhc_select(op: str, candidates: Sequence[BackendSpec]) -> str | None:
    """Return the name of the candidate to use for ``op``, or None to leave it to others.

    Called once per kind of call, and only if no backend was chosen by name. If the named candidate
    fails its proof on this machine, the hook is called again with the others.
    """
