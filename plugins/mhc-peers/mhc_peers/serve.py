"""The process that times one peer for ``mhc bench``: requests on stdin, answers on stdout.

Arrays stay here once they were put, so that a turn moves a few bytes. It is started as
``python -m mhc_peers.serve NAME``, as :mod:`mhc_peers.child` is.
"""

from __future__ import annotations

import gc
import os
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mhc_core.graphs import replayed
from mhc_peers.child import device
from mhc_peers.libraries import LIBRARIES
from mhc_peers.registry import named
from mhc_peers.wire import Wire, from_wire, to_wire

__all__ = ["Server", "main"]

TURN = 0.05  # seconds that a turn lasts at least, if MOST calls are enough for it
MOST = 200


class Server:
    """One peer, its arrays, and the calls that were asked for."""

    def __init__(self, name: str) -> None:
        self.peer = named(name)
        self.device = device(self.peer)
        self.library = LIBRARIES[self.peer.library](self.device)
        if self.peer.library == "torch":
            self.library.torch.set_num_threads(os.cpu_count() or 1)  # as beside the others
        self.arrays: list[Any] = []
        self._graphs: dict[Any, Callable[..., Sequence[Any]]] = {}

    def about(self) -> tuple[str, str, bool]:
        """Return the device, the way in which calls run, and whether graphs of them are made."""
        graphs = self.peer.library == "torch" and self.device == "cuda"
        return self.device, self.library.way, graphs

    def put(self, wire: Wire) -> int:
        """Keep an array; return its number."""
        self.arrays.append(self.library.take(from_wire(wire)))
        return len(self.arrays) - 1

    def forget(self) -> None:
        """Drop all arrays, and the graphs that were recorded on them."""
        self.arrays.clear()
        self._graphs.clear()

    def results(self, *call: Any) -> list[Wire]:
        """Return the outputs of a call, or its gradients."""
        run, arrays = self._run(*call)
        return [to_wire(self.library.give(array)) for array in run(*arrays)]

    def seconds(self, waits: bool, calls: int | None, warmup: int, *call: Any) -> float:
        """Return the median of calls that are waited for, or the mean of a stream of calls.

        A call is an op, the names of its arrays, its static arguments, whether a graph is replayed,
        and the numbers of the arrays.
        """
        run, arrays = self._run(*call)
        wait, first = self.library.wait, 0.0
        for _ in range(warmup):
            started = time.perf_counter()
            wait(run(*arrays))
            first = time.perf_counter() - started
        count = calls or min(max(round(TURN / max(first, 1e-9)), 1 if waits else 3), MOST)
        gc.collect()
        times: list[float] = []
        started = time.perf_counter()
        if not waits:
            wait([array for _ in range(count) for array in run(*arrays)])
            return (time.perf_counter() - started) / count
        for _ in range(count):
            started = time.perf_counter()
            wait(run(*arrays))
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _run(
        self,
        op: str,
        names: Sequence[str],
        static: Mapping[str, Any],
        graph: bool,
        numbers: Sequence[int],
    ) -> tuple[Callable[..., Sequence[Any]], list[Any]]:
        arrays = [self.arrays[number] for number in numbers]
        key = (op, tuple(names), len(numbers))
        run = self.library.compiled(key, self.peer.ops[op].function, names, static)
        if graph:
            if key not in self._graphs:
                self._graphs[key] = replayed(self.library.torch, run)
            run = self._graphs[key]
        return run, arrays


def main(name: str) -> None:
    """Answer requests until stdin ends; what the peer prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = Server(name)
    while True:
        try:
            what, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            made: Any = (True, getattr(server, what)(*given))
        except Exception as error:  # whatever a library may raise
            made = (False, f"{type(error).__name__}: {error}")
        pickle.dump(made, answers)
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
