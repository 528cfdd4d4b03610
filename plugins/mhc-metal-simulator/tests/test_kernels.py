"""Kernels whose right results are known, at sizes that leave every kind of tail."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from conftest import Run

import mhc_metal_simulator as simulator

SCHEDULES = ("forward", "reversed", "random:1", "random:2")


@pytest.fixture(autouse=True)
def every_schedule() -> Any:
    with simulator.options(schedules=SCHEDULES):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- elementwise --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("group", [1, 32, 96])
def test_elementwise(run: Run, size: int, group: int) -> None:
    a = np.arange(size, dtype=np.float32)
    source = "uint i = thread_position_in_grid.x;\nif (i < a_shape[0]) o[i] = 2 * a[i] + b[0];"
    got = run(source, [a, [0.5]], shape=(size,), grid=(size,), group=(group,))
    np.testing.assert_array_equal(got, 2 * a + 0.5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int32", "uint8", "int64"])
def test_dtypes(run: Run, dtype: str) -> None:
    a = mx.arange(40).astype(getattr(mx, dtype))
    got = run(
        "uint i = thread_position_in_grid.x;\no[i] = T(a[i] + T(3));",
        [a],
        shape=(40,),
        dtype=a.dtype,
        grid=(40,),
        group=(32,),
        template=[("T", a.dtype)],
    )
    np.testing.assert_array_equal(got.astype(np.float64), np.arange(40) + 3)


def test_bool_and_template_values(run: Run) -> None:
    a = np.arange(10) % 3 == 0
    source = """
        uint i = thread_position_in_grid.x;
        o[i] = (a[i] && YES) ? N : -N;
    """
    got = run(
        source,
        [a],
        shape=(10,),
        dtype=mx.int32,
        grid=(10,),
        template=[("N", 7), ("YES", True)],
    )
    np.testing.assert_array_equal(got, np.where(a, 7, -7))


def test_scalar_input_is_a_reference(run: Run) -> None:
    got = run("o[0] = a + b;", [mx.array(1.5), mx.array(2, mx.int32)])
    assert got == 3.5


def test_init_value_stays_where_nothing_is_stored(run: Run) -> None:
    got = run(
        "o[2 * thread_position_in_grid.x] = 1;", shape=(7,), grid=(3,), group=(3,), init_value=-2
    )
    np.testing.assert_array_equal(got, [1, -2, 1, -2, 1, -2, -2])


@pytest.mark.parametrize("cut", [np.s_[::2, 1:], np.s_[::-1, ::-2], np.s_[:, ::3], np.s_[4:, :]])
def test_strided_inputs(run: Run, cut: Any) -> None:
    whole = mx.arange(63.0).reshape(9, 7)
    a = whole[cut]
    source = """
        uint2 p = thread_position_in_grid.xy;
        o[p.y * a_shape[1] + p.x] = a[p.y * a_strides[0] + long(p.x) * a_strides[1]]
            + 0 * a[elem_to_loc(p.y * a_shape[1] + p.x, a_shape, a_strides, a_ndim)];
    """
    source = source.replace("p.y * a_strides", "long(p.y) * a_strides")
    got = run(source, [a], shape=a.shape, grid=a.shape[::-1], ensure_row_contiguous=False)
    np.testing.assert_array_equal(got, np.array(a))
    contiguous = run("o[thread_position_in_grid.x] = a[thread_position_in_grid.x];", [a],
                     shape=a.shape, grid=(a.size,))  # fmt: skip
    np.testing.assert_array_equal(contiguous, np.array(a))


@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_a_view_begins_where_it_does_in_its_buffer(run: Run, start: int) -> None:
    """Check that MLX passes contiguous views as they are; copies begin at the start of a buffer."""
    whole = mx.arange(32.0)
    mx.eval(whole)
    source = "float2 v = *(const device float2*)a;\no[0] = v.x, o[1] = v.y;"
    assert (run(source, [whole[::2][start:]], shape=(2,)) == [2 * start, 2 * start + 2]).all()
    if start % 2 == 0:
        assert (run(source, [whole[start:]], shape=(2,)) == [start, start + 1]).all()
    else:
        with pytest.raises(simulator.KernelFaultError, match="misaligned"):
            run(source, [whole[start:]], shape=(2,))
    few = whole[start : start + 4]  # in constant memory
    source = source.replace("device", "constant")
    if start % 2 == 0:
        assert (run(source, [few], shape=(2,)) == [start, start + 1]).all()
    else:
        with pytest.raises(simulator.KernelFaultError, match="misaligned"):
            run(source, [few], shape=(2,))


def test_broadcast_input(run: Run) -> None:
    a = mx.broadcast_to(mx.arange(5.0), (3, 5))
    source = (
        "uint2 p = thread_position_in_grid.xy;\no[p.y * 5 + p.x] = a[p.y * a_strides[0] + p.x];"
    )
    got = run(source, [a], shape=(3, 5), grid=(5, 3), ensure_row_contiguous=False)
    np.testing.assert_array_equal(got, np.array(a))


# ---- threadgroup memory -------------------------------------------------------------------------

REDUCE = """
    threadgroup float part[32];
    const uint t = thread_index_in_threadgroup, n = threads_per_threadgroup.x;
    float sum = 0;
    for (uint i = t; i < uint(a_shape[0]); i += n) sum += a[i];
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (t < 32) {
        sum = simd_sum(t < simdgroups_per_threadgroup ? part[t] : 0.0f);
        if (t == 0) o[0] = sum;
    }
