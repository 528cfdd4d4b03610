"""The kernels on small matrices, many to a simdgroup: right, few bytes moved, and guarded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import (  # noqa: E402
    BACKEND,
    BOUNDS,
    SPACE,
    WRONG,
    Fault,
    agree,
    cramped,
    hold_by_the_kit,
    seeded,
)
from mhc_backends.kernels import table  # noqa: E402
from mhc_backends.kernels.mlx import Kernels, Out, Sizes  # noqa: E402
from mhc_backends.kernels.ops import _projection  # noqa: E402
from mhc_core.math import mappings  # noqa: E402

Options = dict[str, Any]

# ---- the ops -------------------------------------------------------------------------------------

OPS: dict[str, list[Options]] = {
    "sinkhorn": [
        {"iterations": 20, "eps": 1e-6, "first": "columns"},
        {"iterations": 20, "eps": 0.0, "first": "rows"},
        {"iterations": 2, "eps": 0.1, "first": "rows"},
        {"iterations": 1, "eps": 1e-6, "first": "rows"},
        {"iterations": 1, "eps": 0.0, "first": "columns"},
    ],
    "static_mappings": [{"iterations": 20}, {"iterations": 2}],
    "sinkhorn_knopp": [
        {"max_iterations": 20, "epsilon": 0.02, "log_space": True},
        {"max_iterations": 5, "epsilon": 0.02, "log_space": False},
        {"max_iterations": 3, "epsilon": 0.0, "log_space": True},
    ],
}
# T and n, those first that see most: arrays of few numbers are in another address space
SIZES = [(1, 1), (19, 4), (5, 3), (21, 2), (9, 5), (3, 9), (3, 17), (3, 32), (37, 1)]
SEGMENT = 20  # iterations whose divisors are kept at a time


def _draw(op: str, T: int, n: int, dtype: Any = mx.float32, spread: float = 1.0) -> list[mx.array]:
    rng = np.random.default_rng(n)
    shapes = {"logits": (T, n, n), "matrix": (T, n, n), "h_res_raw": (T, n, n)}
    hosts = [rng.normal(0, spread, shapes.get(a, (T, n))) for a in mhc.math.load(op).OP.arrays]
    return [mx.array(host.astype(np.float32)).astype(dtype) for host in hosts]


def _outputs(op: str, primals: list[mx.array], options: Options, backend: str) -> list[mx.array]:
    made = getattr(mhc, op)(*primals, **options, backend=backend)
    return [made] if isinstance(made, mx.array) else list(made)


def _cotangents(outputs: list[mx.array]) -> tuple[mx.array, ...]:
    return tuple(mx.random.normal(o.shape, key=mx.random.key(2)) for o in outputs)


def _run(op: str, primals: list[mx.array], options: Options) -> None:
    """Run an op and its vjp on the simulator, in two orders of the threads, and compare."""
    want = _outputs(op, primals, options, "mlx-compiled")
    given = _cotangents(want)
    with simulator.options(schedules=["forward", "reversed"]):
        agree(_outputs(op, primals, options, BACKEND), want)
        got = mhc.vjp(op, primals, given, **options, backend=BACKEND)
    agree(got, mhc.vjp(op, primals, given, **options, backend="mlx-compiled"))


def _run_all(op: str) -> None:
    """Run every size, and each way to iterate for one of them."""
    for T, n in SIZES:
        _run(op, _draw(op, T, n), OPS[op][n % 2])
    for options in OPS[op]:
        _run(op, _draw(op, 5, 3), options)


@pytest.mark.parametrize("op", OPS)
def test_many_matrices_in_few_threadgroups(op: str) -> None:
    with cramped():
        _run_all(op)
        _run(op, _draw(op, 19, 4, mx.bfloat16), OPS[op][0])


@pytest.mark.parametrize("op", OPS)
def test_more_iterations_than_divisors_are_kept(op: str) -> None:
    _many_iterations(op)


def _many_iterations(op: str) -> None:
    options = dict(OPS[op][0])
    for count in (SEGMENT + 1, 2 * SEGMENT + 1, 2 * SEGMENT + 7):
        options["max_iterations" if op == "sinkhorn_knopp" else "iterations"] = count
        if op == "sinkhorn_knopp":
            options["epsilon"] = 0.0
        _run(op, _draw(op, 9, 3), options)


def test_the_floor() -> None:
    _floored("sinkhorn_knopp")


def _floored(op: str) -> None:
    """Check that, outside of the log domain, powers have a floor and no gradient below it."""
    if op == "sinkhorn_knopp":
        (matrix,) = _draw(op, 9, 4)
        matrix = mx.where(mx.arange(4)[:, None] == 1, -40.0, matrix)  # a row that is all floor
        _run(op, [matrix], {"max_iterations": 3, "epsilon": 0.0, "log_space": False})


def _mixed(op: str) -> list[mx.array]:
    """Draw matrices of which every other one is iterated in the log domain, where eps is 0."""
    primals = _draw(op, 9, 4)
    wide = mx.where(mx.arange(9) % 2 == 1, 20.0, 1.0).reshape(9, 1, 1)
    return [a * wide if a.ndim == 3 else a for a in primals]


def _alone(op: str) -> None:
    """Compare matrices, run together, with each run by itself."""
    for options in OPS[op]:
        primals = _mixed(op)
        together = _outputs(op, primals, options, BACKEND)
        given = _cotangents(together)
        gradients = mhc.vjp(op, primals, given, **options, backend=BACKEND)
        for t in range(9):
            own = [array[t : t + 1] for array in primals]
            cotangents = tuple(array[t : t + 1] for array in given)
            alone = _outputs(op, own, options, BACKEND)
            alone += mhc.vjp(op, own, cotangents, **options, backend=BACKEND)
            for one, many in zip(alone, [*together, *gradients], strict=True):
                assert mx.array_equal(one, many[t : t + 1]), f"matrix {t} is off by its neighbours"


@pytest.mark.parametrize("op", OPS)
def test_a_matrix_does_not_depend_on_its_neighbours(op: str) -> None:
    _alone(op)


@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check also a tuning file that asks for more simdgroups than have memory for divisors."""
    primals, options = _draw(op, 300, 4), OPS[op][0]
    given = _cotangents(_outputs(op, primals, options, BACKEND))

    def results() -> list[mx.array]:
        gradients = mhc.vjp(op, primals, given, **options, backend=BACKEND)
        return [*_outputs(op, primals, options, BACKEND), *gradients]

    before = results()
    many = {name: replace(shape, threads=1024) for name, shape in table.TABLE.items()}
    monkeypatch.setattr(table, "TABLE", many)
    monkeypatch.setattr(table, "MOST_THREADS", {"metal": 1024})  # as CUDA has them
    with simulator.record() as records:
        after = results()
    assert {record.threadgroup[0] for record in records} == {1024}
    assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_each_byte_travels_once(op: str) -> None:
    primals, options = _draw(op, 64, 4), OPS[op][0]
    given = _cotangents(_outputs(op, primals, options, BACKEND))
    for call in (
        lambda: getattr(mhc, op)(*primals, **options, backend=BACKEND),
        lambda: mhc.vjp(op, primals, given, **options, backend=BACKEND),
    ):
        with simulator.record() as records:
            call()
        (record,) = records
        arrays = [one for one in record.traffic.values() if one.size >= 64 * 4 * 4]
        assert arrays
        assert all(one.loaded + one.stored == one.size for one in arrays)


