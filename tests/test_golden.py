"""Our ops against values and gradients that other people's implementations returned.

How each variant of the golden cases maps to our ops. H_res below is in the paper's orientation;
the sources' matrix M or comb may be its transpose.

=================================  =============================================================
Variant                            Our ops
=================================  =============================================================
sinkhorn.v4                        sinkhorn(first="rows", eps) of M; M is H_res transposed
sinkhorn.rowcol_clamp              sinkhorn(first="rows", eps=0), while no sum is under the clamp
sinkhorn.colrow_l1                 sinkhorn(first="columns", eps=0), likewise
sinkhorn.colrow_log                sinkhorn(first="columns", eps=0)
sinkhorn.rowcol_mask               sinkhorn(first="rows", eps=0), while no sum is under the mask
sinkhorn.rowcol_mask_pos           the same of log(M), for the matrices with no line under the mask
sinkhorn.rowcol_addeps             NOT REACHED: exp(L) / (sum + eps) has neither our softmax before
                                   the first division nor our eps added to its entries
sinkhorn.rowcol_log_earlystop      sinkhorn_knopp(log_space=True)
sinkhorn.rowcol_direct_earlystop   sinkhorn_knopp(log_space=False)
v4.maps, v4.pre                    mappings, pre (columns first, res_transposed); comb = H_res.T
v4.pre_normw                       pre with phi * norm_weight, as released checkpoints hold it
v4.post                            combine with H_res = comb.T
v4.head                            head
v4.stack                           pre, layer, combine; and pre, layer, combine_pre, ..., combine
v4.model                           the same between expand and head
v41.stack                          mappings, aggregate, combine; and combine_pre with h_pre given
megatron.aggregate, .post          aggregate, combine
megatron.maps, .sublayer, .model   NOT REACHED by mappings: 1 / (rms + eps) is not
                                   rsqrt(mean + eps). They agree to 1e-6, so mappings is held to
                                   the float32 tolerance; in float64, sinkhorn, aggregate,
                                   combine, expand and contract are, around Megatron's norm
liger.sublayer                     pre (rows first, not transposed, phi as [m, n*C]), combine
mhccu.static                       aggregate, rms_norm, combine around sinkhorn.rowcol_addeps
mhccu.dynamic                      mappings (H_pre, H_post), then the same
mhcmlx.layer                       static_layer
mhcmlx.rewire                      static_mappings, pre_scale, gated_combine
mhcmlx.residual_add_agg            residual_add_aggregate
mlxmhc.pre_scale                   static_mappings, pre_scale
mlxmhc.post_combine, .block        static_mappings, sinkhorn_knopp, pre_scale, gated_combine
lucid1.sublayer, lucid2.sublayer   NOT REACHED by mappings: the norm is per stream and the
                                   projection shared by the streams. sinkhorn (columns first, M is
                                   H_res transposed), aggregate and combine, around that
=================================  =============================================================

``MHC_GOLDEN=DIR`` runs the same tests on another set of cases: a directory with an index.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
from mhc_conformance import oracle

ELSEWHERE = os.environ.get("MHC_GOLDEN")
SUBSET = Path(__file__).parent / "data" / "golden"


# --- forms: Sinkhorn --------------------------------------------------------------------------


def sinkhorn_v4(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"m": ops.sinkhorn(p["logits"], iterations=a["iters"], eps=a["eps"], first="rows")}


def sinkhorn_rows_first(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"m": ops.sinkhorn(p["logits"], iterations=a["iters"], first="rows")}


def sinkhorn_columns_first(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"m": ops.sinkhorn(p["logits"], iterations=a["iters"], first="columns")}


def sinkhorn_of_positive(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    logits = ops.unary("log", p["h"])
    return {"m": ops.sinkhorn(logits, iterations=a["iters"], first="rows")}


def sinkhorn_knopp_log(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"m": _knopp(ops, p["logits"], a, log_space=True)}


def sinkhorn_knopp_direct(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"m": _knopp(ops, p["logits"], a, log_space=False)}


def _knopp(ops: Ops, logits: Any, a: Attrs, log_space: bool) -> Any:
    return ops.sinkhorn_knopp(
        logits, max_iterations=a["iters"], epsilon=a["tol"], log_space=log_space
    )


def _addeps(ops: Ops, logits: Any, iterations: int, eps: float) -> Any:
    """Return mHC.cu's Sinkhorn, which none of our ops computes: the ops around it are tested."""
    matrix = ops.unary("exp", logits)
    for _ in range(iterations):
        matrix = matrix / (ops.total(matrix, -1) + eps)
        matrix = matrix / (ops.total(matrix, -2) + eps)
    return matrix


