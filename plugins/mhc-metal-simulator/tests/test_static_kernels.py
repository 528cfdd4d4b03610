"""The kernels of the static forms and of the small ops: right, few bytes moved, and guarded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import (  # noqa: E402
    BACKEND,
    BOUNDS,
    RACE,
    SIZES,
    SPACE,
    WRONG,
    Fault,
    Sizes,
    cotangents,
    cramped,
    draw,
    outputs,
    run,
    seeded,
)
from mhc_backends.kernels import launch as launches  # noqa: E402

from mhc_metal_simulator.launch import LaunchRecord  # noqa: E402

STATIC: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "contract": lambda n: [{"how": "sum"}, {"how": "mean"}],
    "expand": lambda n: [{"n": n}],
    "gated_combine": lambda n: [{}],
    "pre_scale": lambda n: [{}],
    "residual_add_aggregate": lambda n: [{}],
    "rms_norm": lambda n: [{"eps": 0.5}],
    "static_layer": lambda n: [{"eps": 0.5, "iterations": 5}],
}
"""The ops, with the static arguments to try for n streams."""


@pytest.mark.parametrize(
    ("op", "sizes", "dtype"),
    [
        ("static_layer", (3, 4, 4100), "float32"),
        ("static_layer", (3, 4, 8200), "float16"),
        ("rms_norm", (3, 1, 16392), "float32"),
        ("rms_norm", (3, 1, 32776), "float16"),
    ],
)
def test_what_registers_do_not_hold_is_read_again(
    op: str, sizes: Sizes, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "SHARES", 1)
    assert launches.launch(op, *sizes, dtype).rest
    assert launches.launch(f"{op}_vjp", *sizes, dtype).rest
    run(op, draw(op, sizes, getattr(mx, dtype)), **STATIC[op](sizes[1])[0])


def test_streams_of_two_dtypes() -> None:
    x, res, h_pre = draw("residual_add_aggregate", (3, 4, 24))
    for dtypes in ((mx.float16, mx.float32), (mx.float32, mx.bfloat16)):
        run("residual_add_aggregate", [x.astype(dtypes[0]), res.astype(dtypes[1]), h_pre])


def test_parameters_of_the_streams_dtype() -> None:
    primals = [array.astype(mx.float16) for array in draw("static_layer", (5, 4, 24))]
    run("static_layer", primals, eps=0.5, iterations=5)


# ---- launches and traffic ------------------------------------------------------------------------

T, N, C = 64, 4, 4096
STREAMS, LAYER = T * N * C * 2, T * C * 2  # bytes in bfloat16


def _records(op: str, vjp: bool) -> list[LaunchRecord]:
    primals = draw(op, (T, N, C), mx.bfloat16)
    (static, *_) = STATIC[op](N)
    given = cotangents(outputs(op, primals, "mlx-compiled", **static))
    with simulator.record() as records:
        if vjp:
            mhc.vjp(op, primals, given, **static, backend=BACKEND)
        else:
            outputs(op, primals, BACKEND, **static)
    return list(records)


@pytest.mark.parametrize(
    ("op", "vjp", "read", "written"),
    [
        ("contract", False, STREAMS, LAYER),
        ("expand", True, STREAMS, LAYER),
        ("gated_combine", False, 2 * STREAMS, STREAMS),
        ("gated_combine", True, 3 * STREAMS, 2 * STREAMS),
        ("pre_scale", False, STREAMS, STREAMS),
        ("pre_scale", True, 2 * STREAMS, STREAMS),
        ("residual_add_aggregate", False, 2 * STREAMS, STREAMS + LAYER),
        ("residual_add_aggregate", True, 3 * STREAMS + LAYER, STREAMS),
        ("rms_norm", False, LAYER, LAYER),
        ("rms_norm", True, 2 * LAYER, LAYER),
        ("static_layer", False, STREAMS, STREAMS),
        ("static_layer", True, 2 * STREAMS, STREAMS),
    ],
    ids=lambda value: {True: "vjp", False: "forward"}.get(value, value),
)
def test_traffic_is_ideal(op: str, vjp: bool, read: int, written: int) -> None:
    """Check that streams and layers, of which each access counts, are read once and written once.

    Weights and mappings, which threads share, count once per byte.
    """
    made = f"mhc_{op}" if op not in ("contract", "expand") else "mhc_aggregate"
    (launched,) = (
        record
        for record in _records(op, vjp)
        if record.kernel.startswith((f"{made}_bfloat16", f"{made}_vjp_bfloat16"))
    )
    arrays = {
        name: one
        for name, one in launched.traffic.items()
        if one.role != "metadata" and name not in ("sums", "dweight")
    }
    large = [one for one in arrays.values() if one.size >= LAYER]
    assert sum(one.loaded for one in large) == read
    assert sum(one.stored for one in large) == written
    small = [one for one in arrays.values() if one.size < LAYER]
    moved = read + written + sum(one.loaded_unique + one.stored for one in small)
    assert moved <= 1.05 * sum(one.size for one in arrays.values())


@pytest.mark.parametrize(("op", "sums"), [("static_layer", "sums"), ("rms_norm", "dweight")])
def test_sums_of_shares_are_written_once(op: str, sums: str) -> None:
    """Check that each share's row of sums is stored once; even many tokens make few shares."""
    *_, launched = (r for r in _records(op, vjp=True) if r.kernel.startswith(f"mhc_{op}_vjp"))
    traffic = launched.traffic[sums]
    assert (traffic.loaded, traffic.stored) == (0, traffic.size)
    for tokens, share in ((1, 1), (256, 1), (257, 2), (4096, 16)):
        assert launches.shares(f"{op}_vjp", tokens, N, C) == math.ceil(tokens / share)
    assert launches.shares(f"{op}_vjp", 4096, 4, 1024) == 512
    assert launches.shares(f"{op}_vjp", 10**6, 1, 8) <= 1024


