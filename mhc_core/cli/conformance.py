"""``mhc conformance``: the matrix op x dtype x backend against the float64 oracle."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhc_core.cli import _field, _files, _screen
from mhc_core.cli._command import Stopped, stoppable

if TYPE_CHECKING:
    from mhc_conformance import Record, Skip

__all__ = ["conformance"]

MOST_JOBS = 256


def conformance(
    backends: Annotated[
        list[str] | None, typer.Argument(help="Backends to run; all that run here if left out.")
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Only this dtype.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only this check.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random inputs.")] = 0,
    full: Annotated[bool, typer.Option("--full", help="All cases in every dtype.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A first check: one case of every op, in half a minute."),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, max=MOST_JOBS, help="Processes; one per core if left out.")
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            help="Write a report to this file: .html, .json, or .xml or .junit for JUnit's."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Write {_files.JSON_HELP}.", metavar="[FILE]")
    ] = None,
    mutations: Annotated[
        bool,
        typer.Option("--mutations", help="Run the kit on wrong backends; show which check fails."),
    ] = False,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Run other projects' implementations, those named in place of backends or all; "
            "needs the plugin mhc-peers.",
        ),
    ] = False,
    checkout: Annotated[
        list[str] | None,
        typer.Option(help="With --peers, NAME=FOLDER: the checkout of a project not on PyPI."),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write golden cases for code that cannot import Python to this folder."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Check the answers in a folder of golden cases.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="With --export: the variant, DEEPSEEK_V4 if left out.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", min=1, max=64, help="With --export: streams; 4.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option("--C", min=1, help="With --export: channels; 64.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=0, help="With --export: tokens; 8.")
    ] = None,
) -> None:
    """Compare every backend's forwards and gradients with the float64 oracle."""
    modes = {
        "--mutations": mutations,
        "--peers": peers,
        "--export": export is not None,
        "--against": against is not None,
    }
    _check_options(
        [mode for mode, asked in modes.items() if asked],
        {
            "BACKENDS": backends,
            "--op": op,
            "--dtype": dtype,
            "--kind": kind,
            "--full": full,
            "--quick": quick,
            "--jobs": jobs,
            "--report": report,
            "--json": json_file,
            "--checkout": checkout,
            "--variant": variant,
            "--n": n,
            "--C": channels,
            "--tokens": tokens,
        },
    )
    if against is not None:
        _field.against(against)
        return
    if mutations:
        files = [*(report or ()), *([json_file] if json_file else [])]
        others = (backends, op, dtype, kind, map(str, files))
        _mutations(seed, unwanted=[word for words in others for word in words or ()])
        return
    if peers:
        chosen = (backends or (), op or (), dtype or (), kind or (), seed)
        _field.peers(*chosen, checkout or (), report or (), json_file)
        return
    if quick and full:
        raise typer.BadParameter("--quick came with --full; needs one of them")
    # each worker's JAX would otherwise take three quarters of a GPU's memory for itself
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import mhc_core
    from mhc_conformance import CHECKS
    from mhc_conformance.bugs import present
    from mhc_conformance.report import SUFFIXES, Report, in_order
    from mhc_conformance.run import Plan
    from mhc_core import math
    from mhc_core.backend import DTYPES

    for name, chosen, known in (
        ("--op", op, math.OPS),
        ("--dtype", dtype, DTYPES),
        ("--kind", kind, tuple(CHECKS)),
        ("--report", [file.suffix.lower() for file in report or ()], tuple(SUFFIXES)),
    ):
        for word in chosen or ():
            if word not in known:
                raise typer.BadParameter(f"{name} is {word!r}; needs one of {', '.join(known)}")
    if export is not None:
        chosen = (op or (), dtype or ("float32", "bfloat16"))
        sizes = (n or 4, channels or 64, 8 if tokens is None else tokens)
        _field.export(export, *chosen, variant or "DEEPSEEK_V4", *sizes, seed)
        return
    _files.check([*(("--report", file) for file in report or ()), ("--json", json_file)])
    named = backends or [b.name for b in mhc_core.backends().values() if b.available and _taken(b)]
    named = list(dict.fromkeys(named))
    everything = not (op or dtype or kind)
    try:
        with _files.only_json(json_file), present(*named):
            for name in named:
                with mhc_core.use_backend(name):  # raises with the reason, or the nearest name
                    pass
            chosen = (op or (), dtype or (), kind or ())
            plan = Plan(named, *chosen, seed, full, chain=everything, quick=quick)
            records, seconds = _run(plan, jobs)
            whole = Report(
                command=_command(plan),
                seed=seed,
                seconds=seconds,
                backends=named,
                records=in_order(records, named),
                skips=plan.skips(),
            )
            _show(whole)
            texts = [(file, whole.spelled(file.suffix)) for file in report or ()]
            texts += [(json_file, whole.spelled(".json"))] if json_file else []
    except mhc_core.BackendError as error:
        raise typer.BadParameter(str(error)) from None
    written = [_files.write(file, content) for file, content in texts]
    if not records or not all(written) or not all(record.passed for record in records):
        raise typer.Exit(1)


