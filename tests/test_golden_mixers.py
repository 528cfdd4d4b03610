"""Our mixers against what the papers' own code computes, as in test_golden.py.

==========================  ====================================================================
Variant                     Our mixers and ops
==========================  ====================================================================
*.hres, sinkhorn.limit      the mixer itself
mhclite.*, kromhc.sublayer  pre (the norm's weight absorbed in phi) and combine; their norm
                            max(||x||, 1e-12) is norm_eps=1e-20, which shows only on zeros
circulant.*                 mappings, pre, combine with norm_root_eps=1e-8: it divides by
                            rms(x) + 1e-8, an option of the variant
maxtext_lite.*              mappings, pre, combine; comb is H_res transposed
==========================  ====================================================================

``MHC_GOLDEN_FAMILIES=DIR`` runs the same tests on another set: a directory with an index.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import (
    Arrays,
    Attrs,
    Form,
    Golden,
    Ops,
    Precision,
    TapeOps,
    VjpOps,
    on_host,
    problems,
    read_index,
    read_subset,
    run,
)

import mhc_core as mhc
from mhc_conformance import autodiff, oracle
from mhc_core.discovery import backend_module

ELSEWHERE = os.environ.get("MHC_GOLDEN_FAMILIES")
SUBSET = Path(__file__).parent / "data" / "mixers"


class OracleOps(TapeOps):
    """The oracle's ops, and its mixers."""

    def mix(self, name: str, logits: Any, n: int, **options: Any) -> Any:
        return oracle.MIXERS[name](logits, n, **options)


class LibraryOps(VjpOps):
    """The library's ops and mixers on a backend's arrays, each with its hand-written vjp."""

    def mix(self, name: str, logits: Any, n: int, **options: Any) -> Any:
        spec, mixer = mhc.backends()[self.backend].spec, mhc.mixers()[name]
        assert spec is not None
        assert mixer.forward is not None
        assert mixer.vjp is not None
        module = backend_module(spec)
        compiled = module.compile if self.backend == "jax" else lambda function: function
        forward, vjp = (
            compiled(partial(function, n=n, **options)) for function in (mixer.forward, mixer.vjp)
        )
        own = module.from_host(self.enter(logits.data))

        def pull(g: Any) -> Any:
            return (on_host(vjp(own, module.from_host(self.enter(np.asarray(g))))),)

        h_res = on_host(forward(own))
        return autodiff.node(name, h_res, (logits,), pull)


def _matrix(name: str) -> Form:
    """Return the form of H_res alone."""

    def form(ops: Any, p: Arrays, a: Attrs) -> dict[str, Any]:
        (logits,) = p.values()
        options = {"s": a["s"]} if "s" in a else {}
        flat = logits if logits.ndim == 2 else logits.reshape(a["T"], -1)
        return {"h_res": ops.mix(name, flat, a["n"], **options)}

    return form


def _absorbed(ops: Ops, parts: list[Any], weight: Any) -> Any:
    """Return phi from columns, with the norm's weight."""
    return ops.concatenate([part.swapaxes(0, 1) for part in parts]) * weight


