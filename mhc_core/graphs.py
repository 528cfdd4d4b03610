"""CUDA graphs of what PyTorch launches, for measurements.

This file imports the standard library alone: a process that times a peer has it without the rest of
the package (``mhc_peers.targets``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["replayed"]


def replayed(torch: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that replays a CUDA graph of its launches, one for each set of arrays.

    Recorded as PyTorch's notes on CUDA semantics say: after calls on another stream, in which
    libraries prepare what may not be prepared in a graph. The results are written over each time.
    """
    recorded: dict[tuple[int, ...], tuple[Any, Any, Sequence[Any]]] = {}

    def record(arrays: Sequence[Any]) -> tuple[Any, Any, Sequence[Any]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*arrays)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function(*arrays)
        return graph, results, arrays  # so that no other arrays get their numbers

    def call(*arrays: Any) -> Any:
        key = tuple(id(array) for array in arrays)
        if key not in recorded:
            recorded[key] = record(arrays)
        graph, results, _ = recorded[key]
        graph.replay()
        return results

    return call
