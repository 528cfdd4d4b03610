"""Every op that has kernels, by its declaration: few small threadgroups, odd sizes, any address.

So each thread takes several tokens and several accesses, each share of a sum has several rows, and
each loop ends with a tail. Arrays that begin where vectors may be loaded take the access policy
``Aligned``; views that begin one element later take ``Anywhere``.
"""

from __future__ import annotations

import mlx.core as mx
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import BACKEND, cotangents, cramped, draw, moved, outputs  # noqa: E402
from mhc_backends.kernels.ops import OPS  # noqa: E402
from mhc_conformance import Subject  # noqa: E402
from mhc_conformance.cases import (  # noqa: E402
    PROJECTED,
    PROJECTED_OR_MIXED,
    STATICS,
    Case,
    Sizes,
    declaration,
)
from mhc_conformance.trials import Trial  # noqa: E402

TRIED = (  # sizes, dtype, and whether all tokens share the mappings
    (Sizes((7,), 3, 37, "an odd number of channels"), "float32", False),
    (Sizes((33,), 2, 5, "many tokens for one threadgroup"), "bfloat16", True),
    (Sizes((3,), 4, 544, "whole vectors, several for each thread"), "bfloat16", False),
    (Sizes((5,), 9, 40, "more streams than channels in a vector"), "float32", True),
)


def trial(op: str, at: int, unmixed: bool) -> Trial:
    """Return an op at one of the sizes; its static arguments take all their values in turn."""
    sizes, dtype, shared = TRIED[at]
    if unmixed:
        static = () if op == "combine" else (("variant", mhc.HY_V4),)
        absent = op.startswith("combine")
        case = Case(op, "cramped, no mixing", sizes, static, shared=shared, unmixed=absent)
        return Trial(Subject(BACKEND), case, dtype, 0)
    static = STATICS[op][at % len(STATICS[op])][1]
    if "n" in declaration(op).static:
        static = (("n", sizes.n), *static)
    return Trial(Subject(BACKEND), Case(op, "cramped", sizes, static, shared=shared), dtype, 0)


def hold_cramped(op: str, at: int, start: int, unmixed: bool = False) -> set[str]:
    """Compare an op and its vjp with the oracle, in two orders of the threads.

    Return the sides taken where a kernel chooses its access policy.
    """
    one = trial(op, at, unmixed)
    primals, cotangents = (
        tuple(moved(array, start) for array in one.subject.take(arrays))
        for arrays in (one.primals, one.cotangents)
    )
    orders = simulator.options(schedules=["forward", "reversed"])
    with cramped(), orders, simulator.record() as launches:
        compared = list(one.called(f"from element {start} on", primals, cotangents))
    wrong = [comparison.says for comparison in compared if not comparison.passed]
    assert not wrong, wrong
    took = (choice for launch in launches for choice in launch.took)
    return {side for branch, side in took if "_aligned" in branch.condition}


@pytest.mark.parametrize("at", range(len(TRIED)), ids=[one[0].why for one in TRIED])
@pytest.mark.parametrize("op", OPS)
def test_few_small_threadgroups(op: str, at: int) -> None:
    aligned, anywhere = hold_cramped(op, at, 0), hold_cramped(op, at, 1)
    if "whole vectors" in TRIED[at][0].why:
        assert aligned <= {"true"}
        assert bool(aligned) == ("false" in anywhere)


@pytest.mark.parametrize("at", [0, 2], ids=[TRIED[at][0].why for at in (0, 2)])
@pytest.mark.parametrize("op", PROJECTED_OR_MIXED)
def test_few_small_threadgroups_without_h_res(op: str, at: int) -> None:
    aligned, anywhere = hold_cramped(op, at, 0, True), hold_cramped(op, at, 1, True)
    assert "whole vectors" not in TRIED[at][0].why or (aligned <= {"true"} and "false" in anywhere)


# those with a projection have their own, and so have the gates (test_gated_kernels.py)
GATES = ("gated_pre", "gated_head")


@pytest.mark.parametrize("op", [op for op in OPS if op not in (*PROJECTED, *GATES)])
def test_a_token_does_not_depend_on_its_batch(op: str) -> None:
    T = 600
    static = dict(STATICS[op][0][1]) | ({"n": 4} if "n" in declaration(op).static else {})
    primals = draw(op, (T, 4, 1032), mx.bfloat16)
    alone = [array[:1] if array.shape[0] == T else array for array in primals]
    many = outputs(op, primals, BACKEND, **static)
    given = cotangents(many)
    ones = outputs(op, alone, BACKEND, **static)
    gradients = mhc.vjp(op, primals, given, **static, backend=BACKEND)
    ones += mhc.vjp(op, alone, [g[:1] for g in given], **static, backend=BACKEND)
    for of_many, of_one in zip([*many, *gradients], ones, strict=True):
        if of_many.shape[0] == T:  # what is not is a sum over the tokens
            assert mx.array_equal(of_many[:1], of_one)
    again = mhc.vjp(op, primals, given, **static, backend=BACKEND)
    assert all(mx.array_equal(a, b) for a, b in zip(gradients, again, strict=True))
