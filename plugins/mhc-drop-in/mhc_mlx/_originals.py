"""The two distributions that this one cannot be installed beside: it takes their import names."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["refuse"]

ORIGINALS = ("mhc-mlx", "mlx-mhc")


def refuse() -> None:
    """Raise ImportError if an original is installed, since both put files into the same folders."""
    there = {name: number for name in ORIGINALS if (number := _version(name))}
    if there:
        found = " and ".join(f"{name} {number}" for name, number in there.items())
        raise ImportError(
            f"mhc-drop-in stands in for mhc-mlx and mlx-mhc, but {found} is installed beside it, "
            f"under the same import names. To use mhc-drop-in: pip uninstall {' '.join(there)}, "
            "then install mhc-drop-in again, from its checkout, with --force-reinstall --no-deps. "
            f"To use {found}: pip uninstall mhc-drop-in, then reinstall it."
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
