"""Running the whole grid, on several processes, record by record."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import NamedTuple

from mhc_conformance.bugs import present
from mhc_conformance.chain import OPS, TOLERANCE, Chain, compare, run_chain
from mhc_conformance.checks import Record, Skip, check, grid, skips
from mhc_conformance.subject import Subject

__all__ = ["Plan", "Unit", "run"]


NUMERIC_KINDS = ("forward", "gradient")


class Unit(NamedTuple):
    """The checks of one op in one dtype on one backend: they share what the library compiles."""

    backend: str
    op: str
    dtype: str
    kinds: tuple[str, ...]
    quick: bool = False


@dataclass(frozen=True)
class Plan:
    """What to run."""

    backends: Sequence[str]
    ops: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    kinds: Sequence[str] = ()
    seed: int = 0
    full: bool = False
    chain: bool = True
    quick: bool = False  # one case of every op, forward and gradient, in one dtype, and no chain

    def units(self) -> list[Unit]:
        """Split the grid, the slowest first."""
        units: list[Unit] = []
        for name in self.backends:
            found = [triple for triple in self._grid(name) if self._wants(*triple)]
            for op, dtype in dict.fromkeys((op, dtype) for op, dtype, _ in found):
                kinds = tuple(kind for *both, kind in found if both == [op, dtype])
                units.append(Unit(name, op, dtype, kinds, self.quick))
        if self.chain and not self.quick:
            whole = [name for name in self.backends if set(OPS) <= set(Subject(name).spec.ops)]
            units += [Unit(name, "chain", "float32", ("forward", "gradient")) for name in whole]
        return sorted(units, key=lambda unit: -_weight(unit))

    def _grid(self, name: str) -> Iterator[tuple[str, str, str]]:
        subject = Subject(name)
        for op, dtype, kind in grid(subject):
            first = kind in NUMERIC_KINDS and dtype == subject.spec.dtypes[0]
            if first or not self.quick:
                yield op, dtype, kind

    def _wants(self, op: str, dtype: str, kind: str) -> bool:
        pairs = ((self.ops, op), (self.dtypes, dtype), (self.kinds, kind))
        return all(not chosen or one in chosen for chosen, one in pairs)

    def skips(self) -> list[Skip]:
        """Give what is left out of it, with the reasons that the backends declare."""
        if self.quick:
            return []
        found = [skip for name in self.backends for skip in skips(Subject(name))]
        return [skip for skip in found if self._wants(skip.op, skip.dtype, skip.kind)]

    @property
    def size(self) -> int:
        """How many records there will be."""
        return sum(len(unit.kinds) for unit in self.units())


def _weight(unit: Unit) -> int:
    """Order units by their cost: compilers dominate, and Sinkhorn's loop within them."""
    compiled = "compile" in unit.kinds
    heavy = unit.op in ("combine_pre", "pre", "mappings", "static_layer", "sinkhorn", "chain")
    return 2 * compiled + heavy


def run(plan: Plan, jobs: int | None = None) -> Iterator[Record]:
    """Give the records as they come."""
    units = plan.units()
    jobs = min(jobs or os.cpu_count() or 1, len(units))
    if jobs <= 1:
        for unit in units:
            yield from _run_unit(unit, plan.seed, plan.full)
        return
    # fresh processes: JAX and MLX keep threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(_run_unit, unit, plan.seed, plan.full) for unit in units]
        try:
            for future in as_completed(futures):
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_unit(unit: Unit, seed: int, full: bool) -> list[Record]:
    with present(unit.backend):
        if unit.op == "chain":
            return _chain_records(unit.backend, seed)
        subject = Subject(unit.backend, full, unit.quick)
        return [check(subject, unit.op, unit.dtype, kind, seed) for kind in unit.kinds]


def _chain_records(backend: str, seed: int) -> list[Record]:
    """Hold the text model in float32 against the NumPy backend's in float64."""
    chain = Chain.make(seed)
    reference = run_chain("numpy", chain, "float64")
    try:
        errors = compare(run_chain(backend, chain), reference)
        problem = ""
    except Exception as error:  # whatever a backend does, the report goes on
        errors, problem = (float("nan"),) * 2, f"raised {type(error).__name__}: {error}"
    return [
        Record(
            backend=backend,
            op="chain",
            dtype="float32",
            kind=kind,
            error=error,
            tolerance=TOLERANCE,
            passed=error <= TOLERANCE,
            cases=1,
            seed=seed,
            detail="" if error <= TOLERANCE else f"chain {kind} on {backend}: {problem or error}",
        )
        for kind, error in zip(("forward", "gradient"), errors, strict=True)
    ]
