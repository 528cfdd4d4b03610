"""The layer's norm inside pre and combine_pre: held against the ops one after the other."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

import mhc_core as mhc

V, EPS = mhc.DEEPSEEK_V4, 3e-3
SIZES = T, n, C = 5, 4, 24
LIBRARIES = {"numpy": np.asarray, "jax": jnp.asarray, "mlx-compiled": mx.array}


def _drawn(library: str) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    columns = n * n + 2 * n
    shapes = {
        "x": (T, n, C), "y": (T, C), "h_post": (T, n), "h_res": (T, n, n), "phi": (columns, n * C),
        "scale": (3,), "bias": (columns,), "weight": (C,), "h_pre": (n,),
    }  # fmt: skip
    convert: Any = LIBRARIES[library]
    return {
        name: convert(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()
    }


def _close(got: Any, want: Any, allowed: float = 3e-5) -> None:
    got, want = np.array(got), np.array(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= allowed * np.abs(want).max()


@pytest.mark.parametrize("library", LIBRARIES)
def test_pre_equals_pre_and_then_the_norm(library: str) -> None:
    a = _drawn(library)
    streams = (a["x"], a["phi"], a["scale"], a["bias"])
    h, *mapped = mhc.pre(*streams, V)
    norm = {"h_norm_weight": a["weight"], "h_norm_eps": EPS}
    y, *same = mhc.pre(*streams, V, **norm)
    *again, raw = mhc.pre(*streams, V, **norm, h_raw=True)
    _close(raw, h)
    _close(y, mhc.rms_norm(h, a["weight"], EPS))
    for got, want in zip((*same, *again), (*mapped, y, *same), strict=True):
        _close(got, want)

    g, *others = (one * 0 + 0.5 for one in (y, *mapped))
    dh, dweight = mhc.vjp("rms_norm", (h, a["weight"]), g, eps=EPS)
    static: dict[str, Any] = {"variant": V, "h_norm_eps": EPS}
    for with_raw in (False, True):
        primals, through = (*streams, a["weight"]), dh + g if with_raw else dh
        want = (*mhc.vjp("pre", streams, (through, *others), variant=V), dweight)
        given = (g, *others, g if with_raw else None)
        got = mhc.vjp("pre_norm", primals, given, **static, h_raw=with_raw)
        for one, other in zip(got, want, strict=True):
            _close(one, other)


@pytest.mark.parametrize("given", [False, True], ids=["its own H_pre", "h_pre given"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_combine_pre_equals_combine_pre_and_then_the_norm(library: str, given: bool) -> None:
    a = _drawn(library)
    names = ("x", "y", "h_post", "h_res", "phi", "scale", "bias")
    arrays, h_pre = [a[name] for name in names], a["h_pre"] if given else None
    plain = mhc.combine_pre(*arrays, V, h_pre)
    norm = {"h_norm_weight": a["weight"], "h_norm_eps": EPS}
    *normed, raw = mhc.combine_pre(*arrays, V, h_pre, **norm, h_raw=True)
    assert len(mhc.combine_pre(*arrays, V, h_pre, **norm)) == len(plain) == len(normed)
    _close(raw, plain[1])
    want = [plain[0], mhc.rms_norm(plain[1], a["weight"], EPS), *plain[2:]]
    for got, other in zip(normed, want, strict=True):
        _close(got, other)

    more = (h_pre,) if given else ()
    cotangents = [one * 0 + 0.5 for one in plain]
    dh, dweight = mhc.vjp("rms_norm", (plain[1], a["weight"]), cotangents[1], eps=EPS)
    through = (cotangents[0], dh, *cotangents[2:])
    gradients = mhc.vjp("combine_pre", (*arrays, *more), through, variant=V)
    got = mhc.vjp(
        "combine_pre_norm", (*arrays, a["weight"], *more), (*cotangents, None), variant=V,
        h_norm_eps=EPS,
    )  # fmt: skip
    for one, other in zip(got, (*gradients[:7], dweight, *gradients[7:]), strict=True):
        _close(one, other)


def test_the_norm_reads_h_as_rounded() -> None:
    a = {name: array.astype(mx.bfloat16) for name, array in _drawn("mlx-compiled").items()}
    streams = (a["x"], a["phi"], a["scale"], a["bias"])
    y, *_, raw = mhc.pre(*streams, V, h_norm_weight=a["weight"], h_norm_eps=EPS, h_raw=True)
    rounded = np.array(raw.astype(mx.float32)).astype(np.float64)
    weight = np.array(a["weight"].astype(mx.float32)).astype(np.float64)
    want = rounded / np.sqrt((rounded**2).mean(axis=-1, keepdims=True) + EPS) * weight
    got = np.array(y.astype(mx.float32))
    # one rounding of a bfloat16, and not a second one of h
    assert (np.abs(got - want) <= 2**-8 * np.abs(want) + 1e-6).all()


@pytest.mark.parametrize(
    "more",
    [{"h_norm_eps": 1e-6}, {"h_raw": True}, {"h_norm_eps": 0.0, "h_raw": True}],
    ids=["eps", "raw", "both"],
)
def test_arguments_of_a_norm_without_a_weight_are_refused(more: dict[str, Any]) -> None:
    a = _drawn("numpy")
    with pytest.raises(ValueError, match="without h_norm_weight; needs the norm's weight"):
        mhc.pre(a["x"], a["phi"], a["scale"], a["bias"], V, **more)
    arrays = [a[name] for name in ("x", "y", "h_post", "h_res", "phi", "scale", "bias")]
    with pytest.raises(ValueError, match="without h_norm_weight; needs the norm's weight"):
        mhc.combine_pre(*arrays, V, **more)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"h_norm_weight": np.ones(C - 1, np.float32)},
            r"h_norm_weight has shape \(23,\); needs \(C,\)",
        ),
        ({"h_norm_weight": np.ones(C, int)}, "h_norm_weight has dtype int64"),
        ({"h_norm_weight": np.ones(C, np.float32), "h_norm_eps": -1.0}, "h_norm_eps is -1.0"),
        ({"h_norm_weight": np.ones(C, np.float32), "h_raw": 1}, "h_raw is 1; needs True or False"),
        ({"h_norm_weight": 1.0}, "h_norm_weight is a float; needs an array"),
    ],
)
def test_bad_norms_are_refused(more: dict[str, Any], says: str) -> None:
    a = _drawn("numpy")
    with pytest.raises((TypeError, ValueError), match=says):
        mhc.pre(a["x"], a["phi"], a["scale"], a["bias"], V, **more)
