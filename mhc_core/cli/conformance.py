"""``mhc conformance``: the matrix op x dtype x backend against the float64 oracle."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mhc_conformance import Record

__all__ = ["conformance"]


def conformance(
    backends: Annotated[
        list[str] | None, typer.Argument(help="Backends to run; all that run here if left out.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only this check.")] = None,
    seed: Annotated[int, typer.Option(help="Of all inputs.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="All cases in every dtype.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes; one per core if left out.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one record per check to this file.")
    ] = None,
) -> None:
    """Hold every backend's forwards and gradients against the float64 oracle."""
    import mhc_core
    from mhc_conformance import CHECKS
    from mhc_conformance.run import Plan, run
    from mhc_core import math
    from mhc_core.backend import DTYPES

    for name, chosen, known in (
        ("--op", op, math.OPS),
        ("--dtype", dtype, DTYPES),
        ("--kind", kind, tuple(CHECKS)),
    ):
        for word in chosen or ():
            if word not in known:
                raise typer.BadParameter(f"{name} is {word!r}; needs one of {', '.join(known)}")
    named = backends or [b.name for b in mhc_core.backends().values() if b.available and _taken(b)]
    everything = not (op or dtype or kind)
    try:
        plan = Plan(named, op or (), dtype or (), kind or (), seed, full, chain=everything)
        total = plan.size
    except mhc_core.BackendError as error:
        raise typer.BadParameter(str(error)) from None
    started = time.perf_counter()
    records = _with_progress(run(plan, jobs), total)
    if json_file is not None:
        json_file.write_text(json.dumps([r.as_dict() for r in records], indent=1) + "\n")
    _report(named, records, time.perf_counter() - started)
    if not records or not all(record.passed for record in records):
        raise typer.Exit(1)


def _taken(backend: Any) -> bool:
    return backend.spec is not None and backend.spec.automatic


def _with_progress(records: Any, total: int) -> list[Record]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn())
    done: list[Record] = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=total)
        for record in records:
            done.append(record)
            progress.update(task, advance=1, description=f"{record.backend} {record.op}")
    return done


def _report(named: list[str], records: list[Record], seconds: float) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    for name in named:
        _matrix(console, name, [r for r in records if r.backend == name and r.op != "chain"])
    _chain(console, [r for r in records if r.op == "chain"])
    failed = [record for record in records if not record.passed]
    for record in failed:
        console.print(f"FAILED {record.detail}", style="red", markup=False, soft_wrap=True)
    console.print(
        f"{len(records) - len(failed)} passed, {len(failed)} failed"
        f" (seed {records[0].seed if records else 0}, {seconds:.0f} s)"
    )


def _matrix(console: Any, name: str, records: list[Record]) -> None:
    """One backend's ops and dtypes, each with the worst forward and gradient error."""
    from rich.table import Table

    if not records:
        return
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    title = f"{name}: worst error forward | gradient against the float64 oracle"
    table = Table(title=title, title_justify="left")
    table.add_column("op", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, no_wrap=True)
    table.add_column("others", no_wrap=True)
    for op in sorted({record.op for record in records}):
        mine = [record for record in records if record.op == op]
        cells = [_cell([r for r in mine if r.dtype == dtype]) for dtype in dtypes]
        table.add_row(op, *cells, _others(mine))
    console.print(table)


NUMERIC = {"forward": "forward", "gradient": "gradient", "grad": "gradient"}


def _cell(records: list[Record]) -> str:
    parts = [
        _worst([r for r in records if NUMERIC.get(r.kind) == kind])
        for kind in ("forward", "gradient")
    ]
    return "|".join(parts)


def _worst(records: list[Record]) -> str:
    if not records:
        return "    -"
    worst = max(records, key=lambda r: (not r.passed, r.error))
    color = "green" if worst.passed else "red"
    return f"[{color}]{worst.error:5.0e}[/{color}]"


def _others(records: list[Record]) -> str:
    """How many of the checks of structure hold, and which do not."""
    others = [record for record in records if record.kind not in NUMERIC]
    failed = [record.kind for record in others if not record.passed]
    return f"[red]{', '.join(failed)}[/red]" if failed else f"[green]{len(others)} hold[/green]"


def _chain(console: Any, records: list[Record]) -> None:
    from rich.table import Table

    if not records:
        return
    title = "text chain (embedding, expand, 4 sublayers, head): distance from NumPy in float64"
    table = Table("backend", "hidden states", "gradients")
    console.print(title)
    for name in dict.fromkeys(record.backend for record in records):
        mine = {r.kind: _worst([r]) for r in records if r.backend == name}
        table.add_row(name, mine["forward"], mine["gradient"])
    console.print(table)
