"""A run of the whole grid, on several processes, record by record."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mhc_conformance import pool
from mhc_conformance.bugs import present
from mhc_conformance.cases import cases
from mhc_conformance.chain import OPS, TOLERANCE, Chain, compare, run_chain
from mhc_conformance.checks import check, grid, skips
from mhc_conformance.records import Record, Skip
from mhc_conformance.subject import Subject
from mhc_core.selection import without_proofs

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
    """The checks that a run makes, and how."""

    backends: Sequence[str]
    ops: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    kinds: Sequence[str] = ()
    seed: int = 0
    full: bool = False
    chain: bool = True
    quick: bool = False  # one case of every op, forward and gradient, in one dtype, and no chain

    def units(self) -> list[Unit]:
        """Split the grid into units, the slowest first."""
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
        """Return the checks that are left out, with the reasons that the backends declare."""
        if self.quick:
            return []
        found = [skip for name in self.backends for skip in skips(Subject(name))]
        return [skip for skip in found if self._wants(skip.op, skip.dtype, skip.kind)]

    @property
    def size(self) -> int:
        """Return the number of records that the run will make."""
        return sum(len(unit.kinds) for unit in self.units())


def _weight(unit: Unit) -> int:
    """Order units by their cost: compilers dominate, and Sinkhorn's loop within them."""
    tried = 20 if unit.op == "chain" else sum(1 for _ in cases(unit.op, unit.dtype))
    count = tried * len(unit.kinds)
    heavy = unit.op in ("combine_pre", "pre", "mappings", "static_layer", "sinkhorn", "chain")
    return count * (1 + 9 * ("compile" in unit.kinds) + 4 * heavy)


def run(
    plan: Plan, jobs: int | None = None, began: Callable[[str], None] = lambda what: None
) -> Iterator[Record]:
    """Yield the records as they come; call ``began`` with each check's name before it runs.

    A process that ends in a check does not end the run: the check has failed, and those after it
    in its unit have not been tried.
    """
    with contextlib.ExitStack() as around:
        for name in plan.backends:
            around.enter_context(Subject(name).hurried())
        yield from _run(plan, jobs, began)


def _run(plan: Plan, jobs: int | None, began: Callable[[str], None]) -> Iterator[Record]:
    units = plan.units()
    records_of = functools.partial(_records_of, seed=plan.seed, full=plan.full)
    jobs = min(jobs or os.cpu_count() or 1, len(units))
    if jobs <= 1:
        for unit in units:
            yield from _told(unit, records_of(unit), began)
        return
    done: dict[Unit, int] = {}
    for event in pool.work(records_of, units, jobs):
        unit = event.task
        if isinstance(event, pool.Told):
            for record in _told(unit, [event.news], began):
                done[unit] = done.get(unit, 0) + 1
                yield record
        elif isinstance(event, pool.Died):
            kinds = unit.kinds[done.get(unit, 0) :]
            for kind in kinds:
                yield _lost(unit, kind, plan.seed, kinds[0], event.exit_code)


def _told(
    unit: Unit, news: Iterable[str | Record], began: Callable[[str], None]
) -> Iterator[Record]:
    for one in news:
        if isinstance(one, str):
            began(f"{unit.backend} {unit.op} {unit.dtype} {one}")
        else:
            yield one


def _records_of(unit: Unit, seed: int, full: bool) -> Iterator[str | Record]:
    """Yield, for each check, its name before it runs and its record after it."""
    with present(unit.backend):
        if unit.op == "chain":
            yield "forward and gradient"
            yield from _chain_records(unit.backend, seed)
            return
        subject = Subject(unit.backend, full, unit.quick)
        for kind in unit.kinds:
            yield kind
            yield check(subject, unit.op, unit.dtype, kind, seed)


def _lost(unit: Unit, kind: str, seed: int, died: str, exit_code: int | None) -> Record:
    """Record the check that its process ended in, or before, as failed."""
    what = f"ended its process (exit code {exit_code})" if kind == died else "was not tried"
    after = "" if kind == died else f": the process ended in {died}"
    words = ["mhc conformance", unit.backend]
    if unit.op != "chain":
        words += [f"--op {unit.op} --dtype {unit.dtype} --kind {kind}"]
    name = f"{unit.op} {kind} {unit.dtype}"
    command = f"{' '.join(words)} --seed {seed} --jobs 1"
    return Record(
        backend=unit.backend,
        op=unit.op,
        dtype=unit.dtype,
        kind=kind,
        error=float("nan"),
        tolerance=float("nan"),
        passed=False,
        cases=0,
        seed=seed,
        detail=f"{name} on {unit.backend} {what}{after}. Reproduce: {command}",
    )


def _chain_records(backend: str, seed: int) -> list[Record]:
    """Compare the text model in float32 with the NumPy backend's in float64."""
    chain = Chain.make(seed)
    reference = run_chain("numpy", chain, "float64")
    try:
        with without_proofs():
            errors = compare(run_chain(backend, chain), reference)
        problem = ""
    except (Exception, SystemExit) as error:  # whatever a backend does, the run continues
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
