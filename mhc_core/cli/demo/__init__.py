"""``mhc demo``: one small transformer, its layers connected in four ways, and a report."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mhc_core import machine
from mhc_core.cli import _files, _screen
from mhc_core.cli.demo._settings import STREAMS, VARIANTS, Settings
from mhc_core.text import one_line, safe

if TYPE_CHECKING:
    from mhc_core import Backend
    from mhc_core.cli.demo._checkpoint import Checkpoint
    from mhc_core.cli.demo._train import Trained

__all__ = ["demo"]

MOST = 1_000_000_000  # of any size
STOPPED = 130  # the exit code of a command that Ctrl-C ended, in shells
ALL = ",".join(VARIANTS)
STANDARD_LIBRARY = "the sources of Python's standard library"


def demo(
    text: Annotated[
        Path | None, typer.Option(help="The text; Python's standard library if left out.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The backend; the fastest that trains here if left out.")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="The variants to train, separated by commas.")
    ] = ALL,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Steps of each variant.")] = 200,
    depth: Annotated[
        int,
        typer.Option(min=2, max=MOST, help="Layers, attention and MLP in turn; an even number."),
    ] = 12,
    width: Annotated[
        int, typer.Option(min=1, max=MOST, help="Channels; a multiple of --heads.")
    ] = 64,
    heads: Annotated[int, typer.Option(min=1, max=MOST, help="Heads of attention.")] = 4,
    context: Annotated[int, typer.Option(min=2, max=MOST, help="Bytes of a sequence.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Sequences of a step.")] = 4,
    rate: Annotated[float, typer.Option(help="The largest learning rate.")] = 0.006,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same numbers.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="A folder for the report and the checkpoints.")] = Path(
        "mhc-demo"
    ),
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 20,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the checkpoints in --out.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start over where --out has checkpoints.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture to this file too.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help=f"Write {_files.JSON_HELP}.", metavar="[FILE]")
    ] = None,
) -> None:
    """Train one small transformer four ways on this machine, and write a report.

    Ctrl-C ends it after the current step; the same command with --resume continues, and its numbers
    are those of an uninterrupted run.
    """
    from mhc_core.cli.demo import _data, _plot, _report, _results
    from mhc_core.cli.demo._checkpoint import CheckpointError
    from mhc_core.errors import BackendError

    for reason in (
        _report.missing(),
        (_plot.missing() or _files.no_picture(plot)) if plot else None,
    ):
        if reason:
            raise typer.BadParameter(reason)
    if resume and overwrite:
        raise typer.BadParameter(
            "--resume continues and --overwrite starts over; needs one of them"
        )
    names = _chosen(variants)
    _check_sizes(depth, width, heads, rate)
    _check_memory(depth, width, heads, context, batch)
    try:
        content = _data.read(text, context)
        name, library = _backend(backend)
        settings = Settings(
            depth=depth,
            width=width,
            heads=heads,
            context=context,
            batch=batch,
            steps=steps,
            rate=rate,
            seed=seed,
            text=_data.digest(content),
            backend=name,
        )
        page = _check_places(out, plot, json_file)
        before = _checkpoints(out, names, settings, resume, overwrite)
    except (BackendError, _data.TextError, CheckpointError) as error:
        raise typer.BadParameter(str(error)) from None
    try:
        trained = _train_all(settings, content, library, out, save_every, before)
    except OSError as error:
        said = f"mhc demo: stopped, {out} cannot be written: {error.strerror or error}"
        typer.echo(one_line(said), err=True)
        raise typer.Exit(1) from None
    told = _results.results(settings, text.name if text else STANDARD_LIBRARY, _command(), trained)
    with _files.only_json(json_file):
        _show(told)
        written = [_files.write(page, _report.page(told))]
        if written[0]:
            _screen.say(f"The report: {page}")
    if json_file:
        written.append(_files.write(json_file, json.dumps(told) + "\n"))
    if plot:
        written.append(_files.write(plot, _plot.plot(plot, told)))
    if not all(written):
        raise typer.Exit(1)


# ---- what was asked for -------------------------------------------------------------------------


def _chosen(variants: str) -> list[str]:
    names = [word.strip() for word in variants.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise typer.BadParameter(
                f"--variants has {name!r}; needs some of {', '.join(VARIANTS)}"
            )
    return list(dict.fromkeys(names))


def _check_sizes(depth: int, width: int, heads: int, rate: float) -> None:
    if depth % 2:
        raise typer.BadParameter(f"--depth is {depth}; needs an even number, as 12 or 64")
    if width % heads:
        raise typer.BadParameter(f"--width is {width}; needs a multiple of --heads, here {heads}")
    if not 0 < rate < math.inf:
        raise typer.BadParameter(f"--rate is {rate}; needs a number above 0, as 0.006")


def _check_memory(depth: int, width: int, heads: int, context: int, batch: int) -> None:
    """Refuse a model that cannot fit, by a lower bound on its memory.

    The bound counts four copies of the parameters (12 C^2 for attention and MLP together), since
    their gradients and the optimizer's two moments are as large, and, for one step, the streams and
    the attention of every layer.
    """
    parameters = 4 * (depth // 2) * 12 * width * width
    kept = depth * batch * context * (STREAMS * width + heads * context // 2)
    needed, there = 4 * (parameters + kept) / 2**30, machine.machine()["memory_gib"]
    if there and needed > there:
        raise typer.BadParameter(
            f"a model of these sizes needs {needed:.3g} GiB at least; here are {there} GiB: "
            "smaller --batch, --context, --width or --depth fit"
        )


def _check_places(out: Path, plot: Path | None, json_file: Path | None) -> Path:
    """Make the folder, refuse paths that cannot be written, and return the report's path."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--out {out} cannot be made: {error.strerror}") from None
    page = out / "report.html"
    _files.check([("--out", page), ("--plot", plot), ("--json", json_file)])
    return page


