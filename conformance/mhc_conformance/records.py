"""The outcomes of checks: what is compared, recorded and left out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "Record", "Skip"]


@dataclass(frozen=True)
class Record:
    """The outcome of one check."""

    backend: str
    op: str
    dtype: str
    kind: str
    error: float
    tolerance: float
    passed: bool
    cases: int
    seed: int
    detail: str = ""  # of the worst comparison that failed

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON, which has no NaN: an error that is not finite becomes null."""
        record = asdict(self)
        for name in ("error", "tolerance"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        return record


@dataclass(frozen=True)
class Skip:
    """A check that a backend declares not to hold, and why."""

    backend: str
    op: str
    dtype: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A comparison of one array with the oracle's."""

    where: str
    error: float
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Return whether the comparison holds; an error that is NaN does not."""
        return not self.problem and self.error <= self.tolerance

    @property
    def says(self) -> str:
        """Return which array it is, and its problem or its error."""
        what = self.problem or f"is off by {self.error:.3g}, allowed {self.tolerance:.3g}"
        return f"{self.where} {what}"

    @property
    def badness(self) -> float:
        """Return the rank for sorting: the share of the tolerance that is used up."""
        if self.problem or math.isnan(self.error):
            return math.inf
        return self.error / self.tolerance if self.tolerance else self.error
