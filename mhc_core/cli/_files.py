"""The files that a command writes: checked before the work, so that no result is lost."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Generator, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from mhc_core.text import one_line

__all__ = ["JSON_HELP", "STDOUT", "check", "no_picture", "only_json", "write"]

STDOUT = Path("-")
"""The path that stands for the screen, for a JSON."""

JSON_HELP = "the numbers as JSON to this file; without a file, or with -, to the screen"


# ---- before -------------------------------------------------------------------------------------


def check(places: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse a file that cannot be written, naming its option.

    An option that was given several times comes with each of its files.

    Raises
    ------
    typer.BadParameter
        For such a file, with the option, the file and the reason; also where two options name one
        file.
    """
    taken: dict[Path, str] = {}
    for option, file in places:
        if file is None or file == STDOUT:
            continue
        try:
            real = file.resolve()
            _try(real)
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # such as a loop of links, or a zero byte in the name
            raise typer.BadParameter(f"{option} {file} cannot be written: {_why(error)}") from None
        if real in taken and not _special(real):
            raise typer.BadParameter(
                f"{option} and {taken[real]} both name {file}; needs two files"
            )
        taken[real] = option


def no_picture(file: Path) -> str | None:
    """Return why Matplotlib cannot draw to a file of that name, or None."""
    bases: Any = import_module("matplotlib.backend_bases")
    known = sorted(bases.FigureCanvasBase.get_supported_filetypes())
    if file.suffix.lower().removeprefix(".") in known:
        return None
    return f"--plot is {str(file)!r}; needs a name that ends in one of .{', .'.join(known)}"


def _try(file: Path) -> None:
    """Write and delete a test file: permissions alone do not reveal a full disk."""
    if _special(file):
        with file.open("ab"):
            return
    if file.is_dir():
        raise IsADirectoryError(None, "it is a folder")
    if not file.parent.is_dir():
        raise NotADirectoryError(None, f"there is no folder {file.parent}")
    if file.exists() and not os.access(file, os.W_OK):
        raise PermissionError(None, "it may not be changed")
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".mhc-") as trial:
        trial.write(bytes(1 << 16))
        trial.flush()
        os.fsync(trial.fileno())
    if len(os.fsencode(file.name)) > 255 - len(PARTIAL):
        raise OSError(None, "its name is too long")


def _special(file: Path) -> bool:
    """Return whether the path exists and is a device or a pipe, such as /dev/null."""
    return file.exists() and not (file.is_file() or file.is_dir())


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# ---- after --------------------------------------------------------------------------------------

PARTIAL = ".partial"


def write(file: Path, content: str | bytes) -> bool:
    """Write a file completely or not at all; if that fails, keep the content elsewhere.

    Returns
    -------
    bool
        Whether it was written to the wanted path. If not, a line on stderr says where it is.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if file == STDOUT:
            typer.echo(data.decode(), nl=False)
        else:
            _replace(file.resolve(), data)
    except (OSError, RuntimeError, ValueError) as error:
        if file == STDOUT:
            raise
        kept = _keep(file, data)
        where = f"it is kept in {kept}" if kept else "no other place can be written either"
        said = f"{file} cannot be written: {_why(error)}; {where}"
        typer.echo(one_line(said), err=True)
        return False
    return True


def _replace(file: Path, data: bytes) -> None:
    """Replace a file in one step; a device or a pipe is written to."""
    if _special(file):
        file.write_bytes(data)
        return
    beside = file.with_name(file.name + PARTIAL)
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if file.exists():
            os.chmod(beside, stat.S_IMODE(file.stat().st_mode))
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def _keep(file: Path, data: bytes) -> Path | None:
    """Write the content under a new name beside the file, here, or among temporary files."""
    folders = [Path.cwd(), Path(tempfile.gettempdir())]
    with contextlib.suppress(OSError):
        folders[:0] = [] if _special(file) else [file.parent]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):
            number, name = tempfile.mkstemp(file.suffix, f"{file.stem[:99]}-", folder)
            try:
                with os.fdopen(number, "wb") as stream:
                    stream.write(data)
                return Path(name)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(name)
    return None


@contextlib.contextmanager
def only_json(json_file: Path | None) -> Generator[None]:
    """Keep stdout for the JSON if it goes there: everything else that is printed goes to stderr."""
    with contextlib.ExitStack() as stack:
        if json_file == STDOUT:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