def _backend(chosen: str | None) -> tuple[str, str]:
    """Return the backend that trains, and its array library.

    By default, MLX where it has a GPU, then JAX, whose compiler makes it several times as fast as
    MLX on a CPU, then MLX.
    """
    from mhc_core import backends, use_backend
    from mhc_core.errors import BackendUnavailableError

    chosen = chosen or os.environ.get("MHC_BACKEND")
    if chosen:
        with use_backend(chosen):  # raises with the reason, or the nearest name
            pass
    trains = {
        name: library
        for name, backend in backends().items()
        if name == chosen or (not chosen and backend.available and _automatic(backend))
        if (library := _trains(backend))
    }
    if not trains:
        known = ", ".join(name for name, backend in backends().items() if _trains(backend))
        needed = f"needs a backend with gradients, of JAX or MLX: {known}"
        raise BackendUnavailableError(
            f"backend {chosen!r} does not train; the demo {needed}"
            if chosen
            else f"no backend here trains; the demo {needed}; mhc backends says what they lack"
        )
    return min(trains.items(), key=lambda one: _rank(one[1]))


def _automatic(backend: Backend) -> bool:
    return backend.spec is not None and backend.spec.automatic


def _trains(backend: Backend) -> str | None:
    """Return a backend's array library, or None if the demo cannot train with the backend."""
    from mhc_core.cli.demo._library import LIBRARIES

    if backend.spec is None or "grad" in backend.spec.without:
        return None
    library = backend.spec.array_types[0].partition(".")[0]
    return library if library in LIBRARIES else None


def _rank(library: str) -> int:
    if library == "jax":
        return 1
    return 0 if machine.devices((library,)).get(library, "").startswith("gpu") else 2


def _checkpoints(
    out: Path, names: Sequence[str], settings: Settings, resume: bool, overwrite: bool
) -> dict[str, Checkpoint | None]:
    """Load the checkpoints to resume from; delete them if they are to be overwritten."""
    from mhc_core.cli.demo import _checkpoint

    files = {name: _checkpoint.path(out, name) for name in names}
    there = [file for file in files.values() if file.exists()]
    if there and not (resume or overwrite):
        raise typer.BadParameter(
            f"{there[0]} is from an earlier run; --resume continues it, --overwrite starts over, "
            "and --out names another folder"
        )
    if overwrite:
        for file in there:
            file.unlink()
    return {
        name: _checkpoint.load(file, settings, name) if resume and file in there else None
        for name, file in files.items()
    }


# ---- training and telling -----------------------------------------------------------------------


def _train_all(
    settings: Settings,
    text: bytes,
    library: str,
    out: Path,
    save_every: int,
    before: Mapping[str, Checkpoint | None],
) -> dict[str, Trained]:
    """Train one variant after the other, with a bar for each."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from mhc_core.cli.demo._library import library as load
    from mhc_core.cli.demo._train import InterruptedRunError, Task, train

    words = TextColumn("{task.description:12}"), TextColumn("loss {task.fields[loss]}")
    times = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    trained: dict[str, Trained] = {}
    with Progress(words[0], BarColumn(), *times, words[1], console=Console(stderr=True)) as bars:
        for name, start in before.items():
            done = start.step if start else 0
            bar = bars.add_task(name, total=settings.steps, completed=done, loss="")

            def tell(taken: int, loss: float, bar: Any = bar) -> None:
                bars.update(bar, completed=taken, loss=f"{loss:.3f}")

            task = Task(
                settings=settings,
                variant=name,
                text=text,
                library=load(library),
                folder=out,
                save_every=save_every,
                before=start,
            )
            try:
                trained[name] = train(task, tell)
                bars.stop_task(bar)
            except InterruptedRunError:
                bars.stop()
                typer.echo(f"Stopped and saved in {out}; --resume continues.", err=True)
                raise typer.Exit(STOPPED) from None
    return trained


def _command() -> str:
    """Return the command that trains the same again."""
    words = sys.argv[1:]
    kept = (word for word in words if word not in ("--resume", "--overwrite"))
    return safe(shlex.join(["mhc", *kept]))


def _show(told: Mapping[str, Any]) -> None:
    from rich.table import Table

    steps, depth = told["settings"]["steps"], told["settings"]["depth"]
    table = Table(title=f"{depth} layers after {steps} steps", title_justify="left")
    table.add_column("variant", no_wrap=True)
    heads = ("loss, nats a byte", "gain forward", "gain backward", "ms a step", "MB a step")
    for head in heads:
        table.add_column(head, justify="right")
    for name, one in told["variants"].items():
        gains = (one["gain_forward"][-1], one["gain_backward"][0])
        memory = "" if one["memory"] is None else f"{one['memory'] / 1e6:.0f}"
        numbers = (one["final_loss"], *gains, 1e3 * one["seconds"])
        table.add_row(name, *("-" if n is None else f"{n:.4g}" for n in numbers), memory)
    _screen.console().print(table)
