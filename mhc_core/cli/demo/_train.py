"""The training of one variant, step by step, so that it can be stopped and resumed anywhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy

import mhc_core as mhc
from mhc_core import diagnostics
from mhc_core.cli.demo import _adam, _checkpoint, _data
from mhc_core.cli.demo._checkpoint import Checkpoint
from mhc_core.cli.demo._library import Library
from mhc_core.cli.demo._model import Kept, Model, initial
from mhc_core.cli.demo._settings import Settings

__all__ = ["InterruptedRunError", "Task", "Trained", "train"]

Arrays = dict[str, Any]
History = dict[str, list[Any]]

LOOKS = 20  # measurements of the gain, over the whole training


class InterruptedRunError(Exception):
    """Ctrl-C came; the step was finished and saved."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The description of a training run: what is trained, on what, and where its checkpoints go."""

    settings: Settings
    variant: str
    text: bytes
    library: Library
    folder: Path
    save_every: int
    before: Checkpoint | None  # where to continue from


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, as NumPy arrays.

    Attributes
    ----------
    parameters
        The parameters.
    history
        ``loss``, ``norm`` and ``seconds`` of every step; ``looked``, ``gain_forward`` and
        ``gain_backward``: steps, and the gain over the whole depth before them; ``memory``: the
        bytes that a step takes, or 0 where the library does not report it.
    kept
        The streams and H_res of every layer, for one sequence.
    """

    parameters: Arrays
    history: Arrays
    kept: Kept


def train(task: Task, tell: Callable[[int, float], None]) -> Trained:
    """Train; ``tell`` is called with the number of steps taken and the last loss."""
    with mhc.use_backend(task.settings.backend), _held_back() as interrupted:
        return _Run(task).run(tell, interrupted)


@contextmanager
def _held_back() -> Generator[threading.Event]:
    """Let Ctrl-C set a flag, so that it never interrupts a step."""
    flag = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.is_set():  # the second time, at once
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


class _Run:
    """The state of a training."""

    def __init__(self, task: Task) -> None:
        self.task, self.library = task, task.library
        s, xp = task.settings, task.library.xp
        model = Model(s, task.variant, xp, task.library.loop)
        start = task.before or _start(s, task.variant)
        self.taken = start.step
        groups = (start.parameters, start.first, start.second)
        self.state = tuple({k: xp.asarray(v) for k, v in group.items()} for group in groups)
        self.history: History = {name: array.tolist() for name, array in start.history.items()}
        self.probe = xp.asarray(_data.probe(task.text, s.context))
        self.look, _ = task.library.prepared(model.look, self.state[0], self.probe)
        if self.taken < s.steps:
            step = _adam.make_step(xp, task.library.with_gradients(model.loss))
            self.step, memory = task.library.prepared(step, *self.state, *self._given(0))
            self.history["memory"] = [memory or 0]

    def run(self, tell: Callable[[int, float], None], interrupted: threading.Event) -> Trained:
        steps, every = self.task.settings.steps, self.task.save_every
        if self.task.before is None:
            self._save()  # so that any folder can be resumed from
        self.library.forget()
        while self.taken < steps:
            if self.taken % max(1, steps // LOOKS) == 0:
                self._note_gain()
            loss = self._take()
            tell(self.taken, loss)
            self.history["memory"] = [self.library.peak() or self.history["memory"][0]]
            stop = interrupted.is_set()
            if stop or self.taken % every == 0 or self.taken == steps:
                self._save()
            if stop and self.taken < steps:
                raise InterruptedRunError
        return Trained(
            parameters=_on_host(self.state[0]),
            history={name: numpy.asarray(numbers) for name, numbers in self.history.items()},
            kept=self._looked(),
        )

    def _given(self, step: int) -> tuple[Any, Any]:
        """Return the inputs of a step: its windows of the text, and its rates."""
        s, xp = self.task.settings, self.library.xp
        tokens = _data.batch(self.task.text, s.seed, step, s.batch, s.context)
        return xp.asarray(tokens), xp.asarray(_adam.rates(step, s.steps, s.rate))

    def _take(self) -> float:
        start = time.perf_counter()
        stepped = self.step(*self.state, *self._given(self.taken))
        self.library.wait(stepped)
        seconds = time.perf_counter() - start
        self.state = (stepped.parameters, stepped.first, stepped.second)
        self.taken += 1
        loss = float(stepped.loss)
        for name, number in (("loss", loss), ("norm", float(stepped.norm)), ("seconds", seconds)):
            self.history[name].append(number)
        return loss

    def _note_gain(self) -> None:
        """Record the gain over the whole depth, at most once for each step."""
        if self.taken in self.history["looked"]:
            return
        told = diagnostics.summary(self._looked().h_res)
        self.history["looked"].append(self.taken)
        for name in ("gain_forward", "gain_backward"):
            self.history[name].append(float(told[name]))

    def _looked(self) -> Kept:
        return Kept(*(numpy.asarray(array) for array in self.look(self.state[0], self.probe)))

    def _save(self) -> None:
        task = self.task
        parameters, first, second = map(_on_host, self.state)
        history = {name: _column(name, numbers) for name, numbers in self.history.items()}
        made = Checkpoint(
            step=self.taken, parameters=parameters, first=first, second=second, history=history
        )
        file = _checkpoint.path(task.folder, task.variant)
        _checkpoint.save(file, made, task.settings, task.variant)


def _start(settings: Settings, variant: str) -> Checkpoint:
    drawn = initial(settings, variant)
    zeros = {name: numpy.zeros_like(array) for name, array in drawn.items()}
    names = ("loss", "norm", "seconds", "looked", "gain_forward", "gain_backward", "memory")
    history = {name: _column(name, []) for name in names}
    return Checkpoint(step=0, parameters=drawn, first=zeros, second=zeros, history=history)


def _column(name: str, numbers: list[Any]) -> Any:
    return numpy.asarray(numbers, numpy.int64 if name in ("looked", "memory") else numpy.float64)


def _on_host(arrays: Arrays) -> Arrays:
    return {name: numpy.asarray(array) for name, array in arrays.items()}
