"""``mhc backends``: what can run here, and why the rest cannot."""

from __future__ import annotations

import typer

from mhc_core.cli import _screen

__all__ = ["backends"]


def backends() -> None:
    """List every backend, best first, and the reason where one cannot run here."""
    from rich.console import Console
    from rich.table import Table

    import mhc_core

    table = Table()
    table.add_column("backend", no_wrap=True, overflow="fold")
    for heading in ("takes", "streams", "here"):
        table.add_column(heading, overflow="fold")
    known = mhc_core.backends().values()
    for backend in known:
        spec = backend.spec
        takes = ", ".join(spec.array_types) if spec else ""
        dtypes = ", ".join(spec.dtypes) if spec else ""
        cells = (backend.name, takes, dtypes, backend.reason or "yes")
        table.add_row(*map(_screen.text, cells))
    Console().print(table)
    if not any(backend.available for backend in known):
        typer.echo("mhc backends: none can run here", err=True)
        raise typer.Exit(1)
