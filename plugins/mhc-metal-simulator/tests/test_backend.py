"""The backend ``mlx-metal-simulator``: mlx-metal's kernels are right, move few bytes, are guarded.

Guarded means: each usual kind of slip, made in a copy of each kernel, is caught.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

import test_gated_kernels  # noqa: E402
import test_norm_inside  # noqa: E402
import test_projection_kernels  # noqa: E402
import test_sinkhorn_kernels  # noqa: E402
import test_static_kernels  # noqa: E402
import test_unmixed_kernels  # noqa: E402
from kernel_checks import (  # noqa: E402
    BACKEND,
    BOUNDS,
    RACE,
    SIZES,
    SPACE,
    WRONG,
    Fault,
    Unit,
    assert_all_are_seeded,
    cramped,
    draw,
    hold_by_the_kit,
    keep_coverage,
    run,
    seeded,
)
from mhc_backends import kernels  # noqa: E402
from mhc_backends.kernels.text import flat  # noqa: E402
from mhc_backends.mlx_common import as_tuple  # noqa: E402
from mhc_conformance import BackendConformance, Subject  # noqa: E402
from mhc_conformance.cases import cases, data  # noqa: E402

from mhc_metal_simulator import coverage  # noqa: E402
from mhc_metal_simulator.backend import missing  # noqa: E402
from mhc_metal_simulator.compiler import find_compiler  # noqa: E402
from mhc_metal_simulator.launch import LaunchRecord  # noqa: E402


class TestConformance(BackendConformance):
    backend = BACKEND

    @pytest.fixture(autouse=True)
    def covers(self, run_folder: Path) -> None:
        self.folder = run_folder

    def _hold(self, op: str, dtype: str, kind: str) -> None:
        """Run a check, and keep its coverage for test_coverage.py, which need not run it again."""
        with simulator.record() as launches:
            super()._hold(op, dtype, kind)
        found = coverage.covered(coverage.Ran(op, dtype, f"the check {kind}"), launches)
        keep_coverage(self.folder, (op, dtype, kind), found)


@pytest.mark.parametrize("unit", [u for u in coverage.units() if " with " in u[2]], ids=" ".join)
def test_either_kernels_run_every_case(unit: Unit, run_folder: Path) -> None:
    """Check where all tokens count as few, or none; test_coverage.py reads what this covers."""
    keep_coverage(run_folder, unit, coverage.checked(*unit))


# ---- what the backend says of itself -------------------------------------------------------------


def test_it_is_taken_by_name_alone() -> None:
    spec = mhc.backends()[BACKEND].spec
    assert spec.module == "mhc_metal_simulator.backend"
    assert not spec.automatic
    assert spec.ops == mhc.backends()["mlx-metal"].spec.ops
    assert set(spec.without) == {"vmap", "compile"}


def test_without_a_compiler_it_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setenv("MHC_SIMULATOR_CLANG", "/no/clang")
    find_compiler.cache_clear()
    try:
        assert "'/no/clang', which is no clang of version" in str(missing())
    finally:
        find_compiler.cache_clear()


def test_without_gradients_there_are_none() -> None:
    x, h_pre = mx.random.normal((3, 4, 8)), mx.random.normal((3, 4))

    def loss(x: mx.array) -> mx.array:
        with mhc.no_grad():
            return mhc.aggregate(x, h_pre, backend=BACKEND).sum()

    assert mx.array_equal(loss(x), mhc.aggregate(x, h_pre, backend=BACKEND).sum())
    with pytest.raises(ValueError, match="Not implemented for CustomKernel"):  # MLX's own error
        mx.eval(mx.grad(loss)(x))


@pytest.mark.parametrize("op", ["combine", "combine_pre", "head", "static_layer"])
def test_second_derivatives_are_those_of_the_neutral_maths(op: str) -> None:
    case = next(cases(op))
    primals, cotangents = data(case, "float32", 0)
    own = [mx.array(p) for p in primals]
    given, every = [mx.array(c) for c in cotangents], list(range(len(own)))

    def gradients(backend: str) -> Any:
        function = Subject(backend).function(case)

        def loss(*arrays: mx.array) -> mx.array:
            pairs = zip(given, as_tuple(function(*arrays)), strict=True)
            return sum(((c * mx.sin(o)).sum() for c, o in pairs), start=mx.array(0.0))

        def norm(*arrays: mx.array) -> mx.array:
            squares = [(g**2).sum() for g in mx.grad(loss, argnums=every)(*arrays)]
            return sum(squares, start=mx.array(0.0))

        return mx.grad(norm, argnums=every)(*own)

    for one, other in zip(gradients(BACKEND), gradients("mlx-compiled"), strict=True):
        assert float(mx.abs(one - other).max()) < 1e-4 * float(mx.abs(other).max())


def test_forward_mode_names_the_op_and_the_way_out() -> None:
    x, h_pre = mx.random.normal((3, 4, 8)), mx.random.normal((3, 4))

    def loss(x: mx.array) -> mx.array:
        return mhc.aggregate(x, h_pre, backend=BACKEND).sum()

    for function in (loss, mx.grad(loss)):
        with pytest.raises(
            NotImplementedError, match=r"aggregate: kernels .*backend='mlx-compiled'"
        ):
            mx.jvp(function, [x], [x])


def test_under_vmap_it_raises_as_metal_does() -> None:
    x, h_pre = mx.zeros((3, 2, 4, 8)), mx.zeros((3, 2, 4))
    mapped = mx.vmap(lambda *arrays: mhc.aggregate(*arrays, backend=BACKEND))
    with pytest.raises(simulator.TracedCallError, match="vmap"):
        mapped(x, h_pre)


# ---- addresses ---------------------------------------------------


OPS = ("aggregate", "combine")  # whose faults are seeded here


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("elements", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_vectors_begin_anywhere(dtype: Any, elements: int, start: int) -> None:
    """Check views that begin where no vector may: the dialect then loads scalars."""
    kernel = simulator.metal_kernel(
        "copied",
        ["a"],
        ["o"],
        f"store(o + {start}, load<{elements}>(a + {start}));",
        flat("metal", "common/load.h", "common/store.h"),
    )
    a = mx.arange(24).astype(dtype)
    with simulator.options(unwritten="ignore"):
        (out,) = kernel(
            inputs=[a],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(24,)],
            output_dtypes=[dtype],
        )
    assert mx.array_equal(out[start : start + elements], a[start : start + elements])


# ---- traffic -------------------------------------------------------------------------------------

T, N, C = 64, 4, 4096
STREAMS, LAYER = T * N * C * 2, T * C * 2  # bytes in bfloat16


def _launched(call: Callable[[], Any]) -> LaunchRecord:
    with simulator.record() as records:
        call()
    (launched,) = records
    return launched


def _vjp(op: str) -> Callable[[], Any]:
    primals = draw(op, (T, N, C), mx.bfloat16)
    like = primals[0] if op == "combine" else primals[0][:, 0]
    return lambda: mhc.vjp(op, primals, like, backend=BACKEND)


def _forward(op: str) -> Callable[[], Any]:
    primals = draw(op, (T, N, C), mx.bfloat16)
    return lambda: getattr(mhc, op)(*primals, backend=BACKEND)


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        (_forward("aggregate"), STREAMS, LAYER),
        (_vjp("aggregate"), STREAMS + LAYER, STREAMS),
        (_forward("combine"), STREAMS + LAYER, STREAMS),
        (_vjp("combine"), 2 * STREAMS + LAYER, STREAMS + LAYER),
    ],
    ids=["aggregate", "aggregate vjp", "combine", "combine vjp"],
)
def test_traffic_is_ideal(call: Callable[[], Any], read: int, written: int) -> None:
    """Count every access of streams and layers; of mappings, which threads share, each byte once.

    A token's mappings are 80 bytes that all its threads read, from the cache but for the first.
    """
    traffic = _launched(call).traffic.values()
    arrays = [one for one in traffic if one.role != "metadata"]
    large = [one for one in arrays if one.size >= LAYER]
    assert sum(one.loaded for one in large) == read
    assert sum(one.stored for one in large) == written
    small = [one for one in arrays if one.size < LAYER]
    moved = read + written + sum(one.loaded_unique + one.stored for one in small)
    assert moved <= 1.05 * sum(one.size for one in arrays)


# ---- seeded faults -------------------------------------------------------------------------------


HALVED = "{{ {0} for (int k = 0; k < W; k++) {1}.at[k] = float(half({1}.at[k])); }}"
ADD = "sum = add(sum, value(weights, i), load<W>(streams + i * C + c));"
MIX = "sum = add(sum, value(res, i * N + j), xs[j]);"
CHANNELS = "c < C; c += next_channel"
TOO_FAR = "c <= C; c += next_channel"
MISALIGNED = f"{WRONG}|misaligned"  # where vectors are known to begin at their own multiples

FAULTS = (
    Fault("aggregate", "tail", CHANNELS, TOO_FAR, BOUNDS, "aggregate"),
    Fault(
        "aggregate", "index", "streams + i * C + c", "streams + c * N + i", MISALIGNED, "aggregate"
    ),
    Fault("aggregate", "half sum", ADD, HALVED.format(ADD, "sum"), WRONG, "aggregate"),
    Fault(
        "aggregate", "space", "(x) + token", "((const device float*)x) + token", SPACE, "aggregate"
    ),
    Fault("aggregate_vjp", "barrier", "    BARRIER;  //", "    //", RACE, "aggregate", "cramped"),
    Fault("aggregate_vjp", "tail", CHANNELS, TOO_FAR, BOUNDS, "aggregate"),
    Fault("aggregate_vjp", "index", "token * C + c", "token + c * T", MISALIGNED, "aggregate"),
    Fault(
        "aggregate_vjp",
        "half sum",
        "dweights[i] = add_dot(dweights[i], load<W>(streams + i * C + c), dh);",
        "dweights[i] = float(half(add_dot(dweights[i], load<W>(streams + i * C + c), dh)));",
        WRONG,
        "aggregate",
    ),
    Fault(
        "aggregate_vjp",
        "space",
        "(x) + token",
        "((const device float*)x) + token",
        SPACE,
        "aggregate",
    ),
    Fault("combine", "tail", CHANNELS, TOO_FAR, BOUNDS),
    Fault("combine", "index", "i * N + j", "j * N + i", WRONG),
    Fault("combine", "half sum", MIX, HALVED.format(MIX, "sum"), WRONG),
    Fault("combine", "space", "(x) + token", "((const device float*)x) + token", SPACE),
    Fault("combine_vjp", "barrier", "    BARRIER;  //", "    //", RACE, first="cramped"),
    Fault("combine_vjp", "tail", CHANNELS, TOO_FAR, BOUNDS),
    Fault("combine_vjp", "index", "value(res, i * N + j)", "value(res, j * N + i)", WRONG),
    Fault(
        "combine_vjp",
        "half sum",
        "sums[i] = add_dot(sums[i], g_i, layer);",
        "sums[i] = float(half(add_dot(sums[i], g_i, layer)));",
        WRONG,
    ),
    Fault("combine_vjp", "space", "at(y) + ", "at((const device float*)y) + ", SPACE),
    Fault("combine_vjp_wide", "first barrier", "BARRIER;\n\n// dx_j", "// dx_j", RACE),
    Fault("combine_vjp_wide", "last barrier", "BARRIER;  // the", "// the", RACE),
    Fault("combine_vjp_wide", "tail", "tile + k < C", "tile + k <= C", BOUNDS),
    Fault("combine_vjp_wide", "index", "res[i * N + j]", "res[j * N + i]", WRONG),
    Fault("combine_vjp_wide", "half sum", "sums[k] = sum;", "sums[k] = float(half(sum));", WRONG),
    Fault("combine_vjp_wide", "space", "= h_post +", "= (const device float*)h_post +", SPACE),
    Fault("sum_rows", "first barrier", "sum;\nBARRIER;", "sum;", RACE),
    Fault("sum_rows", "barrier of the tree", "BARRIER;\ncount", "count", RACE),
    Fault("sum_rows", "tail", "r < end;", "r <= end;", f"{BOUNDS}|{WRONG}"),
    Fault("sum_rows", "index", "a[r * K + column]", "a[column * R + r]", WRONG),
    Fault("sum_rows", "half sum", "sum += float", "sum = half(sum) + float", WRONG),
    Fault("sum_rows", "an odd tree", "(count + 1) / 2", "count / 2", RACE),
    Fault("common", "barrier", "BARRIER;\nfor (int k = here.id;", "for (int k = here.id;", RACE),
)


def _cramped(op: str) -> None:
    with cramped():
        for sizes in SIZES:
            for shared in (False, True):
                run(op, draw(op, sizes, shared=shared))


def _try_everything(op: str, first: str = "") -> None:
    """Run the kit's checks of an op in the dtype that sees most, and in small groups."""
    checks = {"hold_by_the_kit": hold_by_the_kit, "cramped": _cramped}
    for name in dict.fromkeys([first or "hold_by_the_kit", *checks]):
        checks[name](op)


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_caught_where_nothing_is_wrong(op: str) -> None:
    _try_everything(op)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try_everything(fault.op, fault.first)


def test_faults_of_every_kind_are_seeded() -> None:
    """Check the kernels that have seeded faults; test_every_op.py runs all kernels."""
    others = (
        test_gated_kernels,
        test_norm_inside,
        test_projection_kernels,
        test_sinkhorn_kernels,
        test_static_kernels,
        test_unmixed_kernels,
    )
    faults = (*FAULTS, *(fault for other in others for fault in other.FAULTS))
    seeded_in = {fault.kernel for fault in faults} - {"common"}
    assert len(seeded_in) > 30
    assert seeded_in <= set(kernels.KERNELS)
    assert_all_are_seeded(faults, sorted(seeded_in))
