"""The parsing of command lines; a wrong one ends with a one-line message and exit code 2."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from mhc_core.cli._output import Output, UnwritableError, output, writes_files
from mhc_core.text import one_line

__all__ = ["INTERRUPTED", "JSON", "Command", "Group", "Stopped", "stoppable", "with_places"]

JSON = "--json"
GRACE = 3.0  # seconds
INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended, in shells

# typer has its own copy of click, or click itself, and names neither
CLICK_ERROR: Any = next(k for k in typer.BadParameter.__mro__ if k.__name__ == "ClickException")


class Command(TyperCommand):
    """A subcommand in which a bare ``--json`` means ``--json -``, the screen."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line."""
        return super().parse_args(ctx, with_places(args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; one that writes files does so whatever becomes of stdout."""
        if isinstance(sys.stdout, Output):
            sys.stdout.goes_on = writes_files(self.params, ctx.params)
        return super().invoke(ctx)


def with_places(words: Sequence[str]) -> list[str]:
    """Insert ``-`` after a ``--json`` that ends the line or stands before another option."""
    given: list[str] = []
    for k, word in enumerate(words):
        if word == "--":
            return [*given, *words[k:]]
        given.append(word)
        after = "".join(words[k + 1 : k + 2])
        if word == JSON and (not after or (after.startswith("-") and after != "-")):
            given.append("-")
    return given


class Group(TyperGroup):
    """The command itself."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run a command line, and end the process with its exit code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **more)
        with output() as out:
            code = self._run(out, *args, **more)
            with contextlib.suppress(BrokenPipeError, UnwritableError):
                out.flush()
            if isinstance(out.error, BrokenPipeError):  # as of ``| head``
                code = code or 1
            elif out.error is not None:
                said = f"mhc: the output cannot be written: {out.error.strerror or out.error}"
                _stop(said, code or 1)
        sys.exit(code)

    def _run(self, out: Output, *args: Any, **more: Any) -> int:
        """Run a command line and return its exit code, or end the process with it."""
        for stream in (out, sys.stderr):  # a name that it cannot encode must not end the command
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore
        try:
            code = super().main(*args, standalone_mode=False, **more)
        except CLICK_ERROR as error:
            _end(error)
        except Stopped as stopped:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(stopped.code)
        except (KeyboardInterrupt, typer.Abort):
            _stop("mhc: stopped", INTERRUPTED)
        except (BrokenPipeError, UnwritableError):
            return 1
        except MemoryError as error:
            _stop(f"mhc: there is not enough memory for this: {error}", 2)
        return code if isinstance(code, int) else 0


class Stopped(BaseException):  # not an Exception, like KeyboardInterrupt
    """Ctrl-C or SIGTERM came; ``code`` is the exit code of a command that they ended."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def stoppable() -> Generator[None]:
    """Raise :class:`Stopped` at Ctrl-C and SIGTERM, so that child processes are ended too.

    While a library's compiler runs, Python cannot raise an exception, and shutting the libraries
    down takes seconds. So the process ends ``GRACE`` seconds later in any case.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        code = 128 + number
        _kill_children()
        threading.Thread(target=_end_anyway, args=(code,), daemon=True).start()
        raise Stopped(code)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_children() -> None:
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


def _end_anyway(code: int) -> None:
    time.sleep(GRACE)
    _kill_children()
    os._exit(code)


def _end(error: Any) -> NoReturn:
    ctx = getattr(error, "ctx", None)
    path = ctx.command_path if ctx else "mhc"
    said = error.format_message()
    if isinstance(error, typer.BadParameter) and error.param is None and not error.param_hint:
        said = error.message  # our own message, which begins with the option
    if not isinstance(error, typer.BadParameter):
        said = f"{said.strip().rstrip('.')}; see {path} --help"
    _stop(f"{path}: {said}", error.exit_code)


def _stop(said: str, code: int) -> NoReturn:
    typer.echo(one_line(said), err=True)
    sys.exit(code)
