"""The norm inside pre: the same bits as the norm after it, no pass over h, and guarded kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mhc_core as mhc
import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import (
    BOUNDS,
    RACE,
    SPACE,
    WRONG,
    Fault,
    agree,
    as_float64,
    cotangents,
    rounded,
    seeded,
)
from mhc_backends.kernels.ops import pre_norm
from mhc_core.mlx import HyperConnectedBlock
from mlx import nn
from test_projection_kernels import FEWEST, KERNELS, MANY, Size, small

import mhc_metal_simulator as simulator
from mhc_metal_simulator.backend import SPEC
from mhc_metal_simulator.launch import LaunchRecord, record
from mhc_metal_simulator.traffic import kernel_of

N, V, EPS = 4, mhc.DEEPSEEK_V4, 1e-6


def _drawn(T: int, C: int, dtype: Any, variant: mhc.Variant = V) -> tuple[list[mx.array], mx.array]:
    rng = np.random.default_rng(3)
    columns = variant.columns(N)
    shapes = ((T, N, C), (columns, N * C), (variant.parts(N),), (columns,), (C,))
    x, *more = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes)
    return [x.astype(dtype), *more[:3]], more[3]


def _same(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other))


@pytest.mark.parametrize(
    ("T", "C", "dtype", "variant"),
    [
        (3, 264, mx.bfloat16, V),
        (3, 38, mx.bfloat16, V),
        (70, 37, mx.float16, V),
        (3, 2056, mx.float32, V),
        (515, 32, mx.bfloat16, V),
        (3, 2056, mx.bfloat16, mhc.HY_V4),
        (70, 37, mx.float32, mhc.HY_V4),
    ],
)
def test_it_has_the_bits_of_the_norm_after(
    T: int, C: int, dtype: Any, variant: mhc.Variant
) -> None:
    arrays, weight = _drawn(T, C, dtype, variant)
    norm: dict[str, Any] = {"h_norm_weight": weight, "h_norm_eps": EPS}
    with mhc.use_backend(SPEC.name):
        h, *mapped = mhc.pre(*arrays, variant)
        with record() as launches:
            y, *same, raw = mhc.pre(*arrays, variant, **norm, h_raw=True)
        after = mhc.rms_norm(h, weight, EPS)
        alone, *_ = mhc.pre(arrays[0][1:2], *arrays[1:], variant, **norm)
    assert len(launches) == 2
    assert _same(raw, h)
    assert _same(y, after)
    mixes = variant.mixes  # else the last of them is None
    assert all(map(_same, same[: 1 + mixes], mapped))
    assert _same(alone[0], y[1])  # a token does not depend on its batch


def _launched(arrays: list[mx.array], weight: mx.array) -> tuple[list[LaunchRecord], ...]:
    def normed(*given: mx.array) -> list[mx.array]:
        *streams, w = given
        return list(mhc.pre(*streams, V, h_norm_weight=w, h_norm_eps=EPS, backend=SPEC.name))

    primals = [*arrays, weight]
    with record() as forward:
        outputs = normed(*primals)
    with record() as both:
        mx.vjp(normed, primals, [mx.ones_like(one) for one in outputs])
    return forward, both[len(forward) :]


@pytest.mark.parametrize("T", [3, 70])
def test_no_launch_reads_h(T: int) -> None:
    arrays, weight = _drawn(T, 264, mx.bfloat16)
    forward, back = _launched(arrays, weight)
    with record() as plain:
        mhc.pre(*arrays, V, backend=SPEC.name)
    assert len(forward) == len(plain) == 2  # a launch less than pre and rms_norm
    streams, layer = arrays[0].nbytes, arrays[0].nbytes // N
    last = forward[-1]
    assert kernel_of(last).startswith("pre_norm")
    assert last.traffic["x"].loaded == streams
    assert last.traffic["y"].stored == layer
    assert "h" not in last.traffic  # nobody asked for it
    assert last.traffic["y"].loaded == 0
    names = [kernel_of(one) for one in back]
    assert "rms_norm_vjp" not in names
    assert "weights_vjp" not in names
    through = back[names.index("weights_norm_vjp")]
    assert through.traffic["x"].loaded == streams
    assert through.traffic["g"].loaded == layer
    assert not any("h" in one.traffic for one in back)


def test_a_block_launches_nothing_for_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, weight = _drawn(3, 264, mx.bfloat16)
    block = HyperConnectedBlock(nn.Linear(264, 264), 264, N, V, nn.RMSNorm(264, EPS)).eval()
    block.set_dtype(mx.bfloat16)
    block.norm.weight, x = weight.astype(mx.bfloat16), arrays[0]
    expected = block(x)
    calls: list[mx.array] = []
    monkeypatch.setattr(nn.RMSNorm, "__call__", lambda norm, h: calls.append(h))
    with record() as launches, mhc.use_backend(SPEC.name):
        got = block(x)
        mx.eval(got)
    assert not calls
    kernels = [kernel_of(launch).partition("_k_blocks")[0] for launch in launches]
    assert len(kernels) == 3
    assert kernels[1:] == ["pre_norm", "combine"]  # after the projection
    assert mx.abs(got - expected).max() < 2**-6 * mx.abs(expected).max()


# ---- each kernel by itself -----------------------------------------------------------------------

MIXED = replace(mhc.PAPER, norm_eps=1e-3, sinkhorn_iterations=3)
UNMIXED = replace(mhc.HY_V4, norm_eps=1e-3, pre_eps=0.2, post_scale=1.5, post_eps=0.3)


def _present(arrays: Sequence[Any]) -> list[Any]:
    return [one for one in arrays if one is not None]


def _held(variant: mhc.Variant, size: Size, busy: int) -> list[mx.array]:
    """Run the op, what its vjp saves, and the vjp; compare with NumPy in float64."""
    T, n, C, _ = size
    rng = np.random.default_rng(n)
    m, parts = variant.columns(n), variant.parts(n)
    shapes = ((T, n, C), (m, n * C), (parts,), (m,), (C,))
    x, phi, *rest = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes)
    primals = (x, phi / (2 * n * C) ** 0.5, *rest)
    static: dict[str, Any] = {"variant": variant, "h_norm_eps": 0.3, "h_raw": True}
    with small(busy), simulator.options(schedules=["forward", "reversed"]):
        outputs, saved = pre_norm.forward_with_saved(KERNELS, *primals, **static)
        given = iter(cotangents(_present(outputs)))
        every = tuple(None if one is None else next(given) for one in outputs)
        pulled = list(pre_norm.vjp(KERNELS, primals, every, saved, **static))
    wide = as_float64(list(primals))
    wide_given = tuple(None if one is None else as_float64([one])[0] for one in every)
    made = _present(outputs)
    truth: Any = mhc.pre_norm(*wide, **static, backend="numpy")
    agree(made, rounded(tuple(_present(truth)), made))
    agree(pulled, rounded(mhc.vjp("pre_norm", tuple(wide), wide_given, **static), pulled))
    return [*made, *saved, *pulled]


def _many(variant: mhc.Variant) -> Callable[[Size], None]:
    return lambda size: (_held(variant, size, MANY), None)[1]


def _fewest(variant: mhc.Variant) -> Callable[[Size], None]:
    def check(size: Size) -> None:
        pairs = zip(_held(variant, size, FEWEST), _held(variant, size, MANY), strict=True)
        assert all(mx.array_equal(a, b) for a, b in pairs), "the kernels for few give other bits"

    return check


TINY = Size(2, 1, 3)  # of which MLX passes all but phi in constant memory
MOST, LEAST = [Size(19, 3, 37), TINY], [Size(13, 3, 37), TINY]
CHECKS = {
    "mixed": (_many(MIXED), MOST),
    "unmixed": (_many(UNMIXED), [*MOST, Size(3, 2, 4104)]),
    "mixed, fewest": (_fewest(MIXED), LEAST),
    "unmixed, fewest": (_fewest(UNMIXED), LEAST),
}


def _try(name: str, space: bool = False) -> None:
    check, sizes = CHECKS[name]
    for size in (TINY, *sizes) if space else sizes:
        check(size)


@pytest.mark.parametrize("name", CHECKS)
def test_each_by_itself(name: str) -> None:
    _try(name)


# ---- seeded faults -------------------------------------------------------------------------------

NO_SPACE = f"{SPACE}|no matching function"
ANYWHERE = f"{BOUNDS}|{WRONG}|nothing was written before"
BITS = f"{WRONG}|other bits"
SUMMED = "partials_shape_1, first, T, sums, here);"
LANE = "u[token * M + lane]"


def _faults(kernel: str, op: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(kernel, *fault, op) for fault in faults]


FAULTS = (
    *_faults(
        "pre_norm",
        "mixed",
        ("barrier of the sums", f"{SUMMED} BARRIER;", SUMMED, RACE),
        ("barrier of what is mapped", "BARRIER; MixedTokens", "MixedTokens", RACE),
        ("tail", "first + TOKENS < T ? first + TOKENS : T", "first + TOKENS", ANYWHERE),
        ("index", "(token + 1) * N * C", "token * N * C", WRONG),
        ("half sum", "(squares.at[0],", "(float(half(squares.at[0])),", WRONG),
        ("halves of shared", "+ buffer * MOST", "+ 2 * MOST", ANYWHERE),
        ("space", "(sums, scale,", "(sums, ((const device float*)scale),", NO_SPACE),
    ),
    *_faults(
        "pre_norm_k_blocks",
        "mixed, fewest",
        ("columns' tail", f"lane < M) {LANE}", f"lane <= M) {LANE}", ANYWHERE),
        ("index", LANE, "u[token * M + M - 1 - lane]", BITS),
        ("half sum", "(simd_from(total, M)", "(float(half(simd_from(total, M)))", BITS),
        ("half sum of h", "(squares.at[0],", "(float(half(squares.at[0])),", BITS),
        ("space", "float(scale[group])", "float(((const device float*)scale)[group])", NO_SPACE),
    ),
    *_faults(
        "weights_norm_vjp",
        "unmixed",
        ("barrier of the next token", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "if (first + k * step < C)", "if (first + k * step <= C)", ANYWHERE),
        ("index", "dw[token * N + i]", "dw[token * N + N - 1 - i]", WRONG),
        ("half sum", "norm.at[1] /", "float(half(norm.at[1])) /", WRONG),
        ("sums of earlier tokens", "if (token != here.group_x)", "if (false)", WRONG),
        ("space", "float(w[row", "float(((const device float*)w)[row", NO_SPACE),
    ),
    *_faults(
        "common",
        "unmixed",
        ("tail of what was kept", "if (c < C) { Optional", "if (c <= C) { Optional", ANYWHERE),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try(fault.op, space=fault.shows == NO_SPACE)
