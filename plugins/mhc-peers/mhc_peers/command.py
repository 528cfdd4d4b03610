"""The functions that ``mhc conformance --peers`` calls, by the group ``mhc_core.peers``."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mhc_core
from mhc_core import math
from mhc_peers.declaration import Op, Peer
from mhc_peers.libraries import has_gpu
from mhc_peers.registry import named, peers
from mhc_peers.run import QUANTITIES, Plan, Ran, run
from mhc_peers.table import DTYPES, SUFFIXES, Table
from mhc_peers.targets import NotRunError, installed, lacking
from mhc_peers.timing import Remote, starter

__all__ = ["SUFFIXES", "Table", "check", "checkouts", "names", "remotes", "running", "timed"]


def names() -> list[str]:
    """Return what may be written after ``--peers``: projects with families, and every peer."""
    families = [name.split(":")[0] for name in peers()]
    return list(dict.fromkeys((*families, *peers())))


def checkouts() -> list[str]:
    """Return the names of the peers that are read from a checkout."""
    return [one.checkout for one in peers().values() if one.checkout]


def check(
    chosen: Sequence[str] = (),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    kinds: Sequence[str] = (),
    folders: Mapping[str, Path] | None = None,
) -> None:
    """Raise ValueError, which names the argument, for unknown words and wrong folders."""
    for name in chosen:
        if name not in names():
            named(name)  # raises, with the nearest name
    known: tuple[tuple[str, Sequence[str], Sequence[str]], ...] = (
        ("op", ops, tuple(math.OPS)),
        ("dtype", dtypes, DTYPES),
        ("kind", kinds, QUANTITIES),
    )
    for option, words, every in known:
        for word in words:
            if word not in every:
                raise ValueError(f"--{option} is {word!r}; needs one of {', '.join(every)}")
    taken = {peer.checkout: peer for peer in Plan(chosen).peers()}
    for name, folder in (folders or {}).items():
        if name not in taken:
            raise ValueError(f"--checkout {name} came without --peers {name}")
        if not (folder / taken[name].reads).is_file():
            raise ValueError(
                f"--checkout {name} is {str(folder)!r}; needs a folder with {taken[name].reads}"
            )


def running(
    chosen: Sequence[str] = (),
    ops: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    kinds: Sequence[str] = (),
    seed: int = 0,
    folders: Mapping[str, Path] | None = None,
    began: Callable[[str], None] = lambda what: None,
) -> Iterator[Ran]:
    """Yield each of the chosen peers once it ran, all if none is chosen."""
    return run(Plan(chosen, ops, dtypes, kinds, seed, folders), began)


# --- for mhc bench --vs -----------------------------------------------------------------------


def timed() -> dict[str, tuple[str, str, str, Callable[[], Mapping[str, Any]]]]:
    """Return what ``mhc bench --vs`` takes: library, distribution, description and functions.

    They run in its process, beside mhc-core's backends, on the same arrays. Those that need
    another Python or a checkout are in :func:`remotes`.
    """
    return {
        name: (peer.library, "mhc-peers", f"{peer.where}, by the adapter", _loader(peer))
        for name, peer in peers().items()
        if not (peer.python or peer.checkout)
    }


def remotes() -> dict[str, tuple[str, str, Callable[[Mapping[str, Path]], Remote]]]:
    """Return the peers that are timed in a process of their own: library, description, starter."""
    return {
        name: (
            peer.library,
            f"{peer.where}, by the adapter, in a process of its own",
            starter(peer, functools.partial(_plain_defaults, peer)),
        )
        for name, peer in peers().items()
        if peer.python or peer.checkout
    }


def _plain_defaults(peer: Peer, op: str) -> dict[str, Any]:
    """Return the static arguments of an op, for a process without mhc-core."""
    return {
        name: SimpleNamespace(**asdict(value)) if name == "variant" else value
        for name, value in _defaults(op, peer.ops[op]).items()
    }


def _loader(peer: Peer) -> Callable[[], Mapping[str, Any]]:
    def load() -> dict[str, Any]:
        reason = "its kernels need a GPU" if peer.triton and not has_gpu() else lacking(peer)
        if reason:
            raise NotRunError(reason)
        sys.path[:0] = [str(folder) for folder in installed(peer, sys.executable)]
        return {
            name: functools.partial(op.function, **_defaults(name, op))
            for name, op in peer.ops.items()
            if op.released in ("", "DEEPSEEK_V4")  # the constants that all sides are timed with
        }

    return load


def _defaults(name: str, op: Op) -> dict[str, Any]:
    """Return the static arguments of an op: the peer's own, else those of mhc-core."""
    public = inspect.signature(getattr(mhc_core, name)).parameters
    taken = inspect.signature(op.function).parameters
    found: dict[str, Any] = {"variant": mhc_core.DEEPSEEK_V4} if "variant" in taken else {}
    for argument in taken:
        given = public[argument].default if argument in public else inspect.Parameter.empty
        value = op.fixed.get(argument, given)
        if argument != "variant" and value is not inspect.Parameter.empty and value is not None:
            found[argument] = value
    return found