"""


@pytest.mark.parametrize("threads", [32, 64, 160, 1024])
@pytest.mark.parametrize("size", [9, 64, 1000])
def test_reduction(run: Run, threads: int, size: int) -> None:
    a = np.arange(size, dtype=np.float32)
    assert run(REDUCE, [a], grid=(threads,), group=(threads,)) == a.sum()


@pytest.mark.parametrize("shape", [(32, 32), (33, 20), (1, 50), (70, 41)])
def test_tiled_transpose(run: Run, shape: tuple[int, int]) -> None:
    source = """
        threadgroup float tile[16][17];
        const uint2 l = thread_position_in_threadgroup.xy, g = threadgroup_position_in_grid.xy;
        const uint rows = a_shape[0], columns = a_shape[1];
        uint x = g.x * 16 + l.x, y = g.y * 16 + l.y;
        if (x < columns && y < rows) tile[l.y][l.x] = a[y * columns + x];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        x = g.y * 16 + l.x, y = g.x * 16 + l.y;
        if (x < rows && y < columns) o[y * rows + x] = tile[l.x][l.y];
    """
    a = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    grid = tuple(-(-n // 16) * 16 for n in shape[::-1])
    got = run(source, [a], shape=shape[::-1], grid=grid, group=(16, 16))
    np.testing.assert_array_equal(got, a.T)


@pytest.mark.parametrize("sizes", [(16, 16, 16), (5, 33, 18), (20, 1, 9), (1, 40, 1)])
def test_tiled_matmul(run: Run, rng: np.random.Generator, sizes: tuple[int, int, int]) -> None:
    source = """
        threadgroup float A[8][8], B[8][8];
        const uint2 l = thread_position_in_threadgroup.xy;
        const uint2 at = threadgroup_position_in_grid.xy * 8 + l;
        const uint M = a_shape[0], K = a_shape[1], N = b_shape[1];
        float sum = 0;
        for (uint k = 0; k < K; k += 8) {
            A[l.y][l.x] = at.y < M && k + l.x < K ? a[at.y * K + k + l.x] : 0.0f;
            B[l.y][l.x] = at.x < N && k + l.y < K ? b[(k + l.y) * N + at.x] : 0.0f;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint j = 0; j < 8; j++) sum += A[l.y][j] * B[j][l.x];
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
        if (at.y < M && at.x < N) o[at.y * N + at.x] = sum;
    """
    m, k, n = sizes
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)
    grid = (-(-n // 8) * 8, -(-m // 8) * 8)
    got = run(source, [a, b], shape=(m, n), grid=grid, group=(8, 8))
    np.testing.assert_allclose(got, a @ b, rtol=1e-5, atol=1e-5)


def test_threadgroup_memory_is_new_in_each_threadgroup(run: Run) -> None:
    source = """
        threadgroup int seen;
        if (thread_index_in_threadgroup == 0) seen = int(threadgroup_position_in_grid.x);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[thread_position_in_grid.x] = seen;
    """
    got = run(source, shape=(50,), dtype=mx.int32, grid=(50,), group=(8,))
    np.testing.assert_array_equal(got, np.arange(50) // 8)


def test_simdgroup_barrier_orders_within_a_simdgroup(run: Run) -> None:
    source = """
        threadgroup float x[96];
        const uint t = thread_index_in_threadgroup;
        for (uint round = 0; round < 3; round++) {
            x[t] = t + round;
            simdgroup_barrier(mem_flags::mem_threadgroup);
            o[t + round * 96] = x[t ^ 31];
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    """
    got = run(source, shape=(3, 96), grid=(96,), group=(96,))
    np.testing.assert_array_equal(got, (np.arange(96) ^ 31) + np.arange(3)[:, None])


# ---- positions ----------------------------------------------------------------------------------


def test_positions_in_a_grid_with_edges(run: Run) -> None:
    grid, group = (10, 5, 3), (4, 2, 2)
    source = """
        const uint3 g = thread_position_in_grid;
        const uint at = (g.z * threads_per_grid.y + g.y) * threads_per_grid.x + g.x;
        device uint* q = o + at * 20;
        const uint3 v[6] = {thread_position_in_threadgroup, threadgroup_position_in_grid,
            threads_per_threadgroup, dispatch_threads_per_threadgroup, threadgroups_per_grid,
            grid_size};
        for (int i = 0; i < 6; i++) for (int k = 0; k < 3; k++) q[i * 3 + k] = v[i][k];
        q[18] = thread_index_in_threadgroup;
        q[19] = simdgroups_per_threadgroup;
    """
    got = run(source, shape=(3, 5, 10, 20), dtype=mx.uint32, grid=grid, group=group)
    for z, y, x in np.ndindex(3, 5, 10):
        at = np.array([x, y, z])
        inside, block = at % group, at // group
        size = np.minimum(group, grid - block * group)
        index = (inside[2] * size[1] + inside[1]) * size[0] + inside[0]
        expected = [*inside, *block, *size, *group, 3, 3, 2, *grid, index, 1]
        assert got[z, y, x].tolist() == expected


def test_a_threadgroup_is_no_larger_than_the_grid(run: Run) -> None:
    source = "o[thread_position_in_grid.x] = dispatch_threads_per_threadgroup.x;"
    assert run(source, shape=(3,), dtype=mx.int32, grid=(3,), group=(64,)).tolist() == [3, 3, 3]


def test_lanes(run: Run) -> None:
    source = """
        uint t = thread_position_in_grid.x;
        o[t * 4] = thread_index_in_simdgroup;
        o[t * 4 + 1] = simdgroup_index_in_threadgroup;
        o[t * 4 + 2] = threads_per_simdgroup;
        o[t * 4 + 3] = thread_index_in_quadgroup + 10 * quadgroup_index_in_threadgroup;
    """
    got = run(source, shape=(70, 4), dtype=mx.int32, grid=(70,), group=(70,))
    t = np.arange(70)
    expected = np.stack([t % 32, t // 32, 0 * t + 32, t % 4 + 10 * (t // 4)], axis=1)
    np.testing.assert_array_equal(got, expected)


# ---- simd operations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        ("simd_sum", np.sum),
        ("simd_max", np.max),
        ("simd_min", np.min),
        ("simd_product", np.prod),
    ],
)
@pytest.mark.parametrize("threads", [32, 96, 70])
def test_simd_reductions(run: Run, operation: str, reference: Any, threads: int) -> None:
    a = 1 + (np.arange(threads) % 5 == 0).astype(np.float32)
    source = f"uint t = thread_position_in_grid.x;\no[t] = {operation}(a[t]);"
    got = run(source, [a], shape=(threads,), grid=(threads,), group=(threads,))
    for first in range(0, threads, 32):
        assert (got[first : first + 32] == reference(a[first : first + 32])).all()


@pytest.mark.parametrize(
    ("expression", "source_lane"),
    [
        ("simd_shuffle(x, ushort(31 - l))", lambda i: 31 - i),
        ("simd_shuffle_xor(x, 5)", lambda i: i ^ 5),
        ("simd_shuffle_down(x, 3)", lambda i: np.where(i + 3 < 32, i + 3, i)),
        ("simd_shuffle_up(x, 3)", lambda i: np.where(i >= 3, i - 3, i)),
        ("simd_shuffle_rotate_down(x, 3)", lambda i: (i + 3) % 32),
        ("simd_shuffle_rotate_up(x, 3)", lambda i: (i - 3) % 32),
        ("simd_broadcast(x, 9)", lambda i: 0 * i + 9),
        ("simd_broadcast_first(x)", lambda i: 0 * i),
        ("simd_shuffle_and_fill_down(x, x, 3)", lambda i: (i + 3) % 32),
        ("simd_shuffle_and_fill_up(x, x, 3)", lambda i: (i - 3) % 32),
    ],
)
def test_shuffles(run: Run, expression: str, source_lane: Any) -> None:
    source = f"""
        uint t = thread_position_in_grid.x, l = thread_index_in_simdgroup;
        float x = a[t];
        o[t] = {expression};
    """
    a = np.arange(64, dtype=np.float32) + 100
    got = run(source, [a], shape=(64,), grid=(64,), group=(64,))
    expected = a.reshape(2, 32)[:, source_lane(np.arange(32))].reshape(-1)
    np.testing.assert_array_equal(got, expected)


def test_lanes_without_a_thread_give_nan(run: Run) -> None:
    source = "uint t = thread_position_in_grid.x;\no[t] = simd_shuffle_down(a[t], 2);"
    a = np.arange(40, dtype=np.float32)
    got = run(source, [a], shape=(40,), grid=(40,), group=(40,))
    expected = [*range(2, 32), 30, 31, *range(34, 40), np.nan, np.nan]
    np.testing.assert_array_equal(got, expected)


def test_prefix_sums_and_votes(run: Run) -> None:
    source = """
        uint t = thread_position_in_grid.x;
        o[t * 6] = simd_prefix_inclusive_sum(a[t]);
        o[t * 6 + 1] = simd_prefix_exclusive_sum(a[t]);
        o[t * 6 + 2] = simd_all(a[t] < 100);
        o[t * 6 + 3] = simd_any(a[t] == 40);
        o[t * 6 + 4] = int(ulong(simd_ballot(t % 32 < 3)));
        o[t * 6 + 5] = simd_or(1 << (t % 3));
    """
    a = np.arange(64, dtype=np.int32)
    got = run(source, [a], shape=(64, 6), dtype=mx.int32, grid=(64,), group=(64,))
    sums = np.cumsum(a.reshape(2, 32), axis=1).reshape(-1)
    np.testing.assert_array_equal(got[:, 0], sums)
    np.testing.assert_array_equal(got[:, 1], sums - a)
    np.testing.assert_array_equal(
        got[:, 2:], np.stack([1 + 0 * a, a >= 32, 7 + 0 * a, 7 + 0 * a], 1)
    )


def test_simd_operations_on_vectors(run: Run) -> None:
    source = """
        uint t = thread_position_in_grid.x;
        float4 v = simd_sum(float4(1, t, 2 * t, 0));
        for (int k = 0; k < 4; k++) o[t * 4 + k] = v[k];
    """
    got = run(source, shape=(32, 4), grid=(32,), group=(32,))
    assert (got == [32, 496, 992, 0]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_simdgroup_matrix(run: Run, rng: np.random.Generator, dtype: str) -> None:
    source = """
        const uint s = simdgroup_index_in_threadgroup;
        threadgroup float out[2][64];
        simdgroup_matrix<T, 8, 8> A, B;
        simdgroup_float8x8 C = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), D(2.0f);
        for (uint k = 0; k < 24; k += 8) {
            simdgroup_load(A, a + s * 8 * 24 + k, 24);
            simdgroup_load(B, b + k, 24, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(C, A, B, C);
        }
        simdgroup_multiply(C, C, D);
        simdgroup_store(C, &out[s][0], 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = thread_index_in_simdgroup; i < 64; i += 32) o[s * 64 + i] = out[s][i];
    """
    kind = getattr(mx, dtype)
    a, b = (mx.array(rng.standard_normal(s, np.float32)).astype(kind) for s in ((16, 24), (8, 24)))
    got = run(source, [a, b], shape=(16, 8), grid=(64,), group=(64,), template=[("T", kind)])
    expected = 2 * np.array(a.astype(mx.float32)) @ np.array(b.astype(mx.float32)).T
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


# ---- atomics ------------------------------------------------------------------------------------


def test_atomics(run: Run) -> None:
    source = """
        threadgroup atomic_int count;
        if (thread_index_in_threadgroup == 0)
            atomic_store_explicit(&count, 0, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (thread_index_in_threadgroup == 0)
            atomic_fetch_add_explicit(&o[0], atomic_load_explicit(&count, memory_order_relaxed),
                                      memory_order_relaxed);
        atomic_fetch_max_explicit(&o[1], int(thread_position_in_grid.x), memory_order_relaxed);
    """
    got = run(source, shape=(2,), dtype=mx.int32, grid=(100,), group=(16,), init_value=0,
              atomic_outputs=True)  # fmt: skip
    assert got.tolist() == [100, 99]


# ---- numbers ------------------------------------------------------------------------------------


def odd_floats(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random bits, halves between 16-bit values, subnormals and specials."""
    bits = rng.integers(0, 2**32, 60_000, np.uint64).astype(np.uint32)
    near = rng.integers(0, 2**16, 20_000).astype(np.uint16).view(np.float16).astype(np.float32)
    halfway = near.view(np.uint32) + rng.choice([0, 0xFFF, 0x1000, 0x1001], near.size)
    bf16 = (rng.integers(0, 2**16, 20_000) << 16) + rng.choice([0x7FFF, 0x8000, 0x8001], 20_000)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 3.4e38, 1e-45, 6e-8],
                       np.float32).view(np.uint32)  # fmt: skip
    everything = np.concatenate([bits, halfway.astype(np.uint32), bf16.astype(np.uint32), special])
    floats = everything.view(np.float32)
    return floats[~np.isnan(floats)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits(run: Run, rng: np.random.Generator, dtype: str) -> None:
    a = odd_floats(rng)
    with simulator.options(schedules=["forward"]):
        got = run(
            "uint i = thread_position_in_grid.x;\no[i] = T(a[i]);",
            [a],
            shape=(a.size,),
            dtype=getattr(mx, dtype),
            grid=(a.size,),
            group=(256,),
            template=[("T", getattr(mx, dtype))],
        )
    with np.errstate(over="ignore"):
        expected = a.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operation", ["+", "-", "*", "/"])
def test_16_bit_arithmetic_rounds_once_per_operation(
    run: Run, rng: np.random.Generator, dtype: str, operation: str
) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a, b = (rng.standard_normal(5000).astype(np.float32).astype(kind) for _ in range(2))
    source = f"uint i = thread_position_in_grid.x;\no[i] = (a[i] {operation} b[i]) + a[i];"
    mlx_inputs = [mx.array(x.astype(np.float32)).astype(getattr(mx, dtype)) for x in (a, b)]
    with simulator.options(schedules=["forward"]):
        got = run(source, mlx_inputs, shape=(5000,), dtype=getattr(mx, dtype), grid=(5000,),
                  group=(256,))  # fmt: skip
    first = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
    np.testing.assert_array_equal(got.view(np.uint16), (first + a).view(np.uint16))


def test_every_half_widens_exactly(run: Run) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    a = bits[~np.isnan(bits.view(np.float16))].view(np.float16)
    with simulator.options(schedules=["forward"]):
        got = run("uint i = thread_position_in_grid.x;\no[i] = float(a[i]);", [a],
                  shape=(a.size,), grid=(a.size,), group=(256,))  # fmt: skip
    np.testing.assert_array_equal(got, a.astype(np.float32))


def test_literals_are_single_precision(run: Run) -> None:
    # In float64, 0.1 + 0.2 - 0.3 would leave 5.5e-17 behind, and 16777217.0 would be odd.
    source = (
        "o[0] = 1.0 / 3;\no[1] = (16777217.0 == 16777216.0);\no[2] = float(0.1h) + float(3.0bf);"
    )
    got = run(source, shape=(3,))
    assert got[0] == np.float32(1) / np.float32(3)
    assert got[1] == 1
    assert got[2] == np.float32(np.float16(0.1)) + 3


@pytest.mark.parametrize(
    ("expression", "reference"),
    [
        ("precise::exp(x)", np.exp),
        ("metal::precise::exp(x)", np.exp),
        ("precise::log(x)", np.log),
        ("metal::precise::rsqrt(x)", lambda x: 1 / np.sqrt(x)),
        ("precise::tanh(x)", np.tanh),
        ("max(x, 0.5f)", lambda x: np.maximum(x, 0.5)),
        ("clamp(x, 0.5f, 1.0f)", lambda x: np.clip(x, 0.5, 1)),
        ("fma(x, x, x)", lambda x: x * x + x),
        ("precise::pow(x, 1.5f)", lambda x: x**1.5),
        ("1.0f / (1.0f + precise::exp(-x))", lambda x: 1 / (1 + np.exp(-x))),
        ("float(half(x) * 2.0h)", lambda x: 2 * x.astype(np.float16)),
        ("sign(x) + abs(-x) + floor(x)", lambda x: 1 + x + np.floor(x)),
    ],
)
def test_maths(run: Run, rng: np.random.Generator, expression: str, reference: Any) -> None:
    a = rng.uniform(0.1, 3, 50).astype(np.float32)
    source = f"uint i = thread_position_in_grid.x;\nfloat x = a[i];\no[i] = {expression};"
    got = run(source, [a], shape=(50,), grid=(50,), group=(50,))
    np.testing.assert_allclose(
        got, reference(a.astype(np.float64)), rtol=1e-3 if "half" in expression else 1e-6
    )


def test_functions_without_a_namespace_may_be_the_fast_ones(
    run: Run, rng: np.random.Generator
) -> None:
    """Check that they are as inexact as the specification's fast-math table allows, not more."""
    a = rng.uniform(0.1, 30, 200).astype(np.float32)
    exact = a.astype(np.float64)
    bounds = {  # in units in the last place
        "exp": (np.exp(exact), 3 + np.floor(2 * exact)),
        "log": (np.log(exact), np.where(exact <= 2, np.inf, 3)),
        "rsqrt": (exact**-0.5, np.full(200, 2)),
    }
    names = list(bounds)
    for how in ("", "fast::"):
        calls = "\n".join(f"o[{k} * 200 + i] = {how}{name}(a[i]);" for k, name in enumerate(names))
        got = run(
            f"uint i = thread_position_in_grid.x;\n{calls}",
            [a],
            shape=(3, 200),
            grid=(200,),
            group=(200,),
        )
        for one, (want, ulps) in zip(got, bounds.values(), strict=True):
            off = np.abs(one - want) / np.spacing(np.abs(want).astype(np.float32))
            assert (off <= ulps + 2).all()  # with what the exact ones are off
            assert (off >= 1.5).any()


# ---- vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_vectors(run: Run, dtype: str) -> None:
    source = """
        using T4 = vec<T, 4>;
        uint i = thread_position_in_grid.x;
        const device T4* p = reinterpret_cast<const device T4*>(a);
        T4 t = p[i];
        float4 v = float4(t) + (float4)t * static_cast<float4>(vec<T, 4>(T(1)));
        v.xy = v.yx;
        v = max(v, 0.0f) + float4(float2(0), 1, v.w - v.w);
        *(device T4*)(o + 4 * i) = T4(v.x, v.y, dot(v, float4(0, 0, 1, 0)), v[3]);
    """
    kind = getattr(mx, dtype)
    a = mx.arange(48.0).astype(kind)
    got = run(source, [a], shape=(48,), dtype=kind, grid=(12,), group=(12,), template=[("T", kind)])
    x = 2 * np.arange(48.0).reshape(12, 4)
    expected = np.stack([x[:, 1], x[:, 0], x[:, 2] + 1, x[:, 3]], 1)
    np.testing.assert_array_equal(got.astype(np.float64).reshape(12, 4), expected)


def test_vector_conversions_change_values_not_bits(run: Run) -> None:
    source = """
        int4 i = int4(float4(1.5f, -2.5f, 3, 4));
        float4 f = float4(i) + (float4)uint4(1u);
        bfloat4 b = bfloat4(half4(f));
        uchar4 c = uchar4(as_type<uchar4>(0x04030201u));
        for (int k = 0; k < 4; k++) o[k] = float(b[k]) + 100 * c[k];
    """
    assert run(source, shape=(4,)).tolist() == [102, 199, 304, 405]


def test_structs_member_by_member(run: Run) -> None:
    header = """
        struct Pair { float x[3]; int n; float sum() const { return x[0] + x[1] + n; } };
        constant Pair fixed[2] = {{{1, 2, 3}, 4}, {{5, 6, 7}, 8}};
    """
    source = """
        threadgroup Pair shared[2];
        const device Pair* p = reinterpret_cast<const device Pair*>(a);
        Pair own = {{p[1].x[0], p[1].x[1], 0}, 3};
        shared[1].n = fixed[1].n;
        o[0] = own.sum();
        o[1] = shared[1].n;
    """
    a = np.arange(8, dtype=np.float32)
    assert run(source, [a], shape=(2,), header=header).tolist() == [12, 8]


def test_select_any_all(run: Run) -> None:
    source = """
        float4 v = float4(1, -2, 3, -4), w = select(v, -v, v < 0.0f);
        o[0] = any(v < -3.0f); o[1] = all(v < -3.0f); o[2] = w.y; o[3] = w.z;
    """
    assert run(source, shape=(4,)).tolist() == [1, 0, 2, 3]


def test_helpers_may_be_overloaded_by_address_space(run: Run) -> None:
    header = """
        constant float factors[3] = {1, 10, 100};
        float first(const device float* p) { return p[0] * factors[0]; }
        float first(const constant float* p) { return p[0] * factors[1]; }
        float first(const threadgroup float* p) { return p[0] * factors[2]; }
        template <typename P> float twice(P p) { return 2 * p[0]; }
    """
    source = """
        threadgroup float x[2];
        x[0] = 3;
        o[0] = first(a) + first(b) + first(x) + twice(a) + twice(x);
    """
    assert run(source, [np.ones(8), np.full(7, 2.0)], header=header) == 1 + 20 + 300 + 2 + 6
