"""Our ops against what the released families of models compute, as in test_golden.py.

=======================  =======================================================================
Variant                  Our ops
=======================  =======================================================================
glm.*                    as v4.* with norm_eps 1e-5; glm.head is contract(how="mean")
xing.*                   mappings, pre and combine (rows first, not transposed, start "exp",
                         clamped, no pre_eps), contract(how="mean")
hyv4.*                   mappings, pre and combine without H_res, head
qwen4.*                  gated_pre, combine without H_res, gated_head
*.pre_norm, *.stack_norm rms_norm after pre
=======================  =======================================================================

``MHC_GOLDEN_FAMILIES=DIR`` runs the same tests on another set: a directory with an index.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import (
    Arrays,
    Attrs,
    Form,
    Golden,
    JaxOps,
    MlxOps,
    Ops,
    Precision,
    TapeOps,
    VjpOps,
    problems,
    read_index,
    read_subset,
    run,
)

import mhc_core as mhc

ELSEWHERE = os.environ.get("MHC_GOLDEN_FAMILIES")
SUBSET = Path(__file__).parent / "data" / "families"


def _glm(a: Attrs) -> mhc.Variant:
    return mhc.Variant(
        norm_eps=a["norm_eps"],
        pre_eps=a["hc_eps"],
        sinkhorn_iterations=a["iters"],
        sinkhorn_eps=a["hc_eps"],
        res_transposed=True,
    )


def _xing(a: Attrs) -> mhc.Variant:
    return mhc.Variant(
        norm_eps=a["norm_eps"],
        sinkhorn_iterations=a["iters"],
        sinkhorn_eps=a["hc_eps"],
        sinkhorn_first="rows",
        sinkhorn_start="exp",
        sinkhorn_clamp=tuple(a["clamp"]),
    )


def _hy_v4(a: Attrs) -> mhc.Variant:
    return mhc.Variant(
        norm_eps=a["norm_eps"],
        pre_eps=a["hc_eps"],
        post_scale=a["magnitude"],
        post_eps=a["hc_eps"],
        mixer="identity",
    )


def _weights(p: Arrays, prefix: str = "") -> tuple[Any, Any, Any]:
    return p[f"{prefix}fn"], p[f"{prefix}scale"], p[f"{prefix}base"]


class Mapped:
    """The forms of a family whose sublayers are pre, layer and combine."""

    def __init__(self, variant: Callable[[Attrs], mhc.Variant]) -> None:
        self.variant = variant

    def _stored(self, a: Attrs, h_res: Any) -> Any:
        return h_res.swapaxes(-1, -2) if self.variant(a).res_transposed else h_res

    def _comb(self, a: Attrs, h_res: Any) -> dict[str, Any]:
        return {} if h_res is None else {"comb": self._stored(a, h_res)}

    def maps(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        H_pre, H_post, H_res = ops.mappings(p["x"], *_weights(p), variant=self.variant(a))
        return {"pre": H_pre, "post": H_post} | self._comb(a, H_res)

    def pre(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        collapsed, H_post, H_res = ops.pre(p["x"], *_weights(p), variant=self.variant(a))
        return {"collapsed": collapsed, "post": H_post} | self._comb(a, H_res)

    def pre_norm(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        found = self.pre(ops, p, a)
        h = ops.rms_norm(found.pop("collapsed"), p["norm_weight"], eps=a["norm_eps"])
        return {"h": h, **found}

    def post(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        comb = self._stored(a, p["comb"]) if "comb" in p else None
        return {"x": ops.combine(p["residual"], p["y"], p["post"], comb)}

    def head(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        return {"h": ops.contract(p["x"], how="mean")}

    def stack(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        return {"x_out": self._sublayers(ops, p["x"], p, a)}

    def model(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        x = self._sublayers(ops, ops.expand(p["h0"], n=a["n"]), p, a)
        return {"h": ops.rms_norm(self._end(ops, x, p, a), p["norm_weight"], eps=a["norm_eps"])}

    def _end(self, ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
        return ops.contract(x, how="mean")

    def _sublayers(self, ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
        """Apply pre, layer and combine; the combine of one sublayer with the pre of the next."""
        variant, last = self.variant(a), a["n_sub"] - 1
        h, *mapped = ops.pre(x, *_weights(p, "p0."), variant=variant)
        for i in range(last):
            y = self._layer(ops, h, p, a, f"p{i}.")
            following = _weights(p, f"p{i + 1}.")
            x, h, _, *mapped = ops.combine_pre(x, y, *mapped, *following, variant=variant)
        return ops.combine(x, self._layer(ops, h, p, a, f"p{last}."), *mapped)

    def _layer(self, ops: Ops, h: Any, p: Arrays, a: Attrs, prefix: str) -> Any:
        weight = f"{prefix}norm_weight"
        h = ops.rms_norm(h, p[weight], eps=a["norm_eps"]) if weight in p else h
        return ops.layer(h, p[f"{prefix}W"])


class Headed(Mapped):
    """The forms of a family with a head as DeepSeek-V4's."""

    def head(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        return {"h": ops.head(p["x"], *_weights(p), variant=self.variant(a))}

    def _end(self, ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
        return ops.head(x, *_weights(p, "head."), variant=self.variant(a))


class Gated:
    """The forms of Qwen4-Exp, whose streams come side by side in the last axis."""

    def pre(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        h, H_post = self._pre(ops, self._streams(p["x"], a), p, a, "")
        return {"h": h, "inject_weights": H_post}

    def head(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        return {"h": self._head(ops, self._streams(p["x"], a), p, a, "")}

    def post(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        x = self._streams(p["residual"], a)
        return {"x": self._flat(ops.combine(x, p["y"], p["inject_weights"], None))}

    def stack(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        return {"x_out": self._flat(self._sublayers(ops, self._streams(p["x"], a), p, a))}

    def model(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        x = self._sublayers(ops, ops.expand(p["h0"], n=a["n"]), p, a)
        return {"h": self._head(ops, x, p, a, "head.")}

    def _pre(self, ops: Ops, x: Any, p: Arrays, a: Attrs, prefix: str) -> Any:
        weights = (p[f"{prefix}{name}"] for name in ("norm", "down", "up", "inject"))
        return ops.gated_pre(x, *weights, eps=a["norm_eps"])

    def _head(self, ops: Ops, x: Any, p: Arrays, a: Attrs, prefix: str) -> Any:
        weights = (p[f"{prefix}{name}"] for name in ("norm", "down", "up"))
        return ops.gated_head(x, *weights, eps=a["norm_eps"])

    def _sublayers(self, ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
        for i in range(a["n_sub"]):
            h, H_post = self._pre(ops, x, p, a, f"p{i}.")
            x = ops.combine(x, ops.layer(h, p[f"p{i}.W"]), H_post, None)
        return x

    def _streams(self, x: Any, a: Attrs) -> Any:
        return x.reshape(*x.shape[:-1], a["n"], a["C"])

    def _flat(self, x: Any) -> Any:
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _forms(family: str, forms: Any, kinds: tuple[str, ...]) -> dict[str, Form]:
    named = {kind: getattr(forms, kind.removesuffix("_norm"), None) for kind in kinds}
    if "pre_norm" in kinds:
        named["pre_norm"] = forms.pre_norm
    return {f"{family}.{kind}": form for kind, form in named.items() if form is not None}


KINDS = ("maps", "pre", "pre_norm", "post", "head", "stack", "stack_norm", "model")
FORMS: Mapping[str, Form] = {
    **_forms("glm", Mapped(_glm), KINDS),
    **_forms("xing", Mapped(_xing), tuple(kind for kind in KINDS if kind != "head")),
    **_forms("hyv4", Headed(_hy_v4), KINDS),
    **_forms("qwen4", Gated(), ("pre", "post", "head", "stack", "model")),
}

CASES = [
    case
    for case in (read_index(Path(ELSEWHERE)) if ELSEWHERE else read_subset(SUBSET))
    if case.variant in FORMS
]


def _size(case: Golden) -> int:
    return sum(array.size for array in case.arrays.values())


# the neutral maths, compiled anew for every shape: one variant of each kind of formula
ON_JAX = ("xing.pre", "hyv4.pre", "qwen4.pre")
SMALLEST = {case.variant: case for case in sorted(CASES, key=lambda case: -_size(case))}
BACKENDS = ("numpy", "mlx-compiled", "jax")
NATIVE = {"jax": JaxOps, "mlx-compiled": MlxOps}


def _on(backends: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(backend, case, id=f"{backend}-{case}")
        for backend in backends
        for case in CASES
        if backend != "jax"
        or ELSEWHERE
        or (SMALLEST[case.variant] is case and case.variant in ON_JAX)
    ]


def _check(ops: Ops, case: Golden, precision: Precision) -> None:
    if precision == "f32" and case.ill_conditioned_f32:
        pytest.skip("a rounding of the inputs moves the source's own result")
    report = problems(case, run(ops, case, FORMS[case.variant], precision), precision)
    assert not report, f"{case.impl['name']}, {case.formula}\n" + "\n".join(report)


def test_the_data_are_small_and_say_where_they_come_from() -> None:
    assert all({"name", "version", "file"} <= set(case.impl) for case in CASES)
    assert sum(path.stat().st_size for path in SUBSET.parent.glob("families.*")) < 500_000
    assert set(FORMS) == {case.variant for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracle(case: Golden) -> None:
    _check(TapeOps(), case, "f64")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numpy_in_float64(case: Golden) -> None:
    _check(VjpOps("numpy", np.float64), case, "f64")


@pytest.mark.parametrize(("backend", "case"), _on(BACKENDS))
def test_the_vjp_functions(backend: str, case: Golden) -> None:
    _check(VjpOps(backend, np.float32), case, "f32")


@pytest.mark.parametrize(("backend", "case"), _on(tuple(NATIVE)))
def test_the_autodiff_of_the_library(backend: str, case: Golden) -> None:
    _check(NATIVE[backend](backend), case, "f32")
