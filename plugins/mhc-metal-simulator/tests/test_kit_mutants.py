"""Wrong kernels, seen by no case of the kit before, fail ``mhc conformance mlx-metal-simulator``.

Each is seeded in a kernel's text, and checked by the default kit on the one case that is there for
it: a whole check fails if one of its cases does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import BACKEND, Fault, seeded
from mhc_conformance import Subject, check, trials
from mhc_conformance.cases import Case, cases


class Mutant(NamedTuple):
    """A wrong kernel, and the check and the case of the kit that see it."""

    fault: Fault
    kind: str
    case: str  # the beginning of its name
    dtype: str = "float32"


BLOCKS = "channels in whole blocks of 32, as in real models"
MANY_TOKENS = "whole blocks, more than 16 tokens"
WRONG = r"is off by|KernelFaultError"


def _mutant(
    kernel: str, right: str, wrong: str, op: str, kind: str, case: str, dtype: str = "float32"
) -> Mutant:
    return Mutant(Fault(kernel, case, right, wrong, WRONG, op), kind, case, dtype)


PHI = "load_within<4>(phi + (row < M ? row : M - 1) * K + at + channel, rest - channel)"
ACROSS = "load_within<4>(phi + row * K + at + channel, row < M ? rest - channel : 0)"
ROWS = "load_raw_within<4>(x + (token < end ? token : end - 1) * K, rest)"
NO_PHI = f"(Address<P>::ALIGNED ? zeros<4>() : {PHI})"
NOTHING_ACROSS = f"(Address<P>::ALIGNED ? zeros<4>() : {ACROSS})"
NO_ROWS = f"Address<P>::ALIGNED ? decltype(load_raw<4>(x)){{}} : {ROWS}"
H_RES, H_POST = "row(h_res_shape_0, token)", "row(h_post_shape_0, token)"

MUTANTS = {
    # the branch for whole blocks, which real models take
    **{
        f"phi is zeros where all is aligned, {op} {dtype}": _mutant(
            "common", PHI, NO_PHI, op, "forward", BLOCKS, dtype
        )
        for op, dtype in (("pre", "float32"), ("pre", "bfloat16"), ("head", "bfloat16"))
    },
    **{
        f"phi is zeros where all is aligned, combine_pre, {case}": _mutant(
            "common", PHI, NO_PHI, "combine_pre", "forward", case
        )
        for case in (BLOCKS, MANY_TOKENS)
    },
    "phi is zeros where all is aligned, back": _mutant(
        "common", ACROSS, NOTHING_ACROSS, "pre", "gradient", BLOCKS
    ),
    "dphi lacks channels where all is aligned": _mutant(
        "common", ROWS, NO_ROWS, "pre", "gradient", BLOCKS
    ),
    # a kernel that nothing launched
    **{
        f"project takes the wrong tokens, {dtype}": _mutant(
            "project", "store_sums(partials, first,", "store_sums(partials, first + (first > 999),",
            "mappings", "forward", "thousands of tokens, whole blocks", dtype,
        )
        for dtype in ("float32", "bfloat16")
    },
    # one mapping for all tokens beside one per token
    **{
        f"{kernel} takes one for the other, {shared} shared": _mutant(
            kernel, right, wrong, op, kind, f"{shared} shared{given} (leading (2, 3)"
        )
        for kernel, op, kind, given in (
            ("combine", "combine", "forward", ""),
            ("combine_vjp", "combine", "gradient", ""),
            ("combine_project_few", "combine_pre", "forward", ", h_pre given"),
            ("gated_combine", "gated_combine", "forward", ""),
            ("gated_combine_vjp", "gated_combine", "gradient", ""),
        )
        for right, wrong, shared in ((H_RES, H_POST, "h_post"), (H_POST, H_RES, "h_res"))
    },
    "gated_combine takes h_pre as h_post": _mutant(
        "gated_combine", "row(h_pre_shape_0, token)", H_POST, "gated_combine", "forward",
        "h_post shared (leading (2, 3)",
    ),
    "combine_vjp_wide takes h_res as h_post": _mutant(
        "combine_vjp_wide", H_RES, H_POST, "combine", "gradient", "h_post shared (leading (7,)"
    ),
    "combine_project takes h_res as h_post": _mutant(
        "combine_project", "row(h_res_shape_0, own)", "row(h_post_shape_0, own)", "combine_pre",
        "forward", "h_post shared (leading (20,)",
    ),
    # constants and roundings
    "head takes norm_eps for pre_eps": _mutant(
        "head", ") + pre_eps", ") + norm_eps", "head", "forward", "large constants, all apart"
    ),
    **{
        f"residual_add_aggregate rounds before it sums, {dtype}": _mutant(
            "residual_add_aggregate", "value(weights, i), total_i",
            "value(weights, i), load<W>(ACCESS::at(total) + at + int64_t(i) * C + c)",
            "residual_add_aggregate", "forward", "streams that cancel", dtype,
        )
        for dtype in ("bfloat16", "float16")
    },
    # NaN
    "sinkhorn_knopp floors NaN": _mutant(
        "common", "logits.at[a] <= smallest_logit() ? smallest_logit() : logits.at[a]",
        "precise::max(logits.at[a], smallest_logit())", "sinkhorn_knopp", "forward",
        "NaN in some tokens, log_space=False",
    ),
    "sinkhorn_knopp_vjp drops NaN": _mutant(
        "common", "<= smallest_logit() ? 0.0f : out.at[a]", "> smallest_logit() ? out.at[a] : 0.0f",
        "sinkhorn_knopp", "gradient", "NaN in some tokens, log_space=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_kit_sees_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]

    def alone(op: str, dtype: str = "float32", full: bool = False) -> Iterator[Case]:
        return (case for case in cases(op, dtype, full) if case.name.startswith(mutant.case))

    monkeypatch.setattr(trials, "cases", alone)
    with seeded(mutant.fault):
        subject: Any = Subject(BACKEND)
        record = check(subject, mutant.fault.op, mutant.dtype, mutant.kind)
    assert not record.passed
    assert "has no case" not in record.detail
    assert re.search(mutant.fault.shows, record.detail), record.detail
