"""The command ``mhc-mlx-info``: mhc-mlx's report on what runs here."""

from __future__ import annotations

import os
import sys

from mhc_core.mlx import diagnostics

__all__ = ["diagnostics", "main"]


def main() -> None:
    """Print the report; end silently when the reader, such as ``head``, closes the pipe."""
    try:
        diagnostics()
        sys.stdout.flush()
    except BrokenPipeError:
        # what is still held would be written at exit and raise again (docs.python.org, SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