# ---- seeded faults -------------------------------------------------------------------------------


def _halved(statement: str, value: str) -> str:
    """End a statement with a sum rounded to half precision."""
    return f"{{ {statement} {value} = float(half({value})); }}"


CHANNELS, TOO_FAR = "c < C; c += next_channel", "c <= C; c += next_channel"
LOADED, UNSEEN = "float(h_res[k]);\nBARRIER;", "float(h_res[k]);"
LAST, BEYOND = "if (c < C)", "if (c <= C)"
NEXT_TOKEN, NO_BARRIER = "    BARRIER;  // the next", "    // the next"
RES_ADDED = "sum = add(sum, value(res, i * N + j), gated[j]);"
TILED = "tile + c < C ? float(x"
MISPLACED = f"{WRONG}|{RACE}|misaligned"
SHARED_SUMS = "    BARRIER;\n    Floats<COUNT> sums"

FAULTS = (
    Fault("static_layer", "barrier", LOADED, UNSEEN, RACE),
    Fault("static_layer", "halves' barrier", "buffer = 1 - buffer;", "", RACE),
    Fault("static_layer", "tail", "if (c < C) {", "if (c <= C) {", BOUNDS),
    Fault(
        "static_layer", "rest's tail", "c < C; c += step", "c <= C; c += step", f"{BOUNDS}|{WRONG}"
    ),
    Fault("static_layer", "rest", "first + HELD * step : C", "first : C", WRONG),
    Fault(
        "static_layer", "index", "res[k] = float(h_res[k])", "res[k] = float(h_res[k / N])", WRONG
    ),
    Fault(
        "static_layer",
        "half sum",
        "squares.at[0] = add_squares(squares.at[0], h);",
        _halved("squares.at[0] = add_squares(squares.at[0], h);", "squares.at[0]"),
        WRONG,
    ),
    Fault("static_layer", "space", "at(x) + token", "at((const device float*)x) + token", SPACE),
    Fault("static_layer_vjp", "barrier", LOADED, UNSEEN, RACE),
    Fault("static_layer_vjp", "halves' barrier", "buffer = 1 - buffer;", "", RACE),
    Fault("static_layer_vjp", "tail", "if (c < C) {", "if (c <= C) {", BOUNDS),
    Fault("static_layer_vjp", "share's tail", "if (token != here.group_x)", "if (token > 0)", RACE),
    Fault("static_layer_vjp", "share", "own[k] = 0.0f", "own[k] = 1.0f", WRONG),
    Fault("static_layer_vjp", "index", "(SUMS + C)", "(SUMS + C - 1)", MISPLACED),
    Fault(
        "static_layer_vjp",
        "half sum",
        "dweights[k] = add(dweights[k], 1.0f, dweight);",
        "dweights[k] = add(dweights[k], 1.0f, dweight);"
        "for (int e = 0; e < W; e++) dweights[k].at[e] = float(half(dweights[k].at[e]));",
        WRONG,
    ),
    Fault(
        "static_layer_vjp",
        "space",
        "float(h_pre[k])",
        "float(((const device float*)h_pre)[k])",
        SPACE,
    ),
    Fault("static_layer_vjp_wide", "first barrier", "BARRIER;\n\n// dx_j", "// dx_j", RACE),
    Fault("static_layer_vjp_wide", "last barrier", "BARRIER;  // the", "// the", RACE),
    Fault("static_layer_vjp_wide", "tail", TILED, "tile + c <= C ? float(x", BOUNDS),
    Fault("static_layer_vjp_wide", "index", "(column - 2) * STRIDE", "0 * STRIDE", WRONG),
    Fault("static_layer_vjp_wide", "last streams", "if (i < N) own", "own", f"{BOUNDS}|{WRONG}"),
    Fault("static_layer_vjp_wide", "half sum", "+= parts[r]", "+= float(half(parts[r]))", WRONG),
    Fault(
        "static_layer_vjp_wide",
        "space",
        "float(h_pre[k])",
        "float(((const device float*)h_pre)[k])",
        f"{SPACE}|nothing",
    ),
    Fault("rms_norm", "halves' barrier", "buffer = 1 - buffer;", "", RACE, "rms_norm"),
    Fault("rms_norm", "tail", LAST, BEYOND, BOUNDS, "rms_norm"),
    Fault("rms_norm", "index", "(y) + token * C", "(y) + token", MISPLACED, "rms_norm"),
    Fault(
        "rms_norm",
        "half sum",
        "squares.at[0] = add_squares(squares.at[0], v);",
        _halved("squares.at[0] = add_squares(squares.at[0], v);", "squares.at[0]"),
        WRONG,
        "rms_norm",
    ),
    Fault(
        "rms_norm",
        "space",
        "float(eps[0])",
        "float(*(const device float*)eps)",
        SPACE,
        "rms_norm",
    ),
    Fault("rms_norm_vjp", "halves' barrier", "buffer = 1 - buffer;", "", RACE, "rms_norm"),
    Fault("rms_norm_vjp", "tail", "if (c < C) {", "if (c <= C) {", BOUNDS, "rms_norm"),
    Fault(
        "rms_norm_vjp",
        "index",
        "(dweight) + int64_t(here.group_x) * C",
        "(dweight)",
        RACE,
        "rms_norm",
    ),
    Fault(
        "rms_norm_vjp",
        "half sum",
        "norm.at[0] = add_squares(norm.at[0], v);",
        _halved("norm.at[0] = add_squares(norm.at[0], v);", "norm.at[0]"),
        WRONG,
        "rms_norm",
    ),
    Fault(
        "rms_norm_vjp",
        "space",
        "float(eps[0])",
        "float(*(const device float*)eps)",
        SPACE,
        "rms_norm",
    ),
    Fault("pre_scale", "tail", CHANNELS, TOO_FAR, f"{BOUNDS}|{WRONG}", "pre_scale"),
    Fault(
        "pre_scale", "index", "value(weights, i)", "value(weights, N - 1 - i)", WRONG, "pre_scale"
    ),
    Fault(
        "pre_scale",
        "half sum",
        "times(value(weights, i), xs.at[i])",
        "times(float(half(value(weights, i))), xs.at[i])",
        WRONG,
        "pre_scale",
    ),
    Fault(
        "pre_scale",
        "space",
        "at(h_pre",
        "at((const device float*)h_pre",
        SPACE,
        "pre_scale",
    ),
    Fault("pre_scale_vjp", "barrier", NEXT_TOKEN, NO_BARRIER, RACE, "pre_scale"),
    Fault("pre_scale_vjp", "tail", CHANNELS, TOO_FAR, f"{BOUNDS}|{WRONG}", "pre_scale"),
    Fault(
        "pre_scale_vjp", "index", "shared[i];", "shared[N - 1 - i];", f"{RACE}|{WRONG}", "pre_scale"
    ),
    Fault(
        "pre_scale_vjp",
        "half sum",
        "dweights[i] = add_dot(dweights[i], floats(raw_x.at[i]), g_i);",
        _halved("dweights[i] = add_dot(dweights[i], floats(raw_x.at[i]), g_i);", "dweights[i]"),
        WRONG,
        "pre_scale",
    ),
    Fault(
        "pre_scale_vjp",
        "space",
        "at(h_pre",
        "at((const device float*)h_pre",
        SPACE,
        "pre_scale",
    ),
    Fault("gated_combine", "tail", CHANNELS, TOO_FAR, f"{BOUNDS}|{WRONG}", "gated_combine"),
    Fault("gated_combine", "index", "res, i * N + j", "res, j * N + i", WRONG, "gated_combine"),
    Fault(
        "gated_combine",
        "half sum",
        RES_ADDED,
        f"{{ {RES_ADDED} for (int k = 0; k < W; k++) sum.at[k] = float(half(sum.at[k])); }}",
        WRONG,
        "gated_combine",
    ),
    Fault(
        "gated_combine",
        "space",
        "at(h_post",
        "at((const device float*)h_post",
        SPACE,
        "gated_combine",
    ),
    Fault(
        "gated_combine_vjp",
        "barrier",
        "BARRIER;\nconst auto p",
        "const auto p",
        RACE,
        "gated_combine",
    ),
    Fault("gated_combine_vjp", "last barrier", NEXT_TOKEN, NO_BARRIER, RACE, "gated_combine"),
    Fault("gated_combine_vjp", "tail", CHANNELS, TOO_FAR, f"{BOUNDS}|{WRONG}", "gated_combine"),
    Fault(
        "gated_combine_vjp",
        "index",
        "float(h[j * N + i])",
        "float(h[i * N + j])",
        WRONG,
        "gated_combine",
    ),
    Fault(
        "gated_combine_vjp",
        "half sum",
        "sums[i] = add_dot(sums[i], g_i, floats(raw_y.at[i]));",
        _halved("sums[i] = add_dot(sums[i], g_i, floats(raw_y.at[i]));", "sums[i]"),
        WRONG,
        "gated_combine",
    ),
    Fault(
        "gated_combine_vjp",
        "space",
        "p = ACCESS::at(h_pre",
        "p = ACCESS::at((const device float*)h_pre",
        SPACE,
        "gated_combine",
    ),
    Fault(
        "residual_add_aggregate",
        "tail",
        CHANNELS,
        TOO_FAR,
        f"{BOUNDS}|{WRONG}",
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate",
        "index",
        "(h) + token * C",
        "(h) + token",
        MISPLACED,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate",
        "half sum",
        "sum = add(sum, value(weights, i), total_i);",
        "sum = add(sum, value(weights, i), total_i);"
        "for (int k = 0; k < W; k++) sum.at[k] = float(half(sum.at[k]));",
        WRONG,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate",
        "space",
        "at(h_pre",
        "at((const device float*)h_pre",
        SPACE,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate_vjp",
        "barrier",
        NEXT_TOKEN,
        NO_BARRIER,
        RACE,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate_vjp",
        "tail",
        CHANNELS,
        TOO_FAR,
        f"{BOUNDS}|{WRONG}",
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate_vjp",
        "index",
        "(g_h) + token * C",
        "(g_h) + token",
        MISPLACED,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate_vjp",
        "half sum",
        "dweights[i] = add_dot(dweights[i], total, dh);",
        _halved("dweights[i] = add_dot(dweights[i], total, dh);", "dweights[i]"),
        WRONG,
        "residual_add_aggregate",
    ),
    Fault(
        "residual_add_aggregate_vjp",
        "space",
        "at(h_pre",
        "at((const device float*)h_pre",
        SPACE,
        "residual_add_aggregate",
    ),
    Fault(
        "common", "barrier of sums for all", SHARED_SUMS, "    Floats<COUNT> sums", RACE, "rms_norm"
    ),
    Fault(
        "common", "transposed mixing", "res[i * N + j], g.at[i]", "res[j * N + i], g.at[i]", WRONG
    ),
    Fault("common", "norm", "r * (dh.at[k] -", "r * (dh.at[k] +", WRONG, "rms_norm"),
)


def _try_everything(op: str) -> None:
    """Run an op in small groups, in those that see most first, then in one of many threads."""
    static = STATIC[op]
    with cramped():
        for sizes in reversed(SIZES):
            for shared in (False, True):
                run(op, draw(op, sizes, shared=shared), **static(sizes[1])[0])
    run(op, draw(op, (3, 4, 1032)), **static(4)[0])


@pytest.mark.parametrize("op", STATIC)
def test_nothing_is_caught_where_nothing_is_wrong(op: str) -> None:
    _try_everything(op)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    op = "static_layer" if fault.op == "combine" else fault.op
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try_everything(op)
