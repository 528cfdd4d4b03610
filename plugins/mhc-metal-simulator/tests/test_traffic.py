"""Bytes and launches are counted exactly."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator


def test_each_element_once(run: Run) -> None:
    a = mx.arange(100).astype(mx.bfloat16)
    with simulator.record() as launches:
        run("uint i = thread_position_in_grid.x;\no[i] = float(a[i]) + b[0];",
            [a, [1.0]], shape=(100,), grid=(100,), group=(32,))  # fmt: skip
    (launch,) = launches
    assert (launch.kernel, launch.grid, launch.threadgroup) == ("tested", (100, 1, 1), (32, 1, 1))
    a_, b_, o_ = (launch.traffic[name] for name in "abo")
    assert (a_.size, a_.loaded, a_.loaded_unique, a_.stored) == (200, 200, 200, 0)
    assert (b_.size, b_.loaded, b_.loaded_unique) == (4, 400, 4)
    assert (o_.size, o_.stored, o_.stored_unique, o_.loaded) == (400, 400, 400, 0)
    assert (launch.loaded, launch.stored) == (600, 400)
    assert (a_.role, o_.role) == ("input", "output")
    assert "custom_kernel_tested" in launch.source


def test_repeated_and_partial_access(run: Run) -> None:
    source = """
        for (int k = 0; k < 3; k++) {
            o[0] = a[1 + k % 2];
            threadgroup_barrier(mem_flags::mem_device);
        }
        float4 v = *(const device float4*)(a + 4);
        o[1] = v.x + v.y + v.z + v.w;
    """
    with simulator.record() as launches:
        run(source, [np.arange(40, dtype=np.float32)], shape=(2,))
    a, o = launches[0].traffic["a"], launches[0].traffic["o"]
    assert (a.loaded, a.loaded_unique) == (3 * 4 + 16, 2 * 4 + 16)
    assert (o.stored, o.stored_unique) == (4 * 4, 2 * 4)


def test_shapes_are_not_traffic_of_arrays(run: Run) -> None:
    with simulator.record() as launches:
        run("o[0] = a_shape[0] + a_strides[0];", [np.zeros(9)])
    traffic = launches[0].traffic
    assert (traffic["a_shape"].loaded, traffic["a_strides"].loaded) == (4, 8)
    assert traffic["a_shape"].role == "metadata"
    assert launches[0].loaded == 0


def test_threadgroup_memory_is_reported(run: Run) -> None:
    with simulator.record() as launches:
        run("threadgroup float x[10], y;\nx[0] = 1; y = 2;\no[0] = x[0] + y;")
    assert launches[0].threadgroup_bytes == 44
    assert launches[0].loaded == 0


def test_launches_count_once_whatever_the_schedules(run: Run) -> None:
    with (
        simulator.record() as outer,
        simulator.options(schedules=["forward", "reversed", "random:1"]),
    ):
        run("o[0] = 1;")
        with simulator.record() as inner:
            run("o[0] = 2;")
    run("o[0] = 3;")
    assert (len(outer), len(inner)) == (2, 1)


@pytest.mark.parametrize("name", ["sideways", "forward:1", "random:x", ""])
def test_unknown_schedules(name: str) -> None:
    with pytest.raises(ValueError, match="schedule"), simulator.options(schedules=[name]):
        pass


def test_schedules_of_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order = """
        int at = atomic_fetch_add_explicit(&o[0], 1, memory_order_relaxed);
        atomic_store_explicit(&o[1 + at], int(thread_position_in_grid.x), memory_order_relaxed);
    """
    launch: dict[str, Any] = {"dtype": mx.int32, "init_value": 0, "atomic_outputs": True}
    launch |= {"shape": (9,), "grid": (8,), "group": (8,)}
    assert run(order, **launch).tolist() == [8, 0, 1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setenv("MHC_SIMULATOR_SCHEDULES", "reversed")
    assert run(order, **launch).tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    monkeypatch.setenv("MHC_SIMULATOR_SCHEDULES", "forward,random:4")
    with pytest.raises(simulator.KernelFaultError, match="'random:4'"):
        run(order, **launch)


def test_empty_arrays(run: Run) -> None:
    got = run("o[0] = a_shape[0] + a_shape[1];", [np.zeros((0, 5), np.float32)])
    assert got == 5
