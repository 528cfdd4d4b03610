"""Bugs seeded into a peer are named, and a right peer has none.

The peer is DeepSeek's own torch reference, whose functions are replaced while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mhc_conformance import oracle
from mhc_conformance.patches import PATCHES
from mhc_conformance.tolerances import Quantity
from mhc_peers.files import load_file
from mhc_peers.registry import named
from mhc_peers.run import Plan, Verdict, here, questions

pytestmark = pytest.mark.usefixtures("tile_kernels")

Function = Callable[..., Any]
RECORDS = Path(__file__).parents[3] / "docs/records"


def verdict(op: str, dtype: str = "float32", kind: str = "forward") -> Verdict:
    """Return the verdict on one op of the peer, run in this process."""
    peer = named("tile-kernels")
    ran = here(peer, Plan((peer.name,), (op,), (dtype,), ("forward", kind)))
    return next(one for one in ran.verdicts if one.quantity == kind)


SEEDS: list[tuple[str, str, str, str, str]] = []
"""The name of each bug, its op, its dtype, its quantity, and the function that is replaced."""

WRONG: dict[int, Callable[[Function], Function]] = {}


def seed(
    name: str, function: str, op: str = "mappings", dtype: str = "float32", kind: str = "forward"
) -> Callable[[Any], Any]:
    """Register a wrong version of one of the peer's functions."""

    def register(wrong: Callable[[Function], Function]) -> Callable[[Function], Function]:
        WRONG[len(SEEDS)] = wrong
        SEEDS.append((name, op, dtype, kind, function))
        return wrong

    return register


def sinkhorn_of(change: Callable[[Any, int, float], Any]) -> Callable[[Function], Function]:
    """Return a replacement of the Sinkhorn with another one."""
    return lambda right: lambda x, repeat=10, eps=1e-6: change(x, repeat, eps)


