"""``mhc bench``: how fast the backends are, beside other people's code, in one process.

All sides get the same fresh random inputs, are checked to agree, and take turns; every number is a
median over the turns. GB/s are computed from a row's ideal traffic, declared in ``_rows``, and
shown beside the speed of a copy measured in the same run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhc_core.cli import _field, _files
from mhc_core.cli._baselines import BASELINES, Baseline
from mhc_core.text import one_line

if TYPE_CHECKING:
    from mhc_core.cli.bench._arrays import Sizes
    from mhc_core.cli.bench._rows import Row
    from mhc_core.cli.bench._sides import Side

__all__ = ["bench"]

LARGEST = 2**31 - 1  # size of an axis in MLX
MOST = 1_000_000  # turns, and calls in one

# their formulas are in _rows, which imports NumPy
ROWS = (
    "pre",
    "combine",
    "combine_pre",
    "aggregate",
    "sublayer",
    "sublayer fwd+bwd",
    "static_layer",
    "static_layer fwd+bwd",
    "gated_layer",
    "gated_layer fwd+bwd",
    "pre vjp",
    "combine vjp",
    "combine_pre vjp",
    "aggregate vjp",
    "static_layer vjp",
)
CHAINS = ("combine_pre chain", "static_layer chain")


class Mode(str, Enum):
    """The quantity that is measured."""

    latency = "latency"
    throughput = "throughput"
    train = "train"
    decode = "decode"
    dispatch = "dispatch"


DTYPES = {  # with the short names that people use
    "float32": ("float32", "fp32"),
    "float16": ("float16", "fp16", "half"),
    "bfloat16": ("bfloat16", "bf16"),
}
NOBODY = "none"
SEVERAL = "; several with commas (1,1024) or doubling (1..1024), or repeat the option."


def _dtypes(words: list[str] | None) -> list[str]:
    """Return the dtypes' names, checked while the options are parsed."""
    known = {alias: name for name, aliases in DTYPES.items() for alias in aliases}
    found: list[str] = []
    for word in ",".join(words or ["float32"]).split(","):
        if word.strip() not in known:
            raise typer.BadParameter(f"--dtype is {word!r}; needs some of {', '.join(known)}")
        found.append(known[word.strip()])
    return list(dict.fromkeys(found))


def bench(
    mode: Annotated[
        Mode,
        typer.Option(
            help="latency: a call that is waited for; throughput: calls issued without waiting; "
            "train: forward and backward, and the memory that they take; decode: one token "
            "through a chain of sublayers; dispatch: a call without array work."
        ),
    ] = Mode.latency,
    batches: Annotated[list[str] | None, typer.Option("--B", help=f"Batches{SEVERAL}")] = None,
    tokens: Annotated[list[str] | None, typer.Option("--T", help=f"Tokens{SEVERAL}")] = None,
    n: Annotated[list[str] | None, typer.Option("--n", help=f"Streams{SEVERAL}")] = None,
    channels: Annotated[list[str] | None, typer.Option("--C", help=f"Channels{SEVERAL}")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            "--dtype",
            "--dtypes",
            callback=_dtypes,
            help=f"Streams' dtypes: {', '.join(DTYPES)}.",
        ),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Only this row; may be repeated. {', '.join(ROWS)}, or any other op, or its name "
            f"and vjp; with --mode decode: {', '.join(CHAINS)}."
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Measure only this backend; may be repeated.")
    ] = None,
    vs: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Compare only with this: {', '.join(BASELINES)}, or {NOBODY}; may be repeated."
        ),
    ] = None,
    checkout: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: the checkout of a project of --vs that is not on PyPI."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=MOST, help="Turns of each side.")] = 9,
    calls: Annotated[
        int | None,
        typer.Option(
            "--calls",
            "--iters",
            min=1,
            max=MOST,
            help="Calls in a turn; enough for a steady time if left out.",
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(min=1, max=MOST, help="Calls before each turn.")] = 1,
    depth: Annotated[
        int, typer.Option(min=2, max=10_000, help="Sublayers of the chain in --mode decode.")
    ] = 86,
    check: Annotated[
        bool, typer.Option("--check", help="First compare the ops with the float64 oracle.")
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", "--out", help=f"Write {_files.JSON_HELP}.", metavar="[FILE]"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the GB/s of the rows and of the copy to this picture.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a record to send to this project; includes --check."),
    ] = None,
) -> None:
    """Time the backends beside other people's code, on fresh random inputs."""
    from mhc_core.errors import BackendError

    # MLX needs memory beside JAX, which would otherwise take most of a GPU's at once
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from mhc_core.cli.bench import _plot, _record, _run, _sides

    if plot and (reason := _plot.missing() or _files.no_picture(plot)):
        raise typer.BadParameter(reason)
    _files.check([("--json", json_file), ("--plot", plot), ("--report", report)])
    given = _sizes(batches, ["1"] if mode is Mode.decode else tokens, n, channels, dtype or [])
    try:
        names, good = _sides.runnable(backend), True
        if mode is Mode.dispatch:
            with _files.only_json(json_file):
                made, points = _run.dispatched(names, repeats), None
        else:
            ours = [_sides.our_side(name) for name in names]
            theirs, notes = _theirs(vs, {side.library.name for side in ours}, checkout or ())
            rows = _chosen_rows(mode, row, depth)
            _check_memory(rows, given, [*ours, *theirs])
            run = _run.Run(
                mode=mode.value,
                sides=[*ours, *theirs],
                rows=rows,
                sizes=given,
                repeats=repeats,
                calls=calls,
                warmup=warmup,
                check=check or report is not None,
                notes=notes,
            )
            try:
                with _files.only_json(json_file):
                    made, good, points = _run.measured(run)
            finally:
                for side in theirs:
                    if side.remote is not None:
                        side.remote.close()
    except BackendError as error:
        typer.echo(f"mhc bench: {one_line(error)}", err=True)
        raise typer.Exit(1) from error
    texts = [(file, _record.spelled(made)) for file in (json_file, report) if file]
    written = [_files.write(file, content) for file, content in texts]
    if plot and points:
        written.append(_files.write(plot, _plot.plot(plot, points)))
    if not good or not all(written):
        raise typer.Exit(1)


