"""``--check``: the ops that will be timed, at their n, C and dtype, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mhc_core.cli.bench._arrays import Sizes
from mhc_core.cli.bench._rows import Row
from mhc_core.cli.bench._sides import Side

__all__ = ["Checked", "check"]

TOKENS = 16  # at most: the oracle keeps every intermediate result in float64


@dataclass(frozen=True)
class Checked:
    """One array of a result, compared at the conformance kit's tolerance."""

    backend: str
    op: str
    kind: str  # "forward" or "gradient"
    dtype: str
    what: str
    error: float
    tolerance: float
    passed: bool


def check(side: Side, rows: Sequence[Row], sizes: Sizes, seed: int) -> Iterator[Checked]:
    """Compare the ops of these rows and their vjps with the oracle, on random inputs."""
    taken = [row for row in rows if not side.refuses(row, sizes)]
    for op in dict.fromkeys(op for row in taken for op in row.ops):
        yield from _check_op(side.name, op, sizes, seed)


def _check_op(backend: str, op: str, sizes: Sizes, seed: int) -> Iterator[Checked]:
    import mhc_core
    from mhc_conformance import cases, subject
    from mhc_conformance.trials import Trial

    own = subject.Subject(backend)
    tokens = min(sizes.B * sizes.T, TOKENS)
    here = cases.Sizes((tokens,), sizes.n, sizes.C, "as it is timed")
    case = cases.Case(op, f"of seed {seed}", here, _static(op, mhc_core.DEEPSEEK_V4))
    trial = Trial(own, case, sizes.dtype, seed)
    primals, cotangents = own.take(trial.primals), own.take(trial.cotangents)
    found = [("forward", c) for c in trial.forward(trial.function(*primals))]
    pulled = own.vjp(case, primals, cotangents)
    found += [("gradient", c) for c in trial.gradients(pulled)]
    for kind, result in found:
        what = f"{result.where}{result.problem and f': {result.problem}'}"
        numbers = (float(result.error), float(result.tolerance))
        yield Checked(backend, op, kind, sizes.dtype, what, *numbers, bool(result.passed))


def _static(op: str, variant: Any) -> tuple[tuple[str, Any], ...]:
    """Return the static arguments that are timed: the defaults, and DeepSeek-V4's constants."""
    import inspect

    import mhc_core
    from mhc_core import math

    parameters = inspect.signature(getattr(mhc_core, op)).parameters
    given = {name: parameters[name].default for name in math.load(op).OP.static}
    return tuple((given | ({"variant": variant} if "variant" in given else {})).items())
