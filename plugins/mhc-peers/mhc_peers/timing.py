"""Peers that ``mhc bench`` times in a process of their own: another Python, or a checkout."""

from __future__ import annotations

import contextlib
import functools
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mhc_core.text import one_line, safe
from mhc_peers.declaration import Peer
from mhc_peers.libraries import has_gpu
from mhc_peers.targets import NotRunError, environment, interpreter
from mhc_peers.wire import from_wire, to_wire

__all__ = ["Call", "Remote", "starter"]

Static = Callable[[str], Mapping[str, Any]]


class Remote:
    """A peer in a process of its own, which is started at the first question.

    Attributes
    ----------
    name, on_gpu, way, graphs
        The peer's name, whether it runs on a GPU, the way in which its calls run, and whether CUDA
        graphs of them can be replayed.
    """

    def __init__(self, peer: Peer, static: Static, checkouts: Mapping[str, Path]) -> None:
        if peer.triton and not has_gpu():
            raise NotRunError("its kernels need a GPU")
        python = interpreter(peer)
        self.name, self.peer, self._static = peer.name, peer, static
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "mhc_peers.serve", peer.name],
            env=environment(peer, python, checkouts),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
        )
        device, self.way, self.graphs = self._ask("about")
        self.on_gpu = device != "cpu"

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.communicate()  # its requests end
        self._said.close()

    def refuses(self, op: str, passes: str, dtype: str, n: int, C: int) -> str | None:
        """Return why it does not take an op at some sizes, or None."""
        declared = self.peer.ops.get(op)
        if declared is None or declared.released not in ("", "DEEPSEEK_V4"):
            return f"has no {op} with the constants that all are timed with"
        if passes != "forward" and not declared.gradient:
            return declared.note
        if dtype not in (declared.dtypes or self.peer.dtypes):
            return f"takes {', '.join(declared.dtypes or self.peer.dtypes)}"
        return self.peer.sizes(n, C)

    def put(self, array: Any) -> int:
        """Keep an array there; return its number."""
        return self._ask("put", to_wire(array))

    def forget(self) -> None:
        """Drop the arrays that were kept."""
        self._ask("forget")

    def call(self, op: str, names: Sequence[str], graph: bool = False) -> Call:
        """Return an op as a function of arrays that were put; with cotangents, its vjp.

        ``graph`` says that a CUDA graph of it is replayed.
        """
        return Call(self, (op, tuple(names), dict(self._static(op)), graph))

    def ask(self, what: str, *given: Any) -> Any:
        """Return an answer; raise RuntimeError with what went wrong there."""
        return self._ask(what, *given)

    def _ask(self, what: str, *given: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            pickle.dump((what, given), stdin)
            stdin.flush()
            good, made = cast("tuple[bool, Any]", pickle.load(stdout))
        except (EOFError, OSError, pickle.UnpicklingError):
            code = self._process.wait()
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            said = next((line for line in reversed(lines) if "Error" in line), "")
            text = f"its process ended with code {code}: {said}"
            raise RuntimeError(one_line(safe(text))) from None
        if not good:
            raise RuntimeError(one_line(safe(str(made))))
        return made


class Call:
    """A call in a peer's process; ``seconds`` is timed there."""

    def __init__(self, remote: Remote, call: tuple[Any, ...]) -> None:
        self._remote, self._call = remote, call

    def __call__(self, *numbers: int) -> list[Any]:
        """Return the results as NumPy arrays."""
        return [from_wire(wire) for wire in self._remote.ask("results", *self._call, numbers)]

    def seconds(self, numbers: Sequence[int], waits: bool, calls: int | None, warmup: int) -> float:
        """Return the seconds of a turn."""
        return self._remote.ask("seconds", waits, calls, warmup, *self._call, numbers)


def starter(peer: Peer, static: Static) -> Callable[[Mapping[str, Path]], Remote]:
    """Return a function of the checkouts that starts a peer's process."""
    return functools.partial(Remote, peer, static)
