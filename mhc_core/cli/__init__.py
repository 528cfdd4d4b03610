"""The ``mhc`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mhc_core.cli import backends, bench, conformance, demo, info, plan
from mhc_core.cli._command import Command, Group

__all__ = ["app"]

app = typer.Typer(
    name="mhc",
    cls=Group,
    help="Manifold-Constrained Hyper-Connections: one API, many backends, proven to agree.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for subcommand in (
    backends.backends,
    bench.bench,
    conformance.conformance,
    demo.demo,
    info.info,
    plan.plan,
):
    app.command(cls=Command)(subcommand)


def _version(wanted: bool) -> None:
    from mhc_core import __version__

    if wanted:
        typer.echo(f"mhc {__version__}")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit(2)
