"""``mhc backends``: what can run here, and why the rest cannot."""

from __future__ import annotations

__all__ = ["backends"]


def backends() -> None:
    """List every backend, best first, and the reason where one cannot run here."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import mhc_core

    table = Table()
    table.add_column("backend", no_wrap=True, overflow="fold")
    for heading in ("takes", "streams", "here"):
        table.add_column(heading, overflow="fold")
    for backend in mhc_core.backends().values():
        spec = backend.spec
        takes = ", ".join(spec.array_types) if spec else ""
        dtypes = ", ".join(spec.dtypes) if spec else ""
        table.add_row(backend.name, takes, dtypes, escape(backend.reason or "yes"))
    Console().print(table)