def _connections(name: str) -> Form:
    """Return the form of a sublayer of mHC-lite's and KromHC's code, which share all the rest."""

    def form(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
        B, S, n, C = (a[key] for key in "BSnC")
        x = p["x"].reshape(B, n, S, C).swapaxes(1, 2)
        dynamic, static = p["dynamic_alpha_fn"], p["static_alpha"]
        columns = [dynamic[:, :n], p["dynamic_beta_fn"], dynamic[:, n:]]
        scales = [p["pre_branch_scale"], p["h_post_scale"].reshape(1), p["residual_scale"]]
        h, *mapped = ops.pre(
            x,
            _absorbed(ops, columns, p["gamma"] + 1.0),
            ops.concatenate(scales),
            ops.concatenate([static[:n], p["static_beta"], static[n:]]),
            variant=mhc.Variant(norm_eps=1e-20, mixer=name),
        )
        x_out = ops.combine(x, ops.layer(h, p["W"]), *mapped)
        return {"branch_input": h, "x_out": x_out.swapaxes(1, 2).reshape(B * n, S, C)}

    return form


def _circulant(p: Arrays, a: Attrs, ops: Ops) -> tuple[tuple[Any, ...], mhc.Variant]:
    alpha = p["alpha"].reshape(1)
    variant = mhc.Variant(
        norm_eps=0.0, norm_root_eps=1e-8, mixer="circulant", mixer_options={"gamma": a["gamma"]}
    )
    return (p["x"], p["phi"], ops.concatenate([alpha] * 3), p["b"]), variant


def _circulant_maps(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    arrays, variant = _circulant(p, a, ops)
    names = ("pre", "post", "h_res")
    return dict(zip(names, ops.mappings(*arrays, variant=variant), strict=True))


def _circulant_sublayer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    arrays, variant = _circulant(p, a, ops)
    h, *mapped = ops.pre(*arrays, variant=variant)
    return {"x_out": ops.combine(p["x"], ops.layer(h, p["W"]), *mapped)}


def _maxtext(p: Arrays, a: Attrs, ops: Ops) -> tuple[tuple[Any, ...], mhc.Variant]:
    parts = ("pre", "post", "res")
    phi = _absorbed(ops, [p[f"{part}_alpha"] for part in parts], p["norm_scale"])
    scale, bias = (
        ops.concatenate([p[f"{part}_{kind}"] for part in parts]) for kind in ("scale", "bias")
    )
    variant = mhc.Variant(norm_eps=a["norm_eps"], pre_eps=a["pre_eps"], mixer="mhc-lite")
    return (p["x"], phi, scale, bias), variant


def _maxtext_maps(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    arrays, variant = _maxtext(p, a, ops)
    h_pre, h_post, h_res = ops.mappings(*arrays, variant=variant)
    return {"pre": h_pre, "post": h_post, "comb": h_res.swapaxes(-1, -2)}


def _maxtext_sublayer(ops: Ops, p: Arrays, a: Attrs) -> dict[str, Any]:
    arrays, variant = _maxtext(p, a, ops)
    h, *mapped = ops.pre(*arrays, variant=variant)
    return {"layer_input": h, "x_out": ops.combine(p["x"], ops.layer(h, p["W"]), *mapped)}


FORMS: Mapping[str, Form] = {
    "mhclite.hres": _matrix("mhc-lite"),
    "kromhc.hres": _matrix("kromhc"),
    "gomhc.hres": _matrix("go-mhc"),
    "sinkhorn.limit": _matrix("sinkhorn-limit"),
    "mhclite.sublayer": _connections("mhc-lite"),
    "kromhc.sublayer": _connections("kromhc"),
    "circulant.maps": _circulant_maps,
    "circulant.sublayer": _circulant_sublayer,
    "maxtext_lite.maps": _maxtext_maps,
    "maxtext_lite.sublayer": _maxtext_sublayer,
}
CASES = [
    case
    for case in (read_index(Path(ELSEWHERE)) if ELSEWHERE else read_subset(SUBSET))
    if case.variant in FORMS
]
# one case of each mixer is enough in a library that compiles anew for every shape
COMPILED = ("jax", "mlx-metal-simulator")
FEW = {
    case.variant: case for case in CASES if case.attrs["n"] == 4 and case.attrs["kind"] == "rand"
}
ON_COMPILED = ("sinkhorn.limit", "gomhc.hres", "circulant.sublayer")


def _on(backend: str) -> list[Golden]:
    if ELSEWHERE or backend not in COMPILED:
        return CASES
    return [case for variant, case in FEW.items() if variant in ON_COMPILED]


def _check(ops: Ops, case: Golden, precision: Precision) -> None:
    if precision == "f32" and case.ill_conditioned_f32:
        pytest.skip("a rounding of the inputs moves the source's own result")
    report = problems(case, run(ops, case, FORMS[case.variant], precision), precision)
    assert not report, f"{case.impl['name']}, {case.formula}\n" + "\n".join(report)


def test_the_data_are_small_and_say_where_they_come_from() -> None:
    assert all({"name", "version", "file"} <= set(case.impl) for case in CASES)
    assert sum(path.stat().st_size for path in SUBSET.parent.glob("mixers.*")) < 250_000
    assert set(FORMS) == {case.variant for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_float64(case: Golden) -> None:
    for ops in (OracleOps(), LibraryOps("numpy", np.float64)):
        _check(ops, case, "f64")


@pytest.mark.parametrize("backend", ["mlx-compiled", "torch", "jax", "mlx-metal-simulator"])
def test_in_float32(backend: str) -> None:
    if find_spec({"torch": "mhc_torch"}.get(backend, "numpy")) is None:
        pytest.skip("PyTorch is a plugin's: pip install torch -e plugins/mhc-torch")
    known = mhc.backends().get(backend)
    if known is None or not known.available:
        pytest.skip(f"no {backend} here")
    for case in _on(backend):
        if not case.ill_conditioned_f32:
            _check(LibraryOps(backend, np.float32), case, "f32")


def test_torch_in_float64() -> None:
    if "torch" not in mhc.backends() or not mhc.backends()["torch"].available:
        pytest.skip("no torch here")
    for case in CASES:
        _check(LibraryOps("torch", np.float64), case, "f64")
