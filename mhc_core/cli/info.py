"""``mhc info``: what is installed, what runs, and why the rest does not; safe to publish."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mhc_core.cli import _files

__all__ = ["info"]

LARGEST = 2**31 - 1  # size of an axis in MLX


class Dtype(str, Enum):
    """The dtype of the streams."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def info(
    tokens: Annotated[
        int, typer.Option("--T", min=1, max=LARGEST, help="Tokens of a launch.")
    ] = 4096,
    n: Annotated[int, typer.Option("--n", min=1, max=LARGEST, help="Streams.")] = 4,
    channels: Annotated[int, typer.Option("--C", min=1, max=LARGEST, help="Channels.")] = 4096,
    dtype: Annotated[Dtype, typer.Option(help="The streams' dtype.")] = Dtype.bfloat16,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Write {_files.JSON_HELP}.", metavar="[FILE]")
    ] = None,
) -> None:
    """Show versions, devices, backends, plugins, kernel launches and settings.

    It prints no path of a home folder, no user's or host's name, and no settings but this
    project's and MLX's.
    """
    from mhc_backends.overview import overview, sections

    _files.check([("--json", json_file)])
    found = overview(tokens, n, channels, dtype.value)
    if json_file != _files.STDOUT:
        for title, lines in sections(found).items():
            typer.secho(title, bold=True)
            for line in lines:
                typer.echo(f"  {line}")
    if json_file and not _files.write(json_file, json.dumps(found, indent=2) + "\n"):
        raise typer.Exit(1)