# ---- what was asked for -------------------------------------------------------------------------


def _numbers(option: str, words: Sequence[str] | None, default: int) -> list[int]:
    found: list[int] = []
    for word in ",".join(words or [str(default)]).split(","):
        first, dots, last = word.partition("..")
        ends = [_number(end) for end in ((first, last) if dots else (first,))]
        if not all(ends) or ends[0] > ends[-1]:
            raise typer.BadParameter(
                f"{option} is {word!r}; needs numbers from 1 on, to {LARGEST}, as 1,1024, or a "
                "sweep that doubles, as 1..1024"
            )
        number = ends[0]
        while number <= ends[-1]:
            found.append(number)
            number *= 2
    return list(dict.fromkeys(found))


def _number(word: str) -> int:
    """Return a number from 1 to LARGEST, or 0 if the word is none."""
    number = word.strip().lstrip("0")
    good = number.isascii() and number.isdigit() and len(number) <= len(str(LARGEST))
    return int(number) if good and int(number) <= LARGEST else 0


def _check_memory(rows: Sequence[Row], sizes: Sequence[Sizes], sides: Sequence[Side]) -> None:
    """Refuse sizes that cannot fit: the inputs are held on the host, and once in every library."""
    from mhc_core.machine import machine

    there = machine()["memory_gib"]
    libraries = {side.library.name for side in sides if not side.library.accelerator}
    for row, here in itertools.product(rows, sizes):
        needed = row.held(here) * (1 + len(libraries)) / 2**30
        if there and needed > there:
            raise typer.BadParameter(
                f"{row.name} at {here} needs {needed:.3g} GiB for its inputs; here are {there} GiB"
            )


def _sizes(
    batches: Sequence[str] | None,
    tokens: Sequence[str] | None,
    n: Sequence[str] | None,
    channels: Sequence[str] | None,
    dtypes: Sequence[str],
) -> list[Sizes]:
    from mhc_core.cli.bench._arrays import Sizes

    every = itertools.product(
        dtypes,
        _numbers("--n", n, 4),
        _numbers("--C", channels, 1024),
        _numbers("--B", batches, 1),
        _numbers("--T", tokens, 1024),
    )
    return [Sizes(B, T, n, C, dtype) for dtype, n, C, B, T in every]


def _chosen_rows(mode: Mode, chosen: Sequence[str] | None, depth: int) -> list[Row]:
    from mhc_core.cli.bench import _rows

    every = _rows.decode_rows(depth) if mode is Mode.decode else _rows.rows()
    usual = known = _rows.TRAIN if mode is Mode.train else tuple(every)
    if mode in (Mode.latency, Mode.throughput):
        every = {**_rows.rows_of_ops(), **every}
        known = (*usual, *(name for name in every if name not in usual))
    for name in chosen or ():
        if name not in known:
            raise typer.BadParameter(f"--row is {name!r}; needs one of {', '.join(known)}")
    return [every[name] for name in dict.fromkeys(chosen or usual)]


def _peers(chosen: Sequence[str] | None) -> dict[str, Baseline]:
    """Return the baselines of the plugin mhc-peers, where a name that is not here asks for them."""
    if set(chosen or ()) <= {*BASELINES, NOBODY}:
        return {}
    plugin = _field.plugin()
    if plugin is None:
        return {}
    timed: dict[str, tuple[Any, ...]] = plugin.timed()
    found = {name: Baseline(name, *about) for name, about in timed.items()}
    for name, (library, what, start) in plugin.remotes().items():
        found[name] = Baseline(name, library, "mhc-peers", what, dict, start=start)
    return found


def _theirs(
    chosen: Sequence[str] | None, libraries: set[str], checkouts: Sequence[str]
) -> tuple[list[Side], list[str]]:
    """Return the baselines that are installed, and a note on each of the others.

    By default only those of the libraries that are measured.
    """
    from mhc_core.cli.bench._sides import baseline_side
    from mhc_core.text import safe

    every = {**_peers(chosen), **BASELINES}
    folders = _field.folders_of(_field.needed(), checkouts) if checkouts else {}
    known = (*every, NOBODY)
    for name in chosen or ():
        if name not in known:
            raise typer.BadParameter(f"--vs is {name!r}; needs one of {', '.join(known)}")
    sides: list[Side] = []
    notes: list[str] = []
    for baseline in every.values():
        if baseline.name not in chosen if chosen else baseline.library not in libraries:
            continue
        if reason := baseline.missing():
            notes.append(f"{baseline.name}: not compared, {reason}")
            continue
        try:
            sides.append(baseline_side(baseline, folders))
        except Exception as error:  # two packages on PyPI bring a module named mlx_mhc
            reason = safe(f"{type(error).__name__}: {error}")
            notes.append(f"{baseline.name}: not compared, {reason}")
            continue
        notes.append(f"{baseline.name}: {baseline.what}")
        if baseline.uncompilable:
            notes.append(f"{baseline.name}: never compiled, {baseline.uncompilable}")
    return sides, notes
