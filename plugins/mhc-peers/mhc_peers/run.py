"""A run of the field's test: every peer's answers, held against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mhc_core
from mhc_conformance.golden import Field, Golden, Want, golden, golden_cases
from mhc_conformance.naming import Observed, name_bug
from mhc_conformance.tolerances import Quantity
from mhc_core import Variant, math
from mhc_core.text import one_line, safe
from mhc_peers.child import answer, device, versions
from mhc_peers.declaration import Op, Peer
from mhc_peers.process import ask
from mhc_peers.registry import named, peers
from mhc_peers.targets import NotRunError
from mhc_peers.wire import Asked, Found, from_wire, to_wire

__all__ = ["Plan", "Ran", "Verdict", "here", "judge", "questions", "run"]

QUANTITIES: tuple[Quantity, ...] = ("forward", "gradient")


@dataclass(frozen=True)
class Verdict:
    """The verdict on one op of one peer, in one dtype, forward or gradient."""

    peer: str
    project: str
    op: str
    dtype: str
    quantity: str
    outcome: str  # holds, off, cannot, not run
    error: float | None = None  # of the worst array, relative
    times: float | None = None  # that error over what is allowed
    cases: int = 0
    where: str = ""  # the smallest case that fails, and its array
    why: str = ""  # the bug's name, or the reason

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which has no infinity."""
        record = asdict(self)
        for name in ("error", "times"):
            if record[name] is not None and record[name] == float("inf"):
                record[name] = None
        return record


@dataclass(frozen=True)
class Ran:
    """One peer's verdicts, and what it ran with."""

    peer: Peer
    verdicts: Sequence[Verdict]
    versions: Mapping[str, str]
    device: str
    reason: str = ""  # why it did not run


@dataclass(frozen=True)
class Plan:
    """The peers and ops of a run."""

    names: Sequence[str] = ()
    ops: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    kinds: Sequence[str] = ()
    seed: int = 0
    checkouts: Mapping[str, Path] | None = None

    def peers(self) -> list[Peer]:
        """Return the chosen peers; a project's name stands for all its families."""
        if not self.names:
            return list(peers().values())
        found: list[Peer] = []
        for name in self.names:
            family = [one for one in peers().values() if one.name.split(":")[0] == name]
            found += family or [named(name)]
        return list({peer.name: peer for peer in found}.values())

    def wants(self, op: str, dtype: str, quantity: str) -> bool:
        """Return whether a verdict is asked for."""
        pairs = ((self.ops, op), (self.dtypes, dtype), (self.kinds, quantity))
        return all(not chosen or one in chosen for chosen, one in pairs)


Question = tuple[Golden, Quantity, Asked]


def questions(peer: Peer, plan: Plan) -> list[Question]:
    """Return every question to a peer, the cases of the fewest numbers first."""
    found: list[Question] = []
    for name in math.OPS:
        if name not in peer.ops:
            continue
        op = peer.ops[name]
        cases = golden_cases(field_of(name, op, peer))
        for one in golden(cases, op.dtypes or peer.dtypes, plan.seed):
            for quantity in QUANTITIES:
                if quantity == "gradient" and not op.gradient:
                    continue
                if plan.wants(name, one.dtype, quantity):
                    found.append((one, quantity, _asked(len(found), one, quantity)))
    return found


def field_of(name: str, op: Op, peer: Peer) -> Field:
    """Return what a peer has of an op."""
    released = getattr(mhc_core, op.released) if op.released else mhc_core.DEEPSEEK_V4
    return Field(name, cast("Variant", released), op.fixed, op.free, peer.sizes)


def _asked(number: int, one: Golden, quantity: str) -> Asked:
    static = {
        name: plain(value) if isinstance(value, Variant) else value
        for name, value in one.case.options.items()
    }
    return Asked(
        number,
        one.case.op,
        quantity,
        tuple(one.case.names),
        tuple(map(to_wire, one.primals)),
        tuple(map(to_wire, one.cotangents)),
        static,
    )


def plain(variant: Variant) -> dict[str, Any]:
    """Return a variant's fields, for a process without mhc-core."""
    return asdict(variant)


# --- asking -----------------------------------------------------------------------------------


def run(plan: Plan, began: Callable[[str], None] = lambda what: None) -> Iterator[Ran]:
    """Yield each peer's verdicts as it is done; the families of a project share a process."""
    for family in _families(plan.peers()):
        began(family[0].project)
        asked = {peer.name: questions(peer, plan) for peer in family}
        alone = {name: [one for _, _, one in group] for name, group in asked.items()}
        try:
            answers = ask(family, alone, plan.checkouts or {})
        except NotRunError as reason:
            for peer in family:
                yield Ran(peer, _not_run(peer, plan, str(reason)), {}, "", str(reason))
            continue
        for peer in family:
            found, about = answers[peer.name]
            verdicts = judge(peer, plan, asked[peer.name], found)
            yield Ran(peer, verdicts, about["versions"], about["device"])