# --- forms: DeepSeek --------------------------------------------------------------------------


def _v4(a: Attrs) -> mhc.Variant:
    return mhc.Variant(
        norm_eps=a["norm_eps"],
        pre_eps=a["hc_eps"],
        post_scale=a.get("post_mult", 2.0),
        sinkhorn_iterations=a["iters"],
        sinkhorn_eps=a["hc_eps"],
        sinkhorn_first="columns",
        res_transposed=True,
    )


def _weights(p: Arrays, prefix: str = "") -> tuple[Any, Any, Any]:
    return p[f"{prefix}fn"], p[f"{prefix}scale"], p[f"{prefix}base"]


def v4_maps(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    H_pre, H_post, H_res = ops.mappings(p["x"], *_weights(p), variant=_v4(a))
    return {"pre": H_pre, "post": H_post, "comb": H_res.swapaxes(-1, -2)}


def v4_pre(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    fn, scale, base = _weights(p)
    fn = fn * p["norm_weight"] if "norm_weight" in p else fn
    h, H_post, H_res = ops.pre(p["x"], fn, scale, base, variant=_v4(a))
    return {"collapsed": h, "post": H_post, "comb": H_res.swapaxes(-1, -2)}


def v4_post(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"x": ops.combine(p["residual"], p["y"], p["post"], p["comb"].swapaxes(-1, -2))}


def v4_head(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"h": ops.head(p["x"], *_weights(p), variant=_v4(a))}


def _v4_sublayers(ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
    for i in range(a["n_sub"]):
        h, H_post, H_res = ops.pre(x, *_weights(p, f"p{i}."), variant=_v4(a))
        x = ops.combine(x, ops.layer(h, p[f"p{i}.W"]), H_post, H_res)
    return x


def _v4_sublayers_fused(ops: Ops, x: Any, p: Arrays, a: Attrs) -> Any:
    last = a["n_sub"] - 1
    h, H_post, H_res = ops.pre(x, *_weights(p, "p0."), variant=_v4(a))
    for i in range(last):
        y = ops.layer(h, p[f"p{i}.W"])
        following = _weights(p, f"p{i + 1}.")
        x, h, _, H_post, H_res = ops.combine_pre(x, y, H_post, H_res, *following, variant=_v4(a))
    return ops.combine(x, ops.layer(h, p[f"p{last}.W"]), H_post, H_res)


def v4_stack(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"x_out": _v4_sublayers(ops, p["x"], p, a)}


def v4_stack_fused(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"x_out": _v4_sublayers_fused(ops, p["x"], p, a)}


def v4_model(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    x = _v4_sublayers(ops, ops.expand(p["h0"], n=a["n"]), p, a)
    return {"h": ops.head(x, *_weights(p, "head."), variant=_v4(a))}


def v4_model_fused(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    x = _v4_sublayers_fused(ops, ops.expand(p["h0"], n=a["n"]), p, a)
    return {"h": ops.head(x, *_weights(p, "head."), variant=_v4(a))}


def v41_stack(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    x = ops.expand(p["h0"], n=a["n"])
    mix = ops.one_hot(x.shape[:-1], x)
    for i in range(a["n_sub"]):
        following, H_post, H_res = ops.mappings(x, *_weights(p, f"p{i}."), variant=_v4(a))
        x = ops.combine(x, ops.layer(ops.aggregate(x, mix), p[f"p{i}.W"]), H_post, H_res)
        mix = following
    return {"streams": x, "pre_mix": mix, "out": ops.aggregate(x, mix)}


def v41_stack_fused(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    last, variant = a["n_sub"] - 1, _v4(a)
    x = ops.expand(p["h0"], n=a["n"])
    h = ops.aggregate(x, ops.one_hot(x.shape[:-1], x))
    mix, H_post, H_res = ops.mappings(x, *_weights(p, "p0."), variant=variant)
    for i in range(last):
        y = ops.layer(h, p[f"p{i}.W"])
        following = _weights(p, f"p{i + 1}.")
        x, h, mix, H_post, H_res = ops.combine_pre(
            x, y, H_post, H_res, *following, variant=variant, h_pre=mix
        )
    x = ops.combine(x, ops.layer(h, p[f"p{last}.W"]), H_post, H_res)
    return {"streams": x, "pre_mix": mix, "out": ops.aggregate(x, mix)}


# --- forms: Megatron-LM and Liger -------------------------------------------------------------


def _streams(x: Any, n: int) -> Any:
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


def _megatron_weights(ops: Ops, p: Arrays, prefix: str) -> tuple[Any, Any, Any]:
    scale = ops.concatenate([p[f"{prefix}alpha_{part}"] for part in ("pre", "post", "res")])
    return p[f"{prefix}weight"], scale, p[f"{prefix}bias"]


def _megatron_mappings(ops: Ops, x: Any, p: Arrays, a: Attrs, prefix: str = "") -> Any:
    """Return mappings with Megatron's eps inside the root: 1e-6 away."""
    variant = mhc.Variant(
        norm_eps=a["norm_eps"], sinkhorn_iterations=a["iters"], sinkhorn_first="rows"
    )
    return ops.mappings(x, *_megatron_weights(ops, p, prefix), variant=variant)


def _megatron_exact(ops: Ops, x: Any, p: Arrays, a: Attrs, prefix: str = "") -> Any:
    """Return Megatron's norm and projection, and our sinkhorn."""
    n = a["n"]
    weight, scale, bias = _megatron_weights(ops, p, prefix)
    flat = x.reshape(*x.shape[:-2], weight.shape[1])
    mean = ops.total(flat * flat, -1) / weight.shape[1]
    z = (flat @ weight.swapaxes(0, 1)) / (ops.power(mean, 0.5) + a["norm_eps"])
    z_pre = z[..., :n] * scale[0] + bias[:n]
    z_post = z[..., n : 2 * n] * scale[1] + bias[n : 2 * n]
    z_res = z[..., 2 * n :] * scale[2] + bias[2 * n :]
    logits = z_res.reshape(*z_res.shape[:-1], n, n)
    H_res = ops.sinkhorn(logits, iterations=a["iters"], first="rows")
    return ops.unary("sigmoid", z_pre), ops.unary("sigmoid", z_post) * 2.0, H_res


class Megatron:
    """The forms that need Megatron's mappings, for one way to compute those."""

    def __init__(self, mappings: Any) -> None:
        self.mappings = mappings

    def maps(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        found = self.mappings(ops, _streams(p["x"], a["n"]), p, a)
        return dict(zip(("h_pre", "h_post", "h_res"), found, strict=True))

    def sublayer(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        x = self._one(ops, _streams(p["x"], a["n"]), p, a, "")
        return {"x_out": x.reshape(*p["x"].shape)}

    def model(self, ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        x = ops.expand(p["h0"], n=a["n"])
        for i in range(a["n_sub"]):
            x = self._one(ops, x, p, a, f"p{i}.")
        return {"h": ops.contract(x, how="mean")}

    def _one(self, ops: Ops, x: Any, p: Arrays, a: Attrs, prefix: str) -> Any:
        H_pre, H_post, H_res = self.mappings(ops, x, p, a, prefix)
        y = ops.layer(ops.aggregate(x, H_pre), p[f"{prefix}W"])
        return ops.combine(x, _biased(y, p), H_post, H_res)


def _biased(y: Any, p: Arrays) -> Any:
    return y + p["y_bias"] if "y_bias" in p else y


def megatron_aggregate(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"h": ops.aggregate(_streams(p["x"], a["n"]), p["h_pre"])}


def megatron_post(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    residual = _streams(p["residual"], a["n"])
    x = ops.combine(residual, _biased(p["y"], p), p["h_post"], p["h_res"])
    return {"x": x.reshape(*p["residual"].shape)}


def liger_sublayer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    variant = mhc.Variant(
        norm_eps=a["rms_eps"],
        pre_eps=a["pre_eps"],
        post_scale=a["post_mult"],
        sinkhorn_iterations=a["iters"],
        sinkhorn_eps=a["sinkhorn_eps"],
        sinkhorn_first="rows",
    )
    alphas = [p[f"alpha_{part}"].reshape(1) for part in ("pre", "post", "res")]
    phi = p["phi"].swapaxes(0, 1)
    h, H_post, H_res = ops.pre(p["x"], phi, ops.concatenate(alphas), p["b"], variant=variant)
    return {"x_out": ops.combine(p["x"], ops.layer(h, p["W"]), H_post, H_res)}


# --- forms: mHC.cu, mhc-mlx, mlx-mhc ----------------------------------------------------------


def mhccu_static(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    H_pre, H_post, _ = ops.static_mappings(p["H_pre"], p["H_post"], p["H_res"])
    H_res = _addeps(ops, p["H_res"], a["iters"], a["eps"])
    return {"out": _mhccu_streams(ops, p, a, H_pre, H_post, H_res)}


def _mhccu_streams(ops: Ops, p: Arrays, a: Attrs, H_pre: Any, H_post: Any, H_res: Any) -> Any:
    y = ops.rms_norm(ops.aggregate(p["x"], H_pre), p["rms_weight"], eps=a["eps"])
    return ops.combine(p["x"], y, H_post, H_res)


def mhccu_dynamic(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    x, n = p["x"], a["n"]
    parts = ("pre", "post", "res")
    phi = ops.concatenate([p[f"phi_{part}"] for part in parts])
    scale = ops.concatenate([p[f"alpha_{part}"].reshape(1) for part in parts])
    bias = ops.concatenate([p["b_pre"], p["b_post"], p["b_res"].reshape(n * n)])
    variant = mhc.Variant(norm_eps=a["eps"], sinkhorn_iterations=1, sinkhorn_first="rows")
    H_pre, H_post, _ = ops.mappings(x, phi, scale, bias, variant=variant)
    flat = x.reshape(*x.shape[:-2], phi.shape[1])
    r = ops.power(ops.total(flat * flat, -1) / phi.shape[1] + a["eps"], -0.5)
    z = flat @ p["phi_res"].swapaxes(0, 1) * r * p["alpha_res"]
    logits = z.reshape(*z.shape[:-1], n, n) + p["b_res"]
    H_res = _addeps(ops, logits, a["iters"], a["eps"])
    return {"out": _mhccu_streams(ops, p, a, H_pre, H_post, H_res)}


def mhcmlx_layer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    raw = (p["H_pre_raw"], p["H_post_raw"], p["H_res_raw"], p["rms_weight"])
    return {"out": ops.static_layer(p["x"], *raw, eps=a["eps"], iterations=a["iters"])}


def mhcmlx_rewire(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    H = ops.static_mappings(p["H_pre_raw"], p["H_post_raw"], p["H_res_raw"], iterations=a["iters"])
    weight = p["dequantized_weight"] if "dequantized_weight" in p else p["weight"]
    y = ops.pre_scale(p["x"], H[0]) @ weight.swapaxes(0, 1) + p["bias"]
    return {"out": ops.gated_combine(p["x"], y, *H)}


def mhcmlx_residual_add_agg(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    out, collapsed = ops.residual_add_aggregate(p["x"], p["res"], p["H_pre"])
    return {"out": out, "y_agg": collapsed}


def _mlxmhc_gate(ops: Ops, p: Arrays, which: str) -> Any:
    raw = p[f"h_{which}_raw"] + p[f"h_{which}_bias"]
    square = raw[..., None] * raw
    gates = ops.static_mappings(raw, raw, square, iterations=1)
    return gates[0] if which == "pre" else gates[1]


def mlxmhc_pre_scale(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"x_pre": ops.pre_scale(p["x"], _mlxmhc_gate(ops, p, "pre"))}


def mlxmhc_post_combine(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    return {"out": _mlxmhc_combine(ops, p, a, p["layer_output"])}


def mlxmhc_block(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    h = ops.pre_scale(p["x"], _mlxmhc_gate(ops, p, "pre"))
    return {"out": _mlxmhc_combine(ops, p, a, ops.layer(h, p["W"]))}


def _mlxmhc_combine(ops: Ops, p: Arrays, a: Attrs, y: Any) -> Any:
    H_res = _knopp(ops, p["h_res_raw"], a, log_space=True)
    gates = _mlxmhc_gate(ops, p, "pre"), _mlxmhc_gate(ops, p, "post")
    return ops.gated_combine(p["x"], y, *gates, H_res)


# --- forms: hyper-connections -----------------------------------------------------------------


def _lucid(ops: Ops, x: Any, p: Arrays, a: Attrs) -> tuple[Any, Any, Any, Any]:
    """Return branch input, mixed streams, beta ``[..., n]`` and x_out; x is ``[..., n, C]``."""
    n, C = x.shape[-2:]
    norm = ops.power(ops.total(x * x, -1), 0.5)
    xn = x / norm * C**0.5 * (p["gamma"] + 1.0)
    wc = xn @ p["dynamic_alpha_fn"][0]
    static = p["static_alpha"]
    h_pre = wc[..., 0] * p["pre_branch_scale"] + static[:, 0]
    logits = wc[..., 1:] * p["residual_scale"] + static[:, 1:]
    beta = (xn @ p["dynamic_beta_fn"].reshape(C, 1))[..., 0]
    beta = beta * p["h_post_scale"] + p["static_beta"].reshape(n)
    H_pre, H_post = ops.unary("sigmoid", h_pre), ops.unary("sigmoid", beta) * 2.0
    H_res = ops.sinkhorn(logits, iterations=a["iters"], first="columns").swapaxes(-1, -2)
    h = ops.aggregate(x, H_pre)
    nothing = h * 0.0
    mixed = ops.combine(x, nothing, H_post, H_res)
    return h, mixed, H_post, ops.combine(x, ops.layer(h, p["W"]), H_post, H_res)


def lucid2_sublayer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    h, mixed, beta, x_out = _lucid(ops, p["x"], p, a)
    return {
        "branch_input": h,
        "mixed": mixed,
        "beta": beta.reshape(*beta.shape, 1, 1),
        "x_out": x_out,
    }


def lucid1_sublayer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    """Return the sublayer's outputs; the streams come folded into the batch, ``[(b s), S, C]``."""
    n = a["n"]
    folded = p["x"]
    size, length, C = folded.shape
    x = folded.reshape(size // n, n, length, C).swapaxes(1, 2)
    h, mixed, beta, x_out = _lucid(ops, x, p, a)

    def fold(streams: Any) -> Any:
        return streams.swapaxes(1, 2).reshape(size, length, C)

    return {
        "branch_input": h,
        "mixed": fold(mixed),
        "beta": beta.reshape(*beta.shape[:-1], 1, n, 1),
        "x_out": fold(x_out),
    }


MAPPINGS, EXACT = Megatron(_megatron_mappings), Megatron(_megatron_exact)
FORMS: Mapping[str, Mapping[str, Form]] = {
    "sinkhorn.v4": {"": sinkhorn_v4},
    "sinkhorn.rowcol_clamp": {"": sinkhorn_rows_first},
    "sinkhorn.colrow_l1": {"": sinkhorn_columns_first},
    "sinkhorn.colrow_log": {"": sinkhorn_columns_first},
    "sinkhorn.rowcol_mask": {"": sinkhorn_rows_first},
    "sinkhorn.rowcol_mask_pos": {"": sinkhorn_of_positive},
    "sinkhorn.rowcol_addeps": {},
    "sinkhorn.rowcol_log_earlystop": {"": sinkhorn_knopp_log},
    "sinkhorn.rowcol_direct_earlystop": {"": sinkhorn_knopp_direct},
    "v4.maps": {"": v4_maps},
    "v4.pre": {"": v4_pre},
    "v4.pre_normw": {"": v4_pre},
    "v4.post": {"": v4_post},
    "v4.head": {"": v4_head},
    "v4.stack": {"": v4_stack, "fused": v4_stack_fused},
    "v4.model": {"": v4_model, "fused": v4_model_fused},
    "v41.stack": {"": v41_stack, "fused": v41_stack_fused},
    "megatron.maps": {"": EXACT.maps, "near": MAPPINGS.maps},
    "megatron.sublayer": {"": EXACT.sublayer, "near": MAPPINGS.sublayer},
    "megatron.model": {"": EXACT.model, "near": MAPPINGS.model},
    "megatron.aggregate": {"": megatron_aggregate},
    "megatron.post": {"": megatron_post},
    "liger.sublayer": {"": liger_sublayer},
    "mhccu.static": {"": mhccu_static},
    "mhccu.dynamic": {"": mhccu_dynamic},
    "mhcmlx.layer": {"": mhcmlx_layer},
    "mhcmlx.rewire": {"": mhcmlx_rewire},
    "mhcmlx.residual_add_agg": {"": mhcmlx_residual_add_agg},
    "mlxmhc.pre_scale": {"": mlxmhc_pre_scale},
    "mlxmhc.post_combine": {"": mlxmhc_post_combine},
    "mlxmhc.block": {"": mlxmhc_block},
    "lucid1.sublayer": {"": lucid1_sublayer},
    "lucid2.sublayer": {"": lucid2_sublayer},
}


# --- the tests --------------------------------------------------------------------------------

CASES = read_index(Path(ELSEWHERE)) if ELSEWHERE else read_subset(SUBSET)


class Checked(NamedTuple):
    """One case, computed in one way and checked to the tolerance of one precision."""

    case: Golden
    label: str
    computed: Precision
    held: Precision

    def __str__(self) -> str:
        return "-".join(part for part in (self.case.id, self.label, f"in-{self.computed}") if part)


def _checked(precision: Precision) -> list[Checked]:
    """Return every case and form, computed in a precision, with the closest tolerance it has."""
    return [
        Checked(case, label, precision, held)
        for case in CASES
        for label in FORMS[case.variant]
        if (held := _held(case, label, precision)) is not None
    ]


def _held(case: Golden, label: str, computed: Precision) -> Precision | None:
    order: tuple[Precision, ...] = ("f64", "f32", "bf16")
    given = case.precisions()
    if label == "near":  # right to 1e-6, so the float64 tolerance is out of reach
        given -= {"f64"}
    if computed == "f64":
        return next(p for p in order if p in given)
    if computed not in given or (computed == "f32" and _moves_in_f32(case)):
        return None
    return computed


def _moves_in_f32(case: Golden) -> bool:
    return case.ill_conditioned_f32 or not case.stopped_alike()


def _check(ops: Ops, checked: Checked) -> None:
    case, label, computed, held = checked
    if not all(array.shape[0] for array in case.arrays.values() if array.ndim):
        pytest.skip("the source's clamp acts in every matrix of the case")
    found = run(ops, case, FORMS[case.variant][label], computed)
    report = problems(case, found, held)
    assert not report, f"{case.impl['name']}, {case.formula}\n" + "\n".join(report)


def _smallest(checks: list[Checked]) -> list[Checked]:
    """Return the smallest case of each variant, form and precision."""
    chosen: dict[tuple[str, str, str], Checked] = {}
    for checked in sorted(checks, key=lambda c: sum(a.size for a in c.case.arrays.values())):
        chosen.setdefault((checked.case.variant, checked.label, checked.computed), checked)
    return list(chosen.values())


F64 = _checked("f64")
NARROW = _checked("f32") + _checked("bf16")
NATIVE = {"jax": JaxOps, "mlx-compiled": MlxOps}
# JAX compiles every op anew for every shape, which takes seconds a case. What it computes is the
# neutral maths, which NumPy and MLX run in every case; so it runs the smallest of each kind.
ON_BACKENDS = [
    pytest.param(backend, checked, id=f"{backend}-{checked}")
    for backend in ("numpy", "jax", "mlx-compiled")
    for checked in (_smallest(NARROW) if backend == "jax" and not ELSEWHERE else NARROW)
]


def test_every_variant_has_its_line() -> None:
    table = __doc__ or ""
    for variant in FORMS:
        group, name = variant.split(".")
        assert f"{group}." in table, variant
        assert f".{name}" in table, variant
    assert {case.variant for case in CASES} <= set(FORMS)


def test_every_case_says_where_it_comes_from() -> None:
    assert all(case.formula and case.precisions() for case in CASES)
    assert all({"name", "version", "file"} <= set(case.impl) for case in CASES)
    assert sum(path.stat().st_size for path in SUBSET.parent.glob("golden.*")) < 1_000_000


@pytest.mark.parametrize("checked", F64, ids=str)
def test_the_oracle(checked: Checked) -> None:
    _check(TapeOps(), checked)


@pytest.mark.parametrize("checked", F64, ids=str)
def test_numpy_in_float64(checked: Checked) -> None:
    _check(VjpOps("numpy", np.float64), checked)


@pytest.mark.parametrize(("backend", "checked"), ON_BACKENDS)
def test_the_vjp_functions(backend: str, checked: Checked) -> None:
    _check(VjpOps(backend, np.float32), checked)


@pytest.mark.parametrize(
    ("backend", "checked"), [each for each in ON_BACKENDS if each.values[0] in NATIVE]
)
def test_the_autodiff_of_the_library(backend: str, checked: Checked) -> None:
    _check(NATIVE[backend](backend), checked)


def _broken(op: str) -> Any:
    """Return the oracle with one op off by a part in a hundred thousand."""

    class Broken(TapeOps):
        def call(self, name: str, *arrays: Any, **static: Any) -> Any:
            result = super().call(name, *arrays, **static)
            if name != op:
                return result
            parts = result if isinstance(result, tuple) else (result,)
            bent = tuple(part * (1.0 + 1e-5) for part in parts)
            return bent if isinstance(result, tuple) else bent[0]

    return Broken()


def _ops_with_values() -> list[str]:
    """Return the ops that the forms above call."""
    called = re.findall(r"\bops\.(\w+)\(", Path(__file__).read_text(encoding="utf-8"))
    return sorted(set(called) & set(oracle.OPS))


def test_the_ops_of_the_paper_and_of_both_packages_have_values() -> None:
    assert len(_ops_with_values()) >= 16


@pytest.mark.parametrize("op", _ops_with_values())
def test_a_wrong_op_is_noticed(op: str) -> None:
    def fails(checked: Checked) -> bool:
        case = checked.case
        found = run(_broken(op), case, FORMS[case.variant][checked.label], "f64")
        return bool(problems(case, found, checked.held))

    assert any(fails(checked) for checked in F64 if checked.held == "f64")
