"""The modules of mhc-mlx and mlx-mhc against those packages' outputs and gradients."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from golden import Arrays, Attrs, Golden, MlxOps, Ops, problems, read_index, read_subset, run

from mhc_core.mlx import ManifoldHyperConnection, MHCLayer, MHCRewire, residual_add_agg

ELSEWHERE = os.environ.get("MHC_GOLDEN")
SUBSET = Path(__file__).parents[2] / "data" / "golden"
PARAMETERS = ("H_pre_raw", "H_post_raw", "H_res_raw", "rms_weight")

Outputs = dict[str, Any]


def layer(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    module = MHCLayer(a["n"], a["C"], sinkhorn_iters=a["iters"], eps=a["eps"])
    module.train(training).update({name: p[name] for name in PARAMETERS})
    return {"out": module(p["x"])}


def rewire(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    dims = a["dims"]
    if "bits" in a:
        inner: Any = nn.QuantizedLinear(dims, dims, group_size=a["group_size"], bits=a["bits"])
        inner.update({"scales": p["q_scales"], "biases": p["q_biases"], "bias": p["bias"]})
        inner.weight = mx.array(case.arrays["in.wq"])
    else:
        inner = nn.Linear(dims, dims)
        inner.update({"weight": p["weight"], "bias": p["bias"]})
    module = MHCRewire(inner, dims, a["n"], sinkhorn_iters=a["iters"], eps=a["eps"])
    module.train(training).mhc.update({name: p[name] for name in PARAMETERS[:3]})
    return {"out": module(p["x"])}


def added(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    out, h = residual_add_agg(p["x"], p["res"], p["H_pre"])
    return {"out": out, "y_agg": h}


def connection(training: bool, p: Arrays, a: Attrs) -> ManifoldHyperConnection:
    module = ManifoldHyperConnection(a["dims"], a["n"], a["iters"])
    given = {name: array for name, array in p.items() if name.startswith("h_")}
    module.train(training).update(given)
    return module


def scaled(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    return {"x_pre": connection(training, p, a).pre_scale(p["x"])}


def combined(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    return {"out": connection(training, p, a)(p["x"], p["layer_output"])}


def block(case: Golden, training: bool, ops: Ops, p: Arrays, a: Attrs) -> Outputs:
    module = connection(training, p, a)
    y = ops.layer(module.pre_scale(p["x"]), p["W"])
    return {"out": module.post_combine(p["x"], y)}


FORMS: dict[str, Callable[..., Outputs]] = {
    "mhcmlx.layer": layer,
    "mhcmlx.rewire": rewire,
    "mhcmlx.residual_add_agg": added,
    "mlxmhc.pre_scale": scaled,
    "mlxmhc.post_combine": combined,
    "mlxmhc.block": block,
}
CASES = [
    case
    for case in (read_index(Path(ELSEWHERE)) if ELSEWHERE else read_subset(SUBSET))
    if case.variant in FORMS and case.stopped_alike() and not case.ill_conditioned_f32
]


def test_every_module_has_a_case() -> None:
    assert {case.variant for case in CASES} == set(FORMS)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_module_gives_their_numbers(case: Golden, training: bool) -> None:
    form = partial(FORMS[case.variant], case, training)
    for precision in sorted(case.precisions() - {"f64"}):
        found = run(MlxOps("mlx-compiled"), case, form, precision)
        report = problems(case, found, precision)
        assert not report, f"{case.impl['name']}, {case.formula}\n" + "\n".join(report)