def _families(chosen: Sequence[Peer]) -> Iterator[list[Peer]]:
    """Yield the peers that share what is installed, so that it is imported once."""
    groups: dict[tuple[Any, ...], list[Peer]] = {}
    for peer in chosen:
        groups.setdefault((peer.project, peer.pins, peer.python, peer.checkout), []).append(peer)
    yield from groups.values()


def here(peer: Peer, plan: Plan) -> Ran:
    """Ask a peer in this process, which has its libraries: for tests that patch it."""
    asked = questions(peer, plan)
    found = {one.number: one for one in answer(peer, [one for _, _, one in asked])}
    return Ran(peer, judge(peer, plan, asked, found), versions(peer), device(peer))


# --- judging ----------------------------------------------------------------------------------


def judge(
    peer: Peer, plan: Plan, asked: Sequence[Question], found: Mapping[int, Found]
) -> list[Verdict]:
    """Return a verdict for every op, dtype and quantity, asked or not."""
    groups: dict[tuple[str, str, Quantity], list[Question]] = {}
    for one in asked:
        golden_case, quantity, _ = one
        key = (golden_case.case.op, golden_case.dtype, quantity)
        groups.setdefault(key, []).append(one)
    forward_held: dict[tuple[str, str], bool] = {}
    verdicts: list[Verdict] = []
    for (op, dtype, quantity), group in groups.items():
        held = forward_held.get((op, dtype), True)
        one = _judged(peer, group, found, held)
        if quantity == "forward":
            forward_held[op, dtype] = one.outcome == "holds"
        verdicts.append(one)
    return [*verdicts, *_cannot(peer, plan)]


def _judged(
    peer: Peer, group: Sequence[Question], found: Mapping[int, Found], forward_held: bool
) -> Verdict:
    first, quantity, _ = group[0]
    worst, error, where, problem, unasked = 0.0, 0.0, "", "", ""
    observed: list[Observed] = []
    for one, _, asked in group:
        answered = found[asked.number]
        if answered.unasked:
            unasked = answered.unasked
            continue
        if answered.problem:
            problem = problem or f"{one_line(safe(answered.problem))}, on {one.case.name}"
            where = where or one.case.name
            continue
        got = [from_wire(wire) for wire in answered.arrays]
        wants = one.want(quantity)
        observed.append(Observed(one, quantity, wants, got))
        for want, array in _pairs(wants, got):
            mistake = want.error(array)
            times = mistake / want.limit if want.limit else (float("inf") if mistake else 0.0)
            if times > 1 and not where:
                where = f"{want.name} of {one.case.name}"
            if times > worst:
                worst, error = times, mistake
    verdict = Verdict(
        peer.name,
        peer.project,
        first.case.op,
        first.dtype,
        quantity,
        "holds",
        error,
        worst,
        len(group),
    )
    if problem and not observed:
        return _with(verdict, outcome="not run", error=None, times=None, why=problem)
    if unasked and worst <= 1 and not problem:
        why = f"{len(observed)} of {len(group)} cases, then {unasked}"
        return _with(verdict, outcome="not run", error=None, times=None, why=why)
    if worst <= 1 and not problem:
        return verdict
    why = name_bug(observed, forward_held) if worst > 1 else ""
    return _with(verdict, outcome="off", where=where, why="; ".join(filter(None, (why, problem))))


def _with(verdict: Verdict, **changed: Any) -> Verdict:
    return Verdict(**{**asdict(verdict), **changed})


def _pairs(wants: Sequence[Want], got: Sequence[Any]) -> Iterator[tuple[Want, Any]]:
    for index, want in enumerate(wants):
        yield want, got[index] if index < len(got) else want.value[:0]


def _cannot(peer: Peer, plan: Plan) -> Iterator[Verdict]:
    """Yield what the peer cannot: ops that it lacks, dtypes that it does not take, gradients."""
    for name in math.OPS:
        op = peer.ops.get(name)
        for dtype in ("float32", "bfloat16"):
            for quantity in QUANTITIES:
                if not plan.wants(name, dtype, quantity):
                    continue
                if op is None:
                    why = peer.cannot.get(name, "it has no such op")
                elif dtype not in (op.dtypes or peer.dtypes):
                    why = f"it takes {', '.join(op.dtypes or peer.dtypes)}"
                elif quantity == "gradient" and not op.gradient:
                    why = op.note
                else:
                    continue
                yield Verdict(peer.name, peer.project, name, dtype, quantity, "cannot", why=why)


def _not_run(peer: Peer, plan: Plan, reason: str) -> list[Verdict]:
    return [
        Verdict(peer.name, peer.project, name, dtype, quantity, "not run", why=reason)
        for name, op in peer.ops.items()
        for dtype in (op.dtypes or peer.dtypes)
        for quantity in QUANTITIES
        if plan.wants(name, dtype, quantity)
    ]
