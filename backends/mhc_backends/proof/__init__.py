"""The proof of a kernel backend on the machine on which it is about to run.

Kernels cannot be tested in advance on every machine whose compiler will build them. So before such
a backend runs a kind of call (an op, its dtypes, its n) for the first time on a machine, every
kernel that the op needs, in every class of its launches, runs on small fixed inputs in a process of
its own, and its numbers are compared with the float64 oracle's. The process is separate because a
fault on a GPU ends the process: https://github.com/ml-explore/mlx/issues/3390.

The verdict is kept in the user's cache. Importing this imports nothing heavy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mhc_core.backend import Verdict

if TYPE_CHECKING:
    from mhc_backends.proof.cache import Cache

__all__ = ["KernelProof"]

LIMIT = 120.0  # seconds for one kind of call

Kind = tuple[str, tuple[str, ...], "int | None"]


class KernelProof:
    """The proof of a kernel backend, as ``BackendSpec.proof`` requires it.

    Parameters
    ----------
    name
        The backend's.
    launcher
        The function that makes kernels, such as ``"mlx.core:fast.metal_kernel"``.
    compiled
        Whether its kernels may be called under ``mx.compile``.
    limit
        Seconds for one kind of call.
    child
        The module whose ``main`` runs in the separate process: by default, that of MLX.
    identity
        The function that returns what a verdict depends on, as ``launcher`` names one: by default,
        that of MLX.
    """

    def __init__(
        self,
        name: str,
        launcher: str,
        *,
        compiled: bool = True,
        limit: float = LIMIT,
        child: str = "mhc_backends.proof.child",
        identity: str = "mhc_backends.proof.cache:identity",
    ) -> None:
        self._name = name
        self._launcher = launcher
        self._compiled = compiled
        self._limit = limit
        self._child = child
        self._identity = identity
        self._verdicts: dict[Kind, str | None] = {}
        self._hopeless: str | None = None
        self._lock = threading.Lock()

    def verdict(self, op: str, dtypes: tuple[str, ...], n: int | None) -> str | None:
        """Return None if all kernels of a kind of call are right, else what is wrong with one."""
        kind = (op, dtypes, n)
        with self._lock:  # else two threads would prove the same kind
            if kind not in self._verdicts:
                self._verdicts[kind] = self._kept_or_new(kind)
            return self._verdicts[kind]

    def verdicts(self) -> Sequence[Verdict]:
        """Return the verdicts in the cache, and those of this process that are not in it."""
        verdicts = {kind: found["reason"] for kind, found in self._cache()} | self._verdicts
        return sorted(
            (Verdict(*kind, reason) for kind, reason in verdicts.items()),
            key=lambda verdict: (verdict.op, verdict.n or 0, verdict.dtypes),
        )

    def _cache(self) -> Cache:
        from mhc_backends.proof.cache import Cache
        from mhc_backends.proof.child import named

        return Cache(self._name, named(self._identity)())

    def _kept_or_new(self, kind: Kind) -> str | None:
        cache = self._cache()
        kept = cache.read(kind)
        if kept is not None:
            return kept["reason"]
        if self._hopeless:
            return self._hopeless
        import logging

        from mhc_backends.proof.process import prove

        words = "%s tries the kernels of %s once on this machine (n=%s, %s), for up to %g s"
        logging.getLogger("mhc_core").info(
            words, self._name, kind[0], kind[2], kind[1][0], self._limit
        )
        found = prove(kind, self._launcher, self._compiled, self._limit, self._child)
        if found.timed_out:
            # a kernel that hangs once may always hang: do not wait again for every op
            self._hopeless = f"not tried, as {found.reason} for {kind[0]}"
        if found.classes:  # else no kernel ran, and another process may get further
            cache.write(kind, found.reason, found.classes, found.final)
        return found.reason
