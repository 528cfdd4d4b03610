"""The norm inside pre: the same bits as the norm after it, and no pass over h."""

from __future__ import annotations

from typing import Any

import mhc_core as mhc
import mlx.core as mx
import numpy as np
import pytest

from mhc_metal_simulator.backend import SPEC
from mhc_metal_simulator.launch import LaunchRecord, record
from mhc_metal_simulator.traffic import kernel_of

N, V, EPS = 4, mhc.DEEPSEEK_V4, 1e-6


def _drawn(T: int, C: int, dtype: Any) -> tuple[list[mx.array], mx.array]:
    rng = np.random.default_rng(3)
    columns = N * N + 2 * N
    shapes = ((T, N, C), (columns, N * C), (3,), (columns,), (C,))
    x, *more = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes)
    return [x.astype(dtype), *more[:3]], more[3]


def _same(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other))


@pytest.mark.parametrize(
    ("T", "C", "dtype"),
    [
        (3, 264, mx.bfloat16),
        (3, 38, mx.bfloat16),
        (70, 37, mx.float16),
        (3, 2056, mx.float32),
        (515, 32, mx.bfloat16),
    ],
)
def test_it_has_the_bits_of_the_norm_after(T: int, C: int, dtype: Any) -> None:
    arrays, weight = _drawn(T, C, dtype)
    with mhc.use_backend(SPEC.name):
        h, *mapped = mhc.pre(*arrays, V)
        y, *same, raw = mhc.pre(*arrays, V, h_norm_weight=weight, h_norm_eps=EPS, h_raw=True)
        after = mhc.rms_norm(h, weight, EPS)
        alone, *_ = mhc.pre(arrays[0][1:2], *arrays[1:], V, h_norm_weight=weight, h_norm_eps=EPS)
    assert _same(raw, h)
    assert _same(y, after)
    assert all(map(_same, same, mapped))
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
