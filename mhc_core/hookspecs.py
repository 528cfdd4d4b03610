"""The two hooks of mhc-core. Built-in backends and everyone else's use the same ones.

A backend's distribution points the entry-point group ``mhc_core.backends`` at a module that
implements ``mhc_backend_specs`` with :data:`hookimpl`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from mhc_core.backend import BackendSpec

__all__ = ["PROJECT", "hookimpl", "mhc_backend_specs", "mhc_select"]

PROJECT = "mhc_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mhc_backend_specs() -> Sequence[BackendSpec] | None:
    """Return the backends that this plugin brings; called once a process."""


@hookspec(firstresult=True)
def mhc_select(op: str, candidates: Sequence[BackendSpec]) -> str | None:
    """Return the name of the candidate to use for ``op``, or None to leave it to others.

    Called once per kind of call, and only where nobody chose a backend by name; and again, of the
    others, where that one does not prove itself on this machine.
    """
