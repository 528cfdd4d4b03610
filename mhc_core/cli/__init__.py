"""The ``mhc`` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import typer

from mhc_core.cli.backends import backends
from mhc_core.cli.bench import bench
from mhc_core.cli.conformance import conformance

__all__ = ["app"]

app = typer.Typer(
    name="mhc",
    help="Manifold-Constrained Hyper-Connections: one API, many backends, proven to agree.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(backends)
app.command()(bench)
app.command()(conformance)