COMMON = ("BACKENDS", "--op", "--dtype", "--kind", "--report", "--json")
TAKES: Mapping[str, Collection[str]] = {
    "": (
        "BACKENDS",
        "--op",
        "--dtype",
        "--kind",
        "--full",
        "--quick",
        "--jobs",
        "--report",
        "--json",
    ),
    "--peers": ("BACKENDS", "--op", "--dtype", "--kind", "--report", "--json", "--checkout"),
    "--export": ("--op", "--dtype", "--variant", "--n", "--C", "--tokens"),
    "--against": (),
    # _mutations has a better message for what is named; one process runs it, whatever --jobs says
    "--mutations": (*COMMON, "--jobs"),
}
"""The options of each way to use the command, beside ``--seed``."""


def _check_options(modes: Sequence[str], options: Mapping[str, object]) -> None:
    """Raise for two ways at once, and for an option that the chosen one would not look at."""
    if len(modes) > 1:
        raise typer.BadParameter(f"{modes[0]} came with {modes[1]}; needs one of them")
    mode = modes[0] if modes else ""
    for name, value in options.items():
        if value is None or value is False or value == [] or name in TAKES[mode]:
            continue
        owners = [other for other in ("", "--peers", "--export") if name in TAKES[other]]
        needs = " or ".join(other or "the plain command" for other in owners)
        came = f"came with {mode}" if mode else "came alone"
        raise typer.BadParameter(f"{name} {came}; it goes with {needs}")


def _run(plan: Any, jobs: int | None) -> tuple[list[Record], float]:
    """Run the plan with a bar; Ctrl-C or SIGTERM ends it and prints how far it came."""
    from mhc_conformance.run import run

    started, total = time.perf_counter(), 0
    done: list[Record] = []
    try:
        with stoppable(), _screen.progress(44) as bars:
            bar = bars.add_task("loading the backends", total=None)
            total = plan.size
            bars.update(bar, total=total, description="starting processes")

            def began(what: str) -> None:
                bars.update(bar, description=what)

            for record in run(plan, jobs, began):
                done.append(record)
                bars.update(bar, advance=1)
    except Stopped:
        failed = [record for record in done if not record.passed]
        _failures(failed)
        said = f"stopped after {len(done)} of {total} checks, {len(failed)} failed"
        typer.echo(f"mhc conformance: {said}", err=True)
        raise
    return done, time.perf_counter() - started


def _command(plan: Any) -> str:
    """Return the command that runs the same again."""
    words = ["mhc", "conformance", *plan.backends]
    for name in ("op", "dtype", "kind"):
        for word in getattr(plan, f"{name}s"):
            words += [f"--{name}", word]
    words += ["--seed", str(plan.seed), *(["--full"] if plan.full else [])]
    words += ["--quick"] if plan.quick else []
    return shlex.join(words)


def _taken(backend: Any) -> bool:
    return backend.spec is not None and backend.spec.automatic


def _show(whole: Any) -> None:
    console = _screen.console()
    records: list[Record] = whole.records
    for name in whole.backends:
        _matrix(console, name, [r for r in records if r.backend == name and r.op != "chain"])
    _chain(console, [r for r in records if r.op == "chain"])
    _skipped(whole.skips)
    _failures([record for record in records if not record.passed])
    counts = ", ".join(f"{count} {what}" for what, count in whole.summary.items())
    console.print(f"{counts} (seed {whole.seed}, {whole.seconds:.0f} s)")


def _failures(records: Sequence[Record]) -> None:
    for record in records:
        _screen.say(f"FAILED {record.detail}", "red")


def _skipped(skips: list[Skip]) -> None:
    """Print how many checks were skipped, by the reasons that the backends declare."""
    from mhc_conformance.report import left_out

    for group in left_out(skips):
        what = f"skipped {group.skipped} x {group.checks} on {group.backend}: {group.reason}"
        _screen.say(what, "dim")


def _matrix(console: Any, name: str, records: list[Record]) -> None:
    """Print one backend's table of ops and dtypes, with the worst forward and gradient errors."""
    from rich.table import Table

    from mhc_core.backend import DTYPES

    if not records:
        return
    dtypes = [dtype for dtype in DTYPES if any(record.dtype == dtype for record in records)]
    title = f"{name}: worst error forward | gradient against the float64 oracle"
    table = Table(title=_screen.text(title), title_justify="left")
    table.add_column("op", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, no_wrap=True)
    table.add_column("others", no_wrap=True)
    for op in sorted({record.op for record in records}):
        mine = [record for record in records if record.op == op]
        cells = [_cell([r for r in mine if r.dtype == dtype]) for dtype in dtypes]
        table.add_row(op, *cells, _others(mine))
    console.print(table)


