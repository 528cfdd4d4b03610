"""The printed report of mhc-mlx."""

from __future__ import annotations

__all__ = ["diagnostics"]


def diagnostics() -> None:
    """Print versions, devices, backends, plugins, kernel launches and settings: ``mhc info``.

    Notes
    -----
    ``diagnostics`` of mhc-mlx 0.6.3.
    """
    from mhc_backends.overview import overview, sections

    for title, lines in sections(overview()).items():
        print("\n  ".join([title, *lines]))