def iterated(start: Any, repeat: int, eps: float) -> Any:
    """Return the iterations of Sinkhorn after its first pass."""
    matrix = start / (start.sum(-2, keepdim=True) + eps)
    for _ in range(repeat - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def split_of(change: Callable[..., tuple[Any, ...]]) -> Callable[[Function], Function]:
    """Return a replacement of the split into mappings, from the right one and its arguments."""
    return lambda right: lambda *arguments: change(right, *arguments)


seed("extra-pass", "sinkhorn_normalize_ref")(
    lambda right: lambda x, n, eps: (m := right(x, n, eps)) / (m.sum(-1, keepdim=True) + eps)
)
seed("exp-for-softmax", "sinkhorn_normalize_ref")(
    sinkhorn_of(lambda x, n, e: iterated((s := exp(x)) / (s.sum(-1, keepdim=True) + e), n, e))
)
seed("no-start-eps", "sinkhorn_normalize_ref")(
    sinkhorn_of(lambda x, n, eps: iterated(x.softmax(-1), n, eps))
)
seed("other-sinkhorn-iterations", "sinkhorn_normalize_ref")(
    lambda right: lambda x, n, eps: right(x, max(1, n - 1), eps)
)
seed("rounded", "sinkhorn_normalize_ref", op="sinkhorn")(
    sinkhorn_of(lambda x, n, eps: iterated((x.softmax(-1) + eps).bfloat16(), n, eps).float())
)
seed("h-res-transposed", "sinkhorn_normalize_ref")(
    lambda right: lambda x, n, eps: right(x, n, eps).transpose(-1, -2)
)
seed("wrong-axes", "sinkhorn_normalize_ref", op="sinkhorn")(
    lambda right: lambda x, n, eps: right(x.permute(2, 3, 1, 0), n, eps).permute(3, 2, 0, 1)
)
seed("no-pre-eps", "mhc_pre_split_mixes_ref")(
    split_of(lambda right, *given: right(*given[:-1], 0.0))
)
seed("other-post-scale", "mhc_pre_split_mixes_ref")(
    split_of(lambda right, *given: right(*given[:4], 1.0, given[5]))
)
seed("wrong-scale", "mhc_pre_split_mixes_ref")(
    split_of(lambda right, mixes, scale, *rest: right(mixes, scale[[0, 0, 2]], *rest))
)
seed("other-norm-eps", "mhc_pre_norm_fn_ref")(
    lambda right: lambda x, fn, weight, eps: right(x, fn, weight, 1e-5)
)


@seed("rms-over-c", "mhc_pre_norm_fn_ref")
def _over_c(right: Function) -> Function:
    def wrong(x: Any, fn: Any, weight: Any, eps: float) -> Any:
        normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return normed.flatten(2) @ fn.T

    return wrong


@seed("phi-columns", "mhc_pre_norm_fn_ref")
def _columns(right: Function) -> Function:
    def wrong(x: Any, fn: Any, weight: Any, eps: float) -> Any:
        n, C = x.shape[-2:]
        return right(x, fn.view(-1, n, C).transpose(1, 2).reshape(fn.shape), weight, eps)

    return wrong


@seed("eps-on-the-root", "mhc_pre_norm_fn_ref")
def _on_the_root(right: Function) -> Function:
    def wrong(x: Any, fn: Any, weight: Any, eps: float) -> Any:
        flat = x.flatten(2)
        return (flat @ fn.T) / (flat.square().mean(-1, keepdim=True).sqrt() + eps)

    return wrong


@seed("projection-in-tf32", "mhc_pre_norm_fn_ref")
def _in_tf32(right: Function) -> Function:
    def wrong(x: Any, fn: Any, weight: Any, eps: float) -> Any:
        def read(a: Any) -> Any:  # what a tensor core reads of a float32
            return (a.float().view(torch.int32) & ~0x1FFF).view(torch.float32)

        flat = x.flatten(2).float()
        return (read(flat) @ read(fn).T) * (flat.square().mean(-1, keepdim=True) + eps).rsqrt()

    return wrong


@seed("no-gradient-of-norm", "mhc_pre_norm_fn_ref", kind="gradient")
def _constant_norm(right: Function) -> Function:
    def wrong(x: Any, fn: Any, weight: Any, eps: float) -> Any:
        flat = x.flatten(2)
        return (flat @ fn.T) * (flat.square().mean(-1, keepdim=True) + eps).rsqrt().detach()

    return wrong


@seed("no-gradient-of-h-res", "sinkhorn_normalize_ref", kind="gradient")
def _constant_h_res(right: Function) -> Function:
    return lambda x, n, eps: right(x, n, eps).detach() + 0.0 * x


@seed("zero-gradient", "mhc_pre_split_mixes_ref", kind="gradient")
def _constant_bias(right: Function) -> Function:
    return lambda mixes, scale, base, *rest: right(mixes, scale, base.detach() + 0.0 * base, *rest)


@seed("h-res-transposed", "mhc_post_ref", op="combine", dtype="bfloat16")
def _other_way(right: Function) -> Function:
    return lambda x, residual, post, comb: right(x, residual, post, comb.transpose(-1, -2))


@seed("h-post-ignored", "mhc_post_ref", op="combine", dtype="bfloat16")
def _no_post(right: Function) -> Function:
    return lambda x, residual, post, comb: right(x, residual, torch.ones_like(post), comb)


def exp(x: Any) -> Any:
    """Return exp of the logits less the largest of each row."""
    return (x - x.amax(-1, keepdim=True)).exp()


@pytest.mark.parametrize("at", range(len(SEEDS)), ids=lambda at: f"{at}-{SEEDS[at][0]}")
def test_a_seeded_bug_is_named(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, op, dtype, kind, function = SEEDS[at]
    module = load_file("tile_kernels/torch/mhc.py")
    monkeypatch.setattr(module, function, WRONG[at](getattr(module, function)))
    found = verdict(op, dtype, kind)
    assert found.outcome == "off"
    assert found.why.split(":")[0] == name, found.why
    assert found.where


@pytest.mark.parametrize("op", ["mappings", "sinkhorn", "combine"])
def test_no_bug_is_named_for_a_right_peer(op: str) -> None:
    dtype = "bfloat16" if op == "combine" else "float32"
    for kind in ("forward", "gradient"):
        found = verdict(op, dtype, kind)
        assert (found.outcome, found.why) == ("holds", "")


def test_a_gradient_in_parts_is_named() -> None:
    """Both uses of the streams cast them, so autodiff adds two gradients that it rounded."""
    found = verdict("pre", "bfloat16", "gradient")
    assert found.outcome == "off"
    assert found.why.startswith("gradient-in-parts: ")


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "forward"), ("float32", "gradient")])
def test_tf32_is_what_liger_has_on_a_gpu(dtype: str, kind: Quantity) -> None:
    """The product in TF32, its operands truncated, gives the errors that an H200 recorded."""
    record = json.loads((RECORDS / "field-2026-11-30-h200.json").read_text())
    told = {(v["peer"], v["op"], v["dtype"], v["quantity"]): v for v in record["verdicts"]}
    suspect = next(one for one in PATCHES if one.name == "projection-in-tf32")
    assert "truncated" in suspect.what
    worst, times = 0.0, 0.0
    asked = questions(named("liger"), Plan(("liger",), ("mappings",), (dtype,), (kind,)))
    for one, _, _ in asked:
        given = one.case.asked
        with suspect.present():
            if kind == "forward":
                made = oracle.forward("mappings", one.primals, **given)
            else:
                made = oracle.gradients("mappings", one.primals, one.cotangents, **given)
        for want, array in zip(one.want(kind), made, strict=True):
            if want.error(array) / want.limit > times:
                worst, times = want.error(array), want.error(array) / want.limit
    there = told["liger", "mappings", dtype, kind]
    assert times == pytest.approx(there["times"], rel=1e-3)
    assert worst == pytest.approx(there["error"], rel=1e-3)
