"""The functions that ``mhc conformance --peers`` calls, by the entry-point group ``mhc_core.peers``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mhc_peers.registry import named, peers
from mhc_peers.run import Plan, run
from mhc_peers.table import SUFFIXES, Table

__all__ = ["SUFFIXES", "checkouts", "names", "table"]


def names() -> list[str]:
    """Return what may be written after ``--peers``: projects with families, and every peer."""
    families = [name.split(":")[0] for name in peers()]
    return list(dict.fromkeys((*families, *peers())))


def checkouts() -> list[str]:
    """Return the names of the peers that are read from a checkout."""
    return [one.checkout for one in peers().values() if one.checkout]


def table(
    chosen: Sequence[str] = (),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    kinds: Sequence[str] = (),
    seed: int = 0,
    folders: Mapping[str, Path] | None = None,
    command: str = "",
    began: Callable[[str], None] = lambda what: None,
) -> Table:
    """Run the chosen peers, all if none is chosen; raise ValueError for an unknown name."""
    for name in chosen:
        if name not in names():
            named(name)  # raises, with the nearest name
    started = time.perf_counter()
    ran = list(run(Plan(chosen, ops, dtypes, kinds, seed, folders), began))
    return Table(command, seed, time.perf_counter() - started, ran)
