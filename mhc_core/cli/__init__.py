"""The ``mhc`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import typer

from mhc_core.cli import backends, bench, conformance, demo, info

__all__ = ["app"]

app = typer.Typer(
    name="mhc",
    help="Manifold-Constrained Hyper-Connections: one API, many backends, proven to agree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(backends.backends)
app.command()(bench.bench)
app.command()(conformance.conformance)
app.command()(demo.demo)
app.command()(info.info)
