"""The errors in choosing a backend. Bad arguments raise plain ValueError or TypeError."""

from __future__ import annotations

__all__ = ["BackendError", "BackendUnavailableError", "UnknownBackendError", "UnsupportedError"]


class BackendError(RuntimeError):
    """A requested backend cannot be used."""


class UnknownBackendError(BackendError, ValueError):
    """No backend has this name. The message gives the nearest and all known names."""


class BackendUnavailableError(BackendError):
    """The backend exists, but cannot run here. The message says why."""


class UnsupportedError(BackendError, ValueError):
    """No candidate accepts this op, dtype or number of streams. The message gives each reason."""
