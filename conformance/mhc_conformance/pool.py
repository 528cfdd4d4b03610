"""The processes that run the grid: they report each record as it is made, and die with us.

A backend may crash its process, or be deep in a compiler when Ctrl-C comes. So the present task of
each worker is known: one that dies fails its own checks alone, and a stop kills all workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

__all__ = ["Began", "Died", "Told", "work"]

Task = TypeVar("Task")


@dataclass(frozen=True)
class Began(Generic[Task]):
    """The report that a worker has begun a task."""

    task: Task


@dataclass(frozen=True)
class Told(Generic[Task]):
    """An item that a worker's task has yielded."""

    task: Task
    news: Any


@dataclass(frozen=True)
class Died(Generic[Task]):
    """The report that a worker's process ended during its task, without an error."""

    task: Task
    exit_code: int | None


def work(
    function: Callable[[Task], Iterable[Any]], tasks: Sequence[Task], jobs: int
) -> Iterator[Began[Task] | Told[Task] | Died[Task]]:
    """Run ``function`` on every task, in order, and yield its items as they come.

    Raises
    ------
    Exception
        The function's exception, from any task.
    """
    # fresh processes: JAX and MLX keep threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    left = list(reversed(tasks))
    workers: list[_Worker[Task]] = []
    try:
        for _ in range(min(jobs, len(tasks))):
            workers.append(_Worker(context, function))
            yield from workers[-1].begin(left)
        while busy := {worker.pipe: worker for worker in workers if worker.task is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # pyright: ignore[reportArgumentType]
                yield from worker.news()
                if worker.dead and not worker.ready:
                    raise RuntimeError(
                        "the processes of the checks end as soon as they begin; with one job, the "
                        "checks run in this one"
                    )
                if worker.dead and left:
                    worker.kill()
                    workers[workers.index(worker)] = worker = _Worker(context, function)
                if worker.task is None and not worker.dead:
                    yield from worker.begin(left)
    finally:
        for worker in workers:
            worker.kill()


class _Worker(Generic[Task]):
    """One process, and its present task."""

    def __init__(self, context: Any, function: Callable[[Task], Iterable[Any]]) -> None:
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        self.task: Task | None = None
        self.ready = False
        self.dead = False
        self._process = context.Process(target=_serve, args=(theirs, function))
        with _signals_held_back():
            self._process.start()
        theirs.close()  # so that the end of the process closes the pipe

    def begin(self, left: list[Task]) -> Iterator[Began[Task]]:
        """Send the worker the next task, if there is one."""
        if left:
            self.task = left.pop()
            with contextlib.suppress(OSError):  # it died between two tasks, which news() reports
                self.pipe.send(self.task)
            yield Began(self.task)

    def news(self) -> Iterator[Told[Task] | Died[Task]]:
        """Receive one message, or the end of the process."""
        task = self.task
        assert task is not None
        try:
            event, news = self.pipe.recv()
        except (EOFError, OSError):
            self.dead, self.task = True, None
            self._process.join(1)
            yield Died(task, self._process.exitcode)
            return
        if event == "raised":
            raise news
        if event == "ready":
            self.ready = True
        elif event == "done":
            self.task = None
        else:
            yield Told(task, news)

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()
        self._process.join(1)
        self.pipe.close()


@contextlib.contextmanager
def _signals_held_back() -> Generator[None]:
    """Delay Ctrl-C and SIGTERM for a moment: a half-started process would print a traceback.

    A process started meanwhile ignores Ctrl-C, which a terminal sends to every process:
    :meth:`_Worker.kill` ends ours, silently.
    """
    heard: list[int] = []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # None: Python cannot restore it
                handlers[number] = signal.signal(number, lambda number, _: heard.append(number))
    # the new process inherits the blocked signal; here, another thread may still receive it
    block: Any = getattr(signal, "pthread_sigmask", None)  # Windows has none
    before = block(signal.SIG_BLOCK, {signal.SIGINT}) if block else ()
    try:
        yield
    finally:
        if block:
            block(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in heard:
            signal.raise_signal(number)


def _serve(pipe: Connection, function: Callable[[Any], Iterable[Any]]) -> None:
    """Run one task after another, in the worker."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(("ready", None))
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            for news in function(task):
                pipe.send(("told", news))
        except Exception as error:
            pipe.send(("raised", _portable(error)))
        else:
            pipe.send(("done", None))


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled: not every class can be rebuilt from its arguments."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """Wait until the process that started this one is gone, even by kill -9, and exit."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