def _cell(records: list[Record]) -> str:
    from mhc_conformance.report import NUMERIC

    columns = ("forward", "gradient")
    parts = [_worst([r for r in records if NUMERIC.get(r.kind) == column]) for column in columns]
    return "|".join(parts)


def _worst(records: list[Record]) -> str:
    from mhc_conformance.report import worst

    one = worst(records)
    if one is None:
        return "    -"
    color = "green" if one.passed else "red"
    return f"[{color}]{one.error:5.0e}[/{color}]"


def _others(records: list[Record]) -> str:
    """Return which checks of structure failed or, if none did, how many passed."""
    from mhc_conformance.report import NUMERIC

    others = [record for record in records if record.kind not in NUMERIC]
    failed = [record.kind for record in others if not record.passed]
    if not others:
        return "-"
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
        table.add_row(_screen.text(name), mine["forward"], mine["gradient"])
    console.print(table)


def _mutations(seed: int, unwanted: list[str]) -> None:
    """Run the kit on a backend for each bug; print which check fails, and its message."""
    from mhc_conformance.bugs import BUGS, run_bug

    if unwanted:
        raise typer.BadParameter(
            f"--mutations came with {unwanted[0]!r}; it takes --seed alone, and "
            "mhc conformance bug:NAME runs the kit on one of its backends"
        )
    console, started = _screen.console(), time.perf_counter()
    found = [run_bug(bug, seed) for bug in BUGS.values()]
    titles = ("bugs that shipped in this field", "other bugs")
    for title, shipped in zip(titles, (True, False), strict=True):
        _table_of_bugs(console, title, [o for o in found if o.bug.shipped == shipped])
    missed = [outcome for outcome in found if outcome.problem]
    for outcome in missed:
        line = f"MISSED {outcome.bug.name}: {outcome.problem}"
        _screen.say(line, "red")
    untried = sum(bool(outcome.reason) for outcome in found)
    caught = len(found) - len(missed) - untried
    seconds = time.perf_counter() - started
    console.print(
        f"{caught} caught, {len(missed)} missed, {untried} skipped (seed {seed}, {seconds:.0f} s)"
    )
    if _made(console, seed) or missed:
        raise typer.Exit(1)


def _made(console: Any, seed: int) -> int:
    """Run the kit on the mutants made from the ops' declarations; return how many it missed."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from mhc_conformance.generated import MUTANTS, run_mutant

    started, others = time.perf_counter(), Console(stderr=True)
    every = track(list(MUTANTS.values()), "made mutants", console=others, transient=True)
    found = [run_mutant(mutant, seed) for mutant in every]
    title = "generated from the declarations: one argument replaced, in the forward or in the vjp"
    table = Table("op", "argument", title=title, title_justify="left")
    for column in ("made", "caught", "missed", "equivalent"):
        table.add_column(column, justify="right")
    rows: dict[tuple[str, str], list[Any]] = {}
    for one in found:
        rows.setdefault((one.mutant.op, one.mutant.argument), []).append(one)
    for (op, argument), some in rows.items():
        table.add_row(op, argument, *map(str, _counts(some)))
    console.print(table)
    for proof in dict.fromkeys(one.mutant.proof for one in found if one.mutant.proof):
        names = [one.mutant.name for one in found if one.mutant.proof == proof]
        line = f"{len(names)} are equivalent, such as {names[0]}: {proof}"
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    for one in found:
        if one.problem:
            line = f"MISSED {one.mutant.name}: {one.problem}"
            console.print(line, style="red", markup=False, soft_wrap=True)
    made, caught, missed, equivalent = _counts(found)
    seconds = time.perf_counter() - started
    console.print(
        f"{made} made, {caught} caught, {missed} missed, {equivalent} equivalent "
        f"(seed {seed}, {seconds:.0f} s)"
    )
    return missed


def _counts(found: list[Any]) -> tuple[int, int, int, int]:
    """Count mutants: generated, caught, missed, and those that no check can detect."""
    missed = sum(bool(one.problem) for one in found)
    cannot = sum(bool(one.mutant.proof) and not one.problem for one in found)
    return len(found), len(found) - missed - cannot, missed, cannot


def _table_of_bugs(console: Any, title: str, outcomes: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_lines=True, expand=True)
    table.add_column("bug", width=26, overflow="fold")
    table.add_column("fails", width=10)
    table.add_column("what the kit says", ratio=1, overflow="fold")
    for outcome in outcomes:
        bug = outcome.bug
        note = f" (outside the kit: {bug.note})" if bug.note else ""
        name = Text.assemble((bug.name, "bold"), f"\n{bug.what}{note}")
        fails = "\n".join(record.kind for record in outcome.failed)
        says = outcome.message or f"skipped: {outcome.reason}"
        table.add_row(name, fails, _screen.text(says))
    console.print(table)
