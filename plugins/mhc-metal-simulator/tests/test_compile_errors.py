"""The simulator refuses what Apple's compiler does, with the line of MLX's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator

SMALL, LARGE = np.ones(7, np.float32), np.ones(8, np.float32)


@dataclass(frozen=True)
class Refused:
    """A statement, and what the message must contain."""

    statement: str
    says: str
    header: str = ""


REFUSED = {
    "constant to device": Refused("const device float* p = a;", "constant"),
    "device to constant": Refused("const constant float* p = b;", "constant"),
    "device to thread": Refused("const float* p = b;", "device"),
    "thread to device": Refused("float x = 0;\nconst device float* p = &x;", "device"),
    "threadgroup to thread": Refused("threadgroup float x[4];\nfloat* p = x;", "threadgroup"),
    "threadgroup to device": Refused(
        "threadgroup float x[4];\ndevice float* p = x;", "threadgroup"
    ),
    "cast of constant to device": Refused(
        "const device float* p = (const device float*)a;", "mismatching address spaces"
    ),
    "cast of device to thread": Refused(
        "thread const float* p = (thread const float*)b;", "mismatching address spaces"
    ),
    "reinterpret_cast of constant to device": Refused(
        "const device float4* p = reinterpret_cast<const device float4*>(a);", "reinterpret_cast"
    ),
    "constant argument for a device parameter": Refused(
        "float x = get(a);",
        "no matching function",
        "float get(const device float* p) { return *p; }",
    ),
    "store to an input": Refused("b[0] = 1;", "read-only"),
    "plain variable at program scope": Refused(
        "", "program scope variable must reside in constant address space", "constexpr float k = 2;"
    ),
    "double": Refused("double x = 1;", "'double' is not supported in Metal"),
    "float to bfloat without a cast": Refused("bfloat x = b[0];", "bfloat"),
    "float added to bfloat": Refused("bfloat x = bfloat(1);\nx += b[0];", "bfloat"),
    "vector of another length": Refused("float4 x = float4(1, 2, 3);", "one value for each"),
    "vector of another type": Refused("float4 x = int4(1);", "vector of 4 'int' values"),
    "unknown name": Refused("o[0] = nothing;", "nothing"),
    "local used before it is set": Refused("float x;\no[0] = x;", "uninitialized"),
    # half and bfloat are keywords: gfx-rs/wgpu#4545, #5072
    "a variable named half": Refused("float half = 1;\no[0] = half;", "half"),
    "a variable of a type of its own named half": Refused(
        "Pair half;\nhalf.x = 1;", "half", "struct Pair { float x; };"
    ),
    "a member named half": Refused("", "half", "struct Pair { float half; };"),
    "a function named half": Refused("", "half", "inline float half(float x) { return x / 2; }"),
    "a variable named bfloat": Refused("float bfloat = 1;", "bfloat"),
    # vec<T, 64>, by what Apple's compiler makes of MLX's kernels: metal/shim/matrix.h
    "two numbers as all that a lane has of a matrix": Refused(
        "simdgroup_float8x8 m;\nm.thread_elements() = float2(1, 2);", "vec<float, 8 * 8>"
    ),
    "a lane's share of a matrix as two numbers": Refused(
        "simdgroup_float8x8 m(0.0f);\nfloat2 v = m.thread_elements();", "8 * 8>"
    ),
    "an address as a uintptr_t": Refused(
        "bool x = reinterpret_cast<uintptr_t>(b) % 16;", "uintptr"
    ),
    # shader-slang/slang#9716
    "an address by as_type": Refused(
        "bool x = as_type<ulong>(b) % 16;", "as_type takes no pointer"
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(run: Run, what: str) -> None:
    case = REFUSED[what]
    with pytest.raises(simulator.CompileError) as caught:
        run(f"o[0] = 1;\n{case.statement}\n", [SMALL, LARGE], header=case.header)
    assert case.says in str(caught.value)
    assert "tested.metal:" in str(caught.value)


def test_the_same_without_the_mistakes(run: Run) -> None:
    source = """
        threadgroup float x[4];
        threadgroup float* t = x;
        const constant float* p = a;
        const device float* q = b;
        const device float4* q4 = reinterpret_cast<const device float4*>(q);
        thread float own = p[0] + q[0] + q4[1].x;
        thread float* r = &own;
        t[0] = *r;
        bfloat n = bfloat(t[0]);
        o[0] = n + k;
    """
    assert run(source, [SMALL, LARGE], header="constant constexpr float k = 2;") == 5


def test_a_lane_has_the_first_two_of_a_matrix_as_wide_as_its_places(run: Run) -> None:
    """Check both ways of MLX's kernels (kernels/steel/gemm/mma.h), PyTorch's with an address."""
    source = """
        simdgroup_float8x8 m, n;
        for (ushort k = 0; k < 2; k++) m.thread_elements()[k] = b[k] + k;
        reinterpret_cast<thread float2&>(n.thread_elements()) = float2(3, 4);
        simdgroup_multiply_accumulate(m, m, n, m);
        const float2 v = reinterpret_cast<thread float2&>(m.thread_elements());
        const uint lane = thread_index_in_simdgroup;
        o[2 * lane] = v[0], o[2 * lane + 1] = v[1];
        if (reinterpret_cast<ulong>(b) % 4 != 0) o[0] = 0;
    """
    got = run(source, [SMALL, LARGE], shape=(32, 2), grid=(32,), group=(32,))
    assert (got == [4 * (1 * 3 + 2 * 3) + 1, 4 * (1 * 4 + 2 * 4) + 2]).all()


@pytest.mark.parametrize(
    ("statement", "sound"),
    [
        ("o[0] = b[0];", False),
        ("T x = T(1);\nx *= 2.0f;", False),
        ("o[0] = simd_sum(b[0]) * T(2);", False),
        ("o[0] = T(b[0]);", True),
        ("o[0] = static_cast<T>(b[0]) * T(2);", True),
        ("o[0] = a[0] * a[0];", True),
        ("float x = a[0];", True),
    ],
)
def test_bfloat_needs_a_cast(run: Run, statement: str, sound: bool) -> None:
    inputs = [mx.array([1, 2], mx.bfloat16), LARGE]
    launch: dict[str, Any] = {"dtype": mx.bfloat16, "template": [("T", mx.bfloat16)]}
    source = f"o[0] = T(0);\n{statement}"
    if sound:
        run(source, inputs, **launch)
    else:
        with pytest.raises(simulator.CompileError, match=r"write bfloat\(x\)"):
            run(source, inputs, **launch)


def test_size_decides_the_space_of_an_input(run: Run) -> None:
    source = "const constant float* p = a;\no[0] = p[0];"
    assert run(source, [SMALL]) == 1
    with pytest.raises(simulator.CompileError, match="device"):
        run(source, [LARGE])


def test_the_line_is_that_of_the_generated_text(run: Run) -> None:
    with pytest.raises(simulator.CompileError, match=r"tested\.metal:4:8: error: .*'nothing'"):
        run("float x = 1;\no[0] = nothing;")