def test_functions_that_may_be_fast_fail_the_kit() -> None:
    """Check that ``precise::`` is needed: without it, macOS 15 may take the fast functions."""
    fast = Fault("common", "fast functions", "precise::", "", WRONG, "sinkhorn")
    with seeded(fast), pytest.raises(AssertionError, match=fast.shows):
        hold_by_the_kit("sinkhorn", "forward")


# ---- the kernels that end a projection's way back ------------------------------------------------

KERNELS = Kernels(simulator.metal_kernel, "metal")
VARIANTS = [
    mhc.PAPER,
    mhc.DEEPSEEK_V4,
    mhc.LIGER,
    replace(mhc.PAPER, sinkhorn_first="rows", res_transposed=True, post_scale=1.5),
    replace(mhc.XING40, sinkhorn_eps=0.1, sinkhorn_iterations=2, sinkhorn_clamp=(-1.0, 1.5)),
]


def _host(rng: np.random.Generator, *shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


PULL_UNIT = 2.0**-24  # pull_unit() of common/pull.h, in which kernels hand on the pull


def _near(got: mx.array, want: Any) -> None:
    off = np.abs(np.array(got.astype(mx.float32)) - want).max() / np.abs(want).max()
    assert off < 4e-6, f"is off by {off:.2g}"


def _mappings_vjp(T: int, n: int, variant: Any, dtype: Any = mx.float32) -> None:
    """Compare with the maths, through a phi that passes u on and streams that show the pullback."""
    rng, C, m = np.random.default_rng(n), n + 3, n * n + 2 * n
    arrays = {
        "u": _host(rng, T, m),
        "r": np.exp(0.3 * _host(rng, T, 1)),
        "scale": _host(rng, 3),
        "bias": _host(rng, m),
        "g_pre": _host(rng, T, n),
        "g_post": _host(rng, T, n),
        "g_res": _host(rng, T, n, n),
    }
    inputs = {name: mx.array(host) for name, host in arrays.items()}
    for name in ("scale", "bias"):
        inputs[name] = inputs[name].astype(dtype)
    v = variant
    outputs = {"du": (T, m), "pull": (T, 1), "terms": (T, m + 3)}
    with simulator.options(schedules=["forward", "reversed"]):
        du, pull, terms = KERNELS(
            "mappings_vjp",
            inputs,
            {name: Out(shape, mx.float32) for name, shape in outputs.items()},
            Sizes(T, n, C),
            _projection.settings(v),
            K=n * C,
            **_projection.constants(v),
        )

    u, r, scale, bias, *cotangents = (
        np.array(array.astype(mx.float32)).astype(np.float64) for array in inputs.values()
    )
    x, phi = np.zeros((T, n, C)), np.eye(m, n * C)
    x.reshape(T, n * C)[:, m] = 1.0
    xp = mappings._xp.namespace(x)
    dx, _, dscale, dbias = mappings.pullback(
        xp, x, phi, scale, bias, mappings.Projected(u, r), cotangents, variant
    )
    dx = dx.reshape(T, n * C)
    _near(du, dx[:, :m])
    _near(pull * PULL_UNIT, -dx[:, m : m + 1])
    _near(terms[:, :m].sum(axis=0), dbias)
    _near(terms[:, m:].sum(axis=0), dscale)
    back = du / (inputs["r"] * _columns(inputs["scale"], n))  # dz, each where it belongs
    _near(terms[:, :m], np.array(back))


def _columns(scale: mx.array, n: int) -> mx.array:
    return mx.concatenate(
        [mx.broadcast_to(scale[i], (size,)) for i, size in enumerate((n, n, n * n))]
    )


def _head_vjp(T: int, n: int, dtype: Any = mx.float32) -> None:
    rng, C = np.random.default_rng(n), 5
    inputs = {
        "u": mx.array(_host(rng, T, n)),
        "r": mx.array(np.exp(0.3 * _host(rng, T, 1))),
        "scale": mx.array(_host(rng, 1)).astype(dtype),
        "bias": mx.array(_host(rng, n)).astype(dtype),
        "g_w": mx.array(_host(rng, T, n)),
    }
    outputs = {"du": (T, n), "pull": (T, 1), "terms": (T, n + 1)}
    with simulator.options(schedules=["forward", "reversed"]):
        du, pull, terms = KERNELS(
            "head_vjp",
            inputs,
            {name: Out(shape, mx.float32) for name, shape in outputs.items()},
            Sizes(T, n, C),
            K=n * C,
        )
    u, r, scale, bias, g = (
        np.array(array.astype(mx.float32)).astype(np.float64) for array in inputs.values()
    )
    s = 1 / (1 + np.exp(-(u * r * scale + bias)))
    dz = g * s * (1 - s)
    _near(du, dz * scale * r)
    _near(pull * PULL_UNIT, (dz * scale * u).sum(axis=1, keepdims=True) * r**3 / (n * C))
    _near(terms[:, :n], dz)
    _near(terms[:, n:], (dz * u * r).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_mappings_vjp(variant: Any) -> None:
    for T, n in SIZES if variant is VARIANTS[0] else SIZES[1:4]:
        _mappings_vjp(T, n, variant)
    with cramped():
        _mappings_vjp(37, 4, variant, mx.bfloat16)


def test_head_vjp() -> None:
    for T, n in SIZES:
        _head_vjp(T, n)
    with cramped():
        _head_vjp(37, 4, mx.bfloat16)


# ---- seeded faults -------------------------------------------------------------------------------

RACE = r"\(race\)|is off by"
ALONE = "off by its neighbours"
DIVERGENCE = "that thread .* does not reach"


def _slips(
    kernel: str, op: str, result: str, index: tuple[str, str], *arrays: str, index_by: str = ""
) -> list[Fault]:
    """Return slips that any of these kernels might have; ``result``'s statement is rounded."""
    name = result.partition(" = ")[0].split()[-1]
    rounded = f" for (int a = 0; a < N; a++) {name}.at[a] = float(half({name}.at[a]));"
    space = [
        Fault(
            kernel, f"{a}'s space", f"({a} + token", f"((const device float*){a} + token", SPACE, op
        )
        for a in arrays
    ]
    return [
        Fault(kernel, "tail", "there = token < T", "there = token <= T", BOUNDS, op),
        Fault(kernel, "index", *index, WRONG, op, index_by),
        Fault(kernel, "half sum", result, result.removeprefix("const ") + rounded, WRONG, op),
        *space,
    ]


LOADED = "load_line<N, FIRST_COLUMNS, false>(logits", "load_line<N, FIRST_COLUMNS, true>(logits"
KNOPP = "sinkhorn_knopp"
FAULTS = (
    *_slips(
        "sinkhorn",
        "sinkhorn",
        "const Floats<N> res = sinkhorn_matrix<N, LOG>(v, here, ITERATIONS, float(eps[0]));",
        LOADED,
        "logits",
    ),
    *_slips(
        "sinkhorn_vjp",
        "sinkhorn",
        "const Floats<N> dv ="
        " sinkhorn_matrix_vjp<N, LOG>(v, dres, here, ITERATIONS, float(eps[0]), own);",
        LOADED,
        "logits",
        "g",
    ),
    *_slips(
        KNOPP,
        KNOPP,
        "const Floats<N> v = load_line<N, false, false>(logits + token * N * N, there, here);",
        ("load_line<N, false, false>(logits", "load_line<N, true, false>(logits"),
        "logits",
    ),
    *_slips(
        "sinkhorn_knopp_vjp",
        KNOPP,
        "const Floats<N> dres = load_line<N, false, false>(g + token * N * N, there, here);",
        ("load_line<N, false, false>(g", "load_line<N, true, false>(g"),
        "logits",
        "g",
    ),
    *_slips(
        "static_mappings",
        "static_mappings",
        "const Floats<N> res = sinkhorn_matrix<N, true>(v, here, ITERATIONS, 0.0f);",
        ("float(h_post_raw[at])", "float(h_pre_raw[at])"),
        "h_res_raw",
    ),
    *_slips(
        "static_mappings_vjp",
        "static_mappings",
        "const Floats<N> dv = sinkhorn_matrix_vjp<N, true>(v, dres, here, ITERATIONS, 0.0f, own);",
        ("float(g_post[at])", "float(g_pre[at])"),
        "h_res_raw",
        "g_res",
        index_by="hold_by_the_kit",
    ),
    *_slips(
        "mappings_vjp",
        "mappings_vjp",
        "if (CLAMPED) dz = clamped_vjp(z, dz, clamp_low, clamp_high);",
        ("float(g_post[token * N + b])", "float(g_pre[token * N + b])"),
        "g_res",
    ),
    Fault(
        "mappings_vjp",
        "half sum of a group",
        "add_dot(0.0f, dz, product)",
        "float(half(add_dot(0.0f, dz, product)))",
        WRONG,
        "mappings_vjp",
    ),
    Fault(
        "mappings_vjp",
        "H_res's orientation",
        "load_line<N, FIRST_COLUMNS, TRANSPOSED>(products",
        "load_line<N, FIRST_COLUMNS, false>(products",
        WRONG,
        "mappings_vjp",
    ),
    Fault("head_vjp", "tail", "there = token < T;", "there = token <= T;", BOUNDS, "head_vjp"),
    Fault("head_vjp", "index", "bias[b]", "bias[0]", WRONG, "head_vjp"),
    Fault("head_vjp", "half sum", "sum = dz", "sum = half(dz)", WRONG, "head_vjp"),
    Fault(
        "head_vjp", "space", "= float(u[", "= float(((const device float*)u)[", SPACE, "head_vjp"
    ),
    # what they share
    Fault(
        "common", "half sum along a", "return (parts.at[0]", "return half(parts.at[0]", WRONG, KNOPP
    ),
    Fault(
        "common",
        "half sum along b",
        "return u + v;",
        "return half(u + v);",
        WRONG,
        KNOPP,
        "9 x 5",
    ),
    Fault(
        "common",
        "half sum over few lanes",
        "+= simd_partner(v.at[a], 1)",
        "+= half(simd_partner(v.at[a], 1))",
        WRONG,
        KNOPP,
    ),
    Fault(
        "common",
        "few lanes",
        "simd_partner(v.at[a], 2)",
        "simd_partner(v.at[a], 1)",
        WRONG,
        "sinkhorn",
    ),
    Fault("common", "own divisor", "if (a == line<N>(here)) out", "if (a == 0) out", WRONG, KNOPP),
    Fault("common", "eps", "? sum_a(v) + eps :", "? sum_a(v) :", WRONG, "sinkhorn", "options 2"),
    Fault("common", "lanes", "simd_from(v, first + a)", "simd_from(v, a)", WRONG, "sinkhorn"),
    Fault(
        "common",
        "halves",
        "simd_partner(upper ? lower_one : upper_one",
        "simd_partner(upper ? upper_one : lower_one",
        WRONG,
        "sinkhorn",
        "alone",
    ),
    Fault(
        "common",
        "padding",
        "active && inside<N>(here))",
        "active)",
        WRONG,
        "static_mappings",
        "5 x 3",
    ),
    Fault(
        "common",
        "underflow",
        "NARROW = 40",
        "NARROW = 4000",
        "nan|NaN|finite",
        "sinkhorn",
        "hold_by_the_kit",
    ),
    Fault(
        "common",
        "one choice for all",
        "if (!linear) out =",
        "out =",
        ALONE,
        "static_mappings",
        "alone",
    ),
    Fault(
        "common",
        "the divisors' places",
        "kept[2 * (k - begin) * SIMD + lane] =",
        "kept[2 * (k - begin) * SIMD] =",
        RACE,
        "sinkhorn",
    ),
    Fault("common", "own divisors", "% DIVISOR_SIMDGROUPS * DIVISORS", "* 0", RACE, "sinkhorn"),
    Fault(
        "common",
        "segments",
        "if (end == most) out.G",
        "if (begin == 0) out.G",
        WRONG,
        "sinkhorn",
        "many_iterations",
    ),
    Fault("common", "frozen on the way back", "= !FROZEN || k < steps;", "= true;", WRONG, KNOPP),
    Fault(
        "common",
        "one axis",
        "precise::max(fabs(sum_a(v) - 1.0f), fabs(b - 1.0f))",
        "fabs(b - 1.0f)",
        WRONG,
        KNOPP,
    ),
    Fault(
        "common",
        "one end for all",
        "active = active && !(error < epsilon);",
        "active = simd_any(active && !(error < epsilon));",
        f"{ALONE}|{WRONG}",
        KNOPP,
    ),
    Fault(
        "common",
        "lanes that leave",
        "active = active && !(error < epsilon);",
        "active = active && !(largest_error(values<SPACE>(out.v), here) < epsilon);",
        DIVERGENCE,
        KNOPP,
    ),
    Fault(
        "common",
        "the floor",
        "<= smallest_logit() ? 0.0f : out.at[a]",
        "<= -100.0f ? 0.0f : out.at[a]",
        WRONG,
        KNOPP,
        "floored",
    ),
)


def _checks(op: str) -> dict[str, Callable[[], None]]:
    """Return all that is tried of an op, by name: sizes by tokens and streams."""
    if op == "mappings_vjp":
        return {
            f"{T} x {n}, {k}": functools.partial(_mappings_vjp, T, n, variant)
            for T, n in SIZES[:4]
            for k, variant in enumerate(VARIANTS[:2])
        }
    if op == "head_vjp":
        return {f"{T} x {n}": functools.partial(_head_vjp, T, n) for T, n in SIZES}
    checks: dict[str, Callable[[], None]] = {
        f"{T} x {n}": functools.partial(_run, op, _draw(op, T, n), OPS[op][n % 2]) for T, n in SIZES
    }
    for k, options in enumerate(OPS[op]):
        checks[f"options {k}"] = functools.partial(_run, op, _draw(op, 5, 3), options)
    others = (_alone, _floored, _many_iterations, hold_by_the_kit, _cramped)
    return {**checks, **{one.__name__.lstrip("_"): functools.partial(one, op) for one in others}}


def _cramped(op: str) -> None:
    with cramped():
        _run_all(op)


def _try_everything(op: str, first: str = "") -> None:
    """Try all, and first of all what sees a fault."""
    checks = _checks(op)
    for name in dict.fromkeys([first or next(iter(checks)), *checks]):
        checks[name]()


@pytest.mark.parametrize("op", [*OPS, "mappings_vjp", "head_vjp"])
def test_nothing_is_caught_where_nothing_is_wrong(op: str) -> None:
    _try_everything(op)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try_everything(fault.op, fault.first)
