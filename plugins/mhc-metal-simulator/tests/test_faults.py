"""One seeded fault per detector, and the same kernel without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator


@dataclass(frozen=True)
class Fault:
    """A kernel, what to replace in it to break it, and what the simulator must say."""

    kind: str
    source: str
    good: str
    bad: str
    says: tuple[str, ...]
    array: str | None = None
    inputs: tuple[Any, ...] = ()
    launch: dict[str, Any] = field(default_factory=dict[str, Any])


A40 = np.arange(40, dtype=np.float32)
NEIGHBOUR = """
    threadgroup float x[64];
    const uint t = thread_index_in_threadgroup;
    x[t] = t;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[t] = x[(t + 1) % 64];
"""
WIDE = {"shape": (64,), "grid": (64,), "group": (64,)}

FAULTS = {
    "load past the end of a device buffer": Fault(
        "out-of-bounds",
        "uint i = thread_position_in_grid.x;\no[i] = LIMIT ? a[i] : 0;",
        "i < 40",
        "i < 41",
        ("thread (9, 0, 0) of threadgroup (1, 0, 0)", "loads 4 bytes at offset 160 of buffer 'a'"),
        "a",
        (A40,),
        {"shape": (64,), "grid": (64,), "group": (31,)},
    ),
    "load before the start of a device buffer": Fault(
        "out-of-bounds",
        "uint i = thread_position_in_grid.x;\no[i] = a[int(i) - OFF];",
        "0",
        "1",
        ("thread (0, 0, 0)", "offset -4 of buffer 'a'"),
        "a",
        (A40,),
        {"shape": (40,), "grid": (40,), "group": (40,)},
    ),
    "load past the end of a constant buffer": Fault(
        "out-of-bounds",
        "o[0] = a[INDEX];",
        "6",
        "7",
        ("offset 28 of buffer 'a' (28 bytes)",),
        "a",
        (np.zeros(7),),
    ),
    "store past the end of an output": Fault(
        "out-of-bounds",
        "o[thread_position_in_grid.x + OFF] = 1;",
        "0",
        "1",
        ("stores 4 bytes at offset 32 of buffer 'o'",),
        "o",
        (),
        {"shape": (8,), "grid": (8,), "group": (8,)},
    ),
    "access past the end of a threadgroup array": Fault(
        "out-of-bounds",
        """
        threadgroup float x[8], y[8];
        threadgroup float* p = x;
        y[0] = 0;
        for (int i = 0; i < LIMIT; i++) p[i] = i;
        o[0] = p[7] + y[0];
        """,
        "8",
        "9",
        ("stores 4 bytes at offset 32 of threadgroup array 'x' (32 bytes)",),
        "x",
    ),
    "atomic past the end of an output": Fault(
        "out-of-bounds",
        "atomic_fetch_add_explicit(&o[INDEX], 1, memory_order_relaxed);",
        "3",
        "4",
        ("loads 4 bytes at offset 16 of buffer 'o'", "tested.metal:3: atomic_fetch_add"),
        "o",
        (),
        {"shape": (4,), "dtype": mx.int32, "init_value": 0, "atomic_outputs": True},
    ),
    "index out of a thread's own array": Fault(
        "index",
        """
        float x[4] = {1, 2, 3, 4};
        float s = 0;
        for (int i = 0; i < a[0]; i += 2) s += x[i + ODD];
        o[0] = s;
        """,
        "1",
        "2",
        ("index 4 is out of bounds of 'float[4]'",),
        None,
        ([4],),
    ),
    "float4 through a pointer that is not aligned": Fault(
        "misaligned",
        "float4 v = *(const device float4*)(a + STEP);\no[0] = v.x + v.y + v.z + v.w;",
        "4",
        "2",
        ("loads 16 bytes at offset 8 of buffer 'a'", "divisible by 16"),
        "a",
        (A40,),
    ),
    "half4 through a pointer that is not aligned": Fault(
        "misaligned",
        """
        threadgroup half x[12];
        for (int i = 0; i < 12; i++) x[i] = i;
        half4 v = *(threadgroup half4*)(x + STEP);
        o[0] = v.x + v.y + v.z + v.w;
        """,
        "4",
        "2",
        ("loads 8 bytes at offset 4 of threadgroup array 'x'", "divisible by 8"),
        "x",
    ),
    "missing barrier after a store": Fault(
        "race",
        NEIGHBOUR,
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
        ("threadgroup array 'x'", "no barrier between them that orders threadgroup memory"),
        "x",
        (),
        WIDE,
    ),
    "barrier that orders no memory": Fault(
        "race",
        NEIGHBOUR,
        "mem_flags::mem_threadgroup",
        "mem_flags::mem_none",
        ("threadgroup array 'x'",),
        "x",
        (),
        WIDE,
    ),
    "simdgroup barrier where simdgroups exchange": Fault(
        "race",
        NEIGHBOUR,
        "threadgroup_barrier(mem_",
        "simdgroup_barrier(mem_",
        ("threadgroup array 'x'",),
        "x",
        (),
        WIDE,
    ),
    "shared memory reused without a barrier": Fault(
        "race",
        """
        threadgroup float total[1];
        const uint t = thread_index_in_threadgroup;
        float seen = 0;
        for (uint round = 0; round < 3; round++) {
            if (t == 0) total[0] = round;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            seen += total[0];
            threadgroup_barrier(mem_flags::mem_threadgroup); // reuse
        }
        o[t] = seen;
        """,
        "threadgroup_barrier(mem_flags::mem_threadgroup); // reuse",
        "",
        ("threadgroup array 'total'", "stores"),
        "total",
        (),
        WIDE,
    ),
    "two threads store to one output": Fault(
        "race",
        "o[thread_position_in_grid.x SHARE] = 1;",
        "",
        "/ 2",
        ("buffer 'o'", "stores there too"),
        "o",
        (),
        {**WIDE, "init_value": 0},
    ),
    "two threadgroups store to one output": Fault(
        "race",
        "o[thread_position_in_grid.x SHARE] = 1;",
        "",
        "% 32",
        ("buffer 'o'", "another threadgroup"),
        "o",
        (),
        {"shape": (64,), "grid": (64,), "group": (32,), "init_value": 0},
    ),
    "a threadgroup reads what another one stores": Fault(
        "race",
        """
        const uint i = thread_position_in_grid.x;
        if (o[(i + SHIFT) % 64] == 0) o[i] = 1;
        """,
        "0",
        "32",
        ("buffer 'o'", "another threadgroup"),
        "o",
        (),
        {"shape": (64,), "grid": (64,), "group": (32,), "init_value": 0},
    ),
    "device memory behind a threadgroup barrier": Fault(
        "race",
        """
        const uint t = thread_index_in_threadgroup;
        o[t] = t;
        threadgroup_barrier(mem_flags::mem_device);
        o[64 + t] = o[63 - t];
        """,
        "mem_device",
        "mem_threadgroup",
        ("buffer 'o'", "no barrier between them that orders device memory"),
        "o",
        (),
        {"shape": (128,), "grid": (64,), "group": (64,)},
    ),
    "unwritten threadgroup memory read": Fault(
        "unwritten-read",
        """
        threadgroup float x[8];
        if (thread_index_in_threadgroup < LIMIT) x[thread_index_in_threadgroup] = 1;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[thread_index_in_threadgroup] = x[thread_index_in_threadgroup];
        """,
        "8",
        "7",
        ("thread (7, 0, 0)", "offset 28 of threadgroup array 'x'", "nothing was written"),
        "x",
        (),
        {"shape": (8,), "grid": (8,), "group": (8,)},
    ),
    "unwritten output read": Fault(
        "unwritten-read",
        "FIRST\no[0] += 1;",
        "o[0] = 1;",
        "",
        ("offset 0 of buffer 'o'", "nothing was written"),
        "o",
    ),
    "output never written": Fault(
        "unwritten-output",
        "if (thread_position_in_grid.x < LIMIT) o[thread_position_in_grid.x] = 1;",
        "6",
        "4",
        ("output 'o' has 6 elements, and 2 of them are never written, the first at (1, 1)",),
        "o",
        (),
        {"shape": (2, 3), "grid": (8,), "group": (8,)},
    ),
    "barrier in a branch": Fault(
        "divergence",
        """
        const uint t = thread_index_in_threadgroup;
        if (t < LIMIT) threadgroup_barrier(mem_flags::mem_none);
        o[t] = t;
        """,
        "64",
        "32",
        ("waits at a threadgroup_barrier that thread (32, 0, 0) never reaches", "has returned"),
        None,
        (),
        WIDE,
    ),
    "two barriers for two halves": Fault(
        "divergence",
        """
        const uint t = thread_index_in_threadgroup;
        if (t < LIMIT) threadgroup_barrier(mem_flags::mem_none);
        else threadgroup_barrier(mem_flags::mem_none);
        o[t] = t;
        """,
        "64",
        "16",
        ("thread (16, 0, 0) does not reach: it waits at line",),
        None,
        (),
        WIDE,
    ),
    "simd operation in a branch": Fault(
        "divergence",
        """
        const uint t = thread_index_in_threadgroup;
        float x = 1;
        if (t < LIMIT) x = simd_sum(x);
        o[t] = x;
        """,
        "32",
        "20",
        ("waits at a simd operation that thread (20, 0, 0) never reaches",),
        None,
        (),
        WIDE,
    ),
    "simd operation after an early return": Fault(
        "divergence",
        """
        const uint t = thread_index_in_threadgroup;
        if (t >= LIMIT) return;
        o[t] = simd_max(float(t));
        """,
        "64",
        "40",
        ("waits at a simd operation that thread (40, 0, 0) never reaches",),
        None,
        (),
        {**WIDE, "init_value": 0},
    ),
    "broadcast from a lane that is not there": Fault(
        "missing-lane",
        "o[thread_position_in_grid.x] = simd_broadcast(1.0f, LANE);",
        "9",
        "10",
        ("asks for lane 10",),
        None,
        (),
        {"shape": (10,), "grid": (10,), "group": (10,)},
    ),
    "division by zero": Fault(
        "division",
        "o[0] = 7 / a[WHICH];",
        "1",
        "0",
        ("divides 'int'",),
        None,
        ([0, 7],),
    ),
    "pointer from nowhere": Fault(
        "wild-access",
        "const device float* p = WHAT;\no[0] = p[3];",
        "a",
        "(const device float*)(ulong)64",
        ("loads 4 bytes at address 0x4c",),
        None,
        (A40,),
    ),
    "result that depends on the order": Fault(
        "order-dependent",
        """
        int at = ATOMIC ? atomic_fetch_add_explicit(&o[0], 1, memory_order_relaxed)
                        : int(thread_position_in_grid.x);
        atomic_store_explicit(&o[1 + at], int(thread_position_in_grid.x), memory_order_relaxed);
        """,
        "false",
        "true",
        ("output 'o' depends on the order of the threads", "'reversed'"),
        "o",
        (),
        {"shape": (9,), "dtype": mx.int32, "grid": (8,), "group": (8,), "init_value": 0,
         "atomic_outputs": True},
    ),
}  # fmt: skip
PLACEHOLDERS = (  # one in each source
    *("SHIFT", "LIMIT", "OFF", "INDEX", "ODD", "STEP"),
    *("SHARE", "FIRST", "LANE", "WHICH", "WHAT", "ATOMIC"),
)


def filled(fault: Fault, part: str) -> str:
    for placeholder in PLACEHOLDERS:
        if placeholder in fault.source:
            return fault.source.replace(placeholder, part)
    return fault.source.replace(fault.good, part)


@pytest.mark.parametrize("what", FAULTS)
def test_the_sound_kernel_runs(run: Run, what: str) -> None:
    fault = FAULTS[what]
    with simulator.options(schedules=["forward", "reversed", "random:3"]):
        run(filled(fault, fault.good), fault.inputs, **fault.launch)


@pytest.mark.parametrize("schedule", ["forward", "reversed", "random:5"])
@pytest.mark.parametrize("what", FAULTS)
def test_the_fault_is_caught(run: Run, what: str, schedule: str) -> None:
    fault = FAULTS[what]
    schedules = [schedule]
    if fault.kind == "order-dependent":
        schedules = ["forward", "reversed"]
    with (
        simulator.options(schedules=schedules),
        pytest.raises(simulator.KernelFaultError) as caught,
    ):
        run(filled(fault, fault.bad), fault.inputs, **fault.launch)
    # In another order, another thread meets a race or an empty place first.
    if fault.kind == "race" and caught.value.kind == "unwritten-read":
        assert caught.value.array == fault.array
        return
    assert caught.value.kind == fault.kind
    assert caught.value.array == fault.array
    assert "kernel 'tested'" in str(caught.value)
    if schedule == "forward":
        for words in fault.says:
            assert words in str(caught.value)


def test_a_fault_names_its_line(run: Run) -> None:
    with pytest.raises(simulator.KernelFaultError) as caught:
        run("float x = 1;\n\no[0] = x + a[40];", [A40])
    text = str(caught.value)
    assert text.endswith("o[0] = x + a[40];")
    assert f"tested.metal:{caught.value.line}: " in text


def test_a_launch_after_a_fault_is_sound(run: Run) -> None:
    for _ in range(3):
        with pytest.raises(simulator.KernelFaultError):
            run(NEIGHBOUR.replace("threadgroup_barrier", "simdgroup_barrier"), **WIDE)
        assert run(NEIGHBOUR, **WIDE)[3] == 4


def test_unwritten_outputs_can_be_ignored_and_are_nan(run: Run) -> None:
    with simulator.options(unwritten="ignore"):
        got = run("o[0] = 1;", shape=(3,))
    assert got[0] == 1
    assert np.isnan(got[1:]).all()


# ---- what is refused before anything runs -------------------------------------------------------


@pytest.mark.parametrize(("size", "fits"), [(8191, True), (8192, True), (8193, False)])
def test_32_kib_of_threadgroup_memory(run: Run, size: int, fits: bool) -> None:
    source = f"threadgroup float x[{size}];\nx[0] = 1;\no[0] = x[0];"
    if fits:
        assert run(source) == 1
    else:
        with pytest.raises(simulator.LaunchError, match=r"32772 bytes .*x 32772.*32768"):
            run(source)


def test_threadgroup_memory_adds_up(run: Run) -> None:
    source = "threadgroup float x[5000];\nthreadgroup half y[7000];\nx[0] = 1; y[0] = 1;\no[0] = 1;"
    with pytest.raises(simulator.LaunchError, match="34000 bytes"):
        run(source)


def test_1024_threads(run: Run) -> None:
    source = "o[thread_position_in_grid.x] = 1;"
    run(source, shape=(1024,), grid=(1024,), group=(1024,))
    with pytest.raises(simulator.LaunchError, match="1056 threads; Metal runs at most 1024"):
        run(source, shape=(1056,), grid=(1056,), group=(33, 32))


@pytest.mark.parametrize("empty", [{"grid": (0,)}, {"group": (1, 0)}])
def test_a_launch_without_threads(run: Run, empty: dict[str, Any]) -> None:
    with pytest.raises(simulator.LaunchError, match="has no threads"):
        run("o[0] = 1;", **empty)


def test_too_much_memory_per_thread(run: Run) -> None:
    source = (
        "float x[60000];\nfor (int i = 0; i < 60000; i++) x[i] = a[0] + i;\no[0] = x[int(a[1])];"
    )
    with pytest.raises(simulator.CompileError, match="variables take 24"):
        run(source, [[1.0, 2.0]])
