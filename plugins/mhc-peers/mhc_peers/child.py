"""The process that runs one peer: cases in, the peer's outputs and gradients out.

It is started as ``python -m mhc_peers.child JOBS RESULTS``, with the peer's own folders on its
path and without mhc-core, perhaps by another Python. Each result is written as soon as it is there,
so that a peer that ends the process loses only what follows.
"""

from __future__ import annotations

import functools
import pickle
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from mhc_peers.declaration import Peer
from mhc_peers.libraries import LIBRARIES, has_gpu
from mhc_peers.registry import named
from mhc_peers.wire import Asked, Began, Found, from_wire, to_wire

__all__ = ["answer", "device", "main", "versions"]

LONGEST = 2000  # of an exception's text


def device(peer: Peer) -> str:
    """Return the device of a peer's arrays in PyTorch: a GPU if it has kernels and there is one."""
    return "cuda" if peer.triton and has_gpu() else "cpu"


def _static(static: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: SimpleNamespace(**value) if name == "variant" else value
        for name, value in static.items()
    }


def answer(peer: Peer, questions: Iterable[Asked]) -> Iterator[Found]:
    """Yield a peer's answers, in the process that calls."""
    library = _library(peer.library, device(peer))
    for asked in questions:
        try:
            yield _answered(peer, library, asked)
        except Exception as error:  # whatever a peer does, the next question is asked
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(last.filename).name}:{last.lineno}"
            text = f"{type(error).__name__}: {error} ({where})"
            yield Found(asked.number, problem=text[:LONGEST])


@functools.cache
def _library(name: str, device: str) -> Any:
    return LIBRARIES[name](device)


def _answered(peer: Peer, library: Any, asked: Asked) -> Found:
    function, static = peer.ops[asked.op].function, _static(asked.static)
    primals = [library.take(from_wire(wire)) for wire in asked.primals]

    def call(*arrays: Any) -> Any:
        return function(**dict(zip(asked.names, arrays, strict=True)), **static)

    cotangents = [library.take(from_wire(wire)) for wire in asked.cotangents]
    quantity = asked.quantity.removeprefix("time ")

    def run() -> Sequence[Any]:
        if quantity == "forward":
            return library.forward(call, primals)
        return library.gradients(call, primals, cotangents)

    if asked.quantity != quantity:
        return Found(asked.number, seconds=_seconds(library, run))
    found = run()
    return Found(asked.number, tuple(to_wire(library.give(array)) for array in found))


def _seconds(library: Any, run: Any) -> float:
    """Return the median time of a call, of as many as fit half a second, at least three."""
    for _ in range(3):
        library.wait(run())
    times: list[float] = []
    ends = time.perf_counter() + 0.5
    while len(times) < 3 or (time.perf_counter() < ends and len(times) < 1000):
        started = time.perf_counter()
        library.wait(run())
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def versions(peer: Peer) -> dict[str, str]:
    """Return the versions that the peer runs with."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in peer.versions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def main(jobs: str, results: str) -> None:
    """Answer the questions in one file into another, peer by peer."""
    with open(results, "wb") as file:
        for name, questions in pickle.loads(Path(jobs).read_bytes()):
            peer = named(name)
            for asked in questions:
                _write(file, name, Began(asked.number))
                for found in answer(peer, (asked,)):
                    _write(file, name, found)
            where = device(peer)
            where += ", Triton's interpreter" if peer.triton and where == "cpu" else ""
            _write(file, name, {"versions": versions(peer), "device": where})


def _write(file: IO[bytes], name: str, what: object) -> None:
    pickle.dump((name, what), file)
    file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
