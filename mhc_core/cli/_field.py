"""``mhc conformance`` without a backend: other projects, and golden cases in files."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from mhc_core.cli import _files, _screen
from mhc_core.cli._command import Stopped, stoppable

__all__ = ["against", "export", "folders_of", "needed", "peers", "plugin"]

GROUP = "mhc_core.peers"
"""The entry-point group of the plugin that runs other projects' implementations."""

STYLES = {"good": "green", "bad": "red", "none": "dim", "title": "bold"}


def peers(
    chosen: Sequence[str],
    ops: Sequence[str],
    dtypes: Sequence[str],
    kinds: Sequence[str],
    seed: int,
    checkouts: Sequence[str],
    report: Sequence[Path],
    json_file: Path | None,
) -> None:
    """Hold other projects' implementations against the oracle, and name their bugs."""
    known = needed()
    folders = folders_of(known, checkouts)
    try:
        known.check(chosen, ops, dtypes, kinds, folders)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for file in report:
        if file.suffix.lower() not in known.SUFFIXES:
            needs = ", ".join(known.SUFFIXES)
            raise typer.BadParameter(f"--report is {file.suffix!r}; needs one of {needs}")
    _files.check([*(("--report", file) for file in report), ("--json", json_file)])
    words = ["mhc", "conformance", "--peers", *chosen]
    for name, some in (("op", ops), ("dtype", dtypes), ("kind", kinds)):
        words += [word for one in some for word in (f"--{name}", one)]
    for name, folder in folders.items():
        words += ["--checkout", f"{name}={folder.name}"]
    command = shlex.join([*words, "--seed", str(seed)])
    started = time.perf_counter()
    ran: list[Any] = []
    try:
        with _files.only_json(json_file), stoppable(), _screen.progress(44) as bars:
            bar = bars.add_task("reading the adapters", total=None)

            def began(what: str) -> None:
                bars.update(bar, description=what)

            for one in known.running(chosen, ops, dtypes, kinds, seed, folders, began):
                ran.append(one)
    except Stopped:  # what is done is shown and written
        typer.echo(f"mhc conformance: stopped after {len(ran)} peers", err=True)
        _told(known.Table(command, seed, time.perf_counter() - started, ran), report, json_file)
        raise
    made = known.Table(command, seed, time.perf_counter() - started, ran)
    if not _told(made, report, json_file) or not made.compared:
        raise typer.Exit(1)


def _told(made: Any, report: Sequence[Path], json_file: Path | None) -> bool:
    """Show a table and write its files; return whether all could be written."""
    with _files.only_json(json_file):
        for line, mark in made.lines():
            _screen.say(line, STYLES[mark])
        _screen.say(made.summary)
    texts = [(file, made.spelled(file.suffix)) for file in report]
    texts += [(json_file, made.spelled(".json"))] if json_file else []
    written = [_files.write(file, content) for file, content in texts]
    return all(written)


def plugin() -> Any:
    """Return the module of the plugin that runs other projects' implementations, or None."""
    from importlib.metadata import entry_points

    found = entry_points(group=GROUP)
    return next(iter(found)).load() if found else None


def needed() -> Any:
    """Return the plugin, or refuse ``--peers`` and ``--checkout`` without it."""
    found = plugin()
    if found is None:
        raise typer.BadParameter(
            "this needs the plugin mhc-peers: in a checkout, pip install -e plugins/mhc-peers"
        )
    return found


def folders_of(known: Any, checkouts: Sequence[str]) -> dict[str, Path]:
    """Return the folders that were given as NAME=FOLDER, by name."""
    names = known.checkouts()
    folders: dict[str, Path] = {}
    for word in checkouts:
        name, _, folder = word.partition("=")
        if name not in names or not folder:
            raise typer.BadParameter(
                f"--checkout is {word!r}; needs NAME=FOLDER, with a name of {', '.join(names)}"
            )
        folders[name] = Path(folder)
    return folders


def export(
    folder: Path,
    ops: Sequence[str],
    dtypes: Sequence[str],
    variant: str,
    n: int,
    channels: int,
    tokens: int,
    seed: int,
) -> None:
    """Write golden cases as safetensors, with a JSON index."""
    from mhc_conformance import exchange, flashinfer
    from mhc_conformance.golden import Golden

    known = exchange.variants()
    if variant not in known:
        raise typer.BadParameter(f"--variant is {variant!r}; needs one of {', '.join(known)}")
    words = ["mhc", "conformance", "--export", folder.name, "--variant", variant]
    words += ["--n", str(n), "--C", str(channels), "--tokens", str(tokens), "--seed", str(seed)]
    for name, some in (("op", ops), ("dtype", dtypes)):
        words += [word for one in some for word in (f"--{name}", one)]
    try:
        cases = exchange.cases_for(ops, variant, n, channels, tokens)
        golden = [Golden(case, dtype, seed) for dtype in dtypes for case in cases]
        entries = exchange.export(folder, golden, shlex.join(words))
        traces = flashinfer.write(folder, known[variant], n, channels)
    except OSError as error:
        said = f"--export {folder} cannot be written: {error.strerror or error}"
        raise typer.BadParameter(said) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"{len(entries)} cases in {folder}: see {exchange.INDEX}")
    if traces:
        typer.echo(f"{len(traces)} trace definitions of FlashInfer: {', '.join(traces)}")


def against(folder: Path) -> None:
    """Judge every answer in a folder of golden cases."""
    from mhc_conformance.exchange import against as verdicts

    try:
        found = list(verdicts(folder))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for one in found:
        if one.outcome != "missing":
            share = f"{one.worst:.2g} of what is allowed" if one.worst < float("inf") else ""
            says = f": {one.says}" if one.says else f", {share}"
            _screen.say(
                f"{one.outcome:<5} {one.case}{says}", "green" if one.outcome == "holds" else "red"
            )
    counts = {mark: sum(o.outcome == mark for o in found) for mark in ("holds", "off", "missing")}
    holds, off, missing = counts.values()
    typer.echo(f"{holds} hold, {off} off, {missing} without an answer")
    if off or not holds:
        raise typer.Exit(1)
