"""The kernels for streams that are not mixed, for many tokens and for few: right, and guarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import (  # noqa: E402
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
from mhc_backends.kernels.ops import combine, combine_pre, mappings, pre  # noqa: E402
from mhc_backends.mlx_common import as_tuple  # noqa: E402
from test_projection_kernels import (  # noqa: E402
    FEW,
    FEWEST,
    KERNELS,
    MANY,
    Size,
    on_their_way,
    small,
)

from mhc_metal_simulator import traffic  # noqa: E402

VARIANT = replace(mhc.HY_V4, norm_eps=1e-3, pre_eps=0.2, post_scale=1.5, post_eps=0.3)
TINY = Size(2, 1, 3)  # of which MLX passes all but phi in constant memory
TWO_ORDERS = ["forward", "reversed"]


def _draw(op: str, size: Size, shared: bool = False) -> list[mx.array | None]:
    """Draw an op's arrays; an x' that others read is exact: its rounding cannot differ."""
    T, n, C, dtype = size
    rng = np.random.default_rng(n)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    def steps(*shape: int) -> mx.array:
        if op == "combine":
            return normal(*shape)
        return mx.array(rng.integers(-2, 3, shape).astype(np.float32))

    streams, layer = (steps(T, *last).astype(getattr(mx, dtype)) for last in ((n, C), (C,)))
    written = [layer, steps(*(() if shared else (T,)), n) / 2, None]
    parameters = [normal(2 * n, n * C) / (2 * n * C) ** 0.5, normal(2), normal(2 * n)]
    if op == "combine":
        return [streams, *written]
    if op != "combine_pre":
        return [streams, *parameters]
    return [streams, *written, *parameters, *([normal(n)] if shared else [])]


def _wide(arrays: Sequence[mx.array | None]) -> list[Any]:
    return [None if one is None else as_float64([one])[0] for one in arrays]


def _present(arrays: Any) -> list[Any]:
    return [one for one in as_tuple(arrays) if one is not None]


def _held(op: str, size: Size, busy: int, shared: bool = False) -> list[mx.array]:
    """Run an op, what its vjp saves, and the vjp; compare with NumPy in float64."""
    module = {"combine": combine, "combine_pre": combine_pre, "mappings": mappings, "pre": pre}[op]
    static = {} if op == "combine" else {"variant": VARIANT}
    primals, saved = _draw(op, size, shared), ()
    with small(busy), simulator.record() as records, simulator.options(schedules=TWO_ORDERS):
        if static:
            outputs, saved = module.forward_with_saved(KERNELS, *primals, **static)
        else:
            outputs = (module.forward(KERNELS, *primals),)
        kernels = [traffic.kernel_of(record) for record in records]
        if op != "mappings":
            few = [name for name in kernels if name.endswith(("_few", "_k_blocks"))]
            assert bool(few) == (busy != MANY and op != "combine"), kernels
        given = iter(cotangents(_present(outputs)))
        every = [None if one is None else next(given) for one in outputs]
        pulled = module.vjp(KERNELS, tuple(primals), tuple(every), tuple(saved) or None, **static)
    wide, wide_given = _wide(primals), tuple(_wide(every))
    truth = getattr(mhc, op)(*wide[:7], *static.values(), *wide[7:], backend="numpy")
    made = _present(outputs)
    agree(made, rounded(tuple(_present(truth)), made))
    truth = mhc.vjp(op, tuple(wide), wide_given, **static, backend="numpy")
    gradients = _present(pulled)
    agree(gradients, rounded(tuple(_present(truth)), gradients))
    return [*made, *saved, *gradients]


def _same(one: Sequence[mx.array], other: Sequence[mx.array]) -> None:
    pairs = zip(one, other, strict=True)
    assert all(mx.array_equal(a, b) for a, b in pairs), "the kernels for few give other bits"


def _combine(size: Size) -> None:
    for shared in (False, True):
        _held("combine", size, MANY, shared)


def _pre(size: Size) -> None:
    _held("pre", size, MANY)


def _mappings(size: Size) -> None:
    _held("mappings", size, FEW)


def _combine_pre(size: Size) -> None:
    for shared in (False, True):
        _held("combine_pre", size, MANY, shared)


def _ahead(size: Size) -> None:
    """Copy K blocks ahead, as only CUDA does by itself: that changes no bit."""
    at_once = _held("combine_pre", size, MANY)
    for k_blocks in (1, 2):
        with on_their_way(k_blocks):
            _same(_held("combine_pre", size, MANY), at_once)


def _few(size: Size) -> None:
    _same(_held("combine_pre", size, FEW), _held("combine_pre", size, MANY))


def _fewest(size: Size) -> None:
    for op, shared in (("pre", False), ("combine_pre", True)):
        _same(_held(op, size, FEWEST, shared), _held(op, size, MANY, shared))


NARROW = "bfloat16"
CHECKS: dict[str, tuple[Callable[[Size], None], Sequence[Size]]] = {
    "combine": (_combine, [Size(5, 3, 37), TINY, Size(3, 4, 544, NARROW), Size(3, 18, 6)]),
    "pre": (_pre, [Size(19, 3, 37), TINY]),
    "mappings": (_mappings, [Size(13, 3, 37), TINY]),
    "combine_pre": (_combine_pre, [Size(37, 3, 37), TINY, Size(37, 4, 320, NARROW)]),
    "combine_pre, ahead": (_ahead, [Size(70, 3, 160), Size(40, 2, 256, NARROW)]),
    "combine_pre, few": (_few, [Size(13, 3, 37), TINY, Size(13, 4, 296, NARROW)]),
    "fewest": (_fewest, [Size(13, 3, 37), TINY, Size(3, 4, 544, NARROW)]),
}
"""The sizes for each of them, those that see most first."""


def _try(name: str, space: bool = False) -> None:
    check, sizes = CHECKS[name]
    for size in (TINY, *sizes) if space and TINY in sizes else sizes:
        check(size)


@pytest.mark.parametrize("name", CHECKS)
def test_each_by_itself(name: str) -> None:
    _try(name)


# ---- seeded faults -------------------------------------------------------------------------------


def _many(kernel: str, op: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(kernel, *fault, op) for fault in faults]


NO_SPACE = f"{SPACE}|no matching function"
ANYWHERE = f"{BOUNDS}|{WRONG}|nothing was written before"
BITS = f"{WRONG}|other bits"
UNWRITTEN = "are never written"
HALF = "for (int e = 0; e < 2; e++) {0}.at[e] = float(half({0}.at[e]));"
SUMMED = "partials_shape_1, first, T, sums, here);"
NEXT = ("barrier of the next tokens", "BARRIER;  // the next", "// the next", RACE)
PRODUCT = "add_k_block(zero_sums<1, 1>(), rows, phi_operands)"
HALF_PRODUCT = (
    f"[&] {{ auto sums = {PRODUCT}; {HALF.format('sums.products.at[0].tile[0].in_half[0]')}"
    " return sums; }()"
)


def _half_sums(stored: str) -> str:
    return f"{stored} for (int k = here.id; k < N; k += here.threads) sums[k] = half(sums[k]);"


FAULTS = (
    *_many(
        "write_streams",
        "combine",
        ("tail", "c < C; c +=", "c <= C; c +=", ANYWHERE),
        ("index", "int64_t(i) * C + c", "int64_t(N - 1 - i) * C + c", WRONG),
        ("half sum", "value(post, i), layer)", "float(half(value(post, i))), layer)", WRONG),
        ("space", "at(y) +", "at((const device float*)y) +", NO_SPACE),
    ),
    *_many(
        "write_streams_vjp",
        "combine",
        ("barrier", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "c < C; c +=", "c <= C; c +=", ANYWHERE),
        ("index", "value(post, i), g_i", "value(post, N - 1 - i), g_i", WRONG),
        ("half sum", "add_dot(sums[i], g_i, layer)", "half(add_dot(sums[i], g_i, layer))", WRONG),
        ("space", "at(y) +", "at((const device float*)y) +", NO_SPACE),
    ),
    *_many(
        "write_streams_vjp",
        "combine_pre",
        (
            "rounded gradient",
            "Optional<ROUNDS, W>::put",
            "Optional<false, W>::put",
            "never written",
        ),
    ),
    *_many(
        "write_project",
        "combine_pre",
        ("tail", "rest - c, lane);", "rest - c + 1, lane);", ANYWHERE),
        ("stores' tail", "rows, T - first,", "rows, T - first + 1,", ANYWHERE),
        ("index", "post, stream);", "post, 0);", WRONG),
        ("the layer's channels", "(layer, c, rest", "(layer, 0, rest", WRONG),
        (
            "half sum",
            "&operands[staged * OPERAND], lane));",
            "&operands[staged * OPERAND], lane)); " + HALF.format("sums.squares[0]"),
            WRONG,
        ),
        ("space", "(y) + begin", "((const device float*)y) + begin", NO_SPACE),
    ),
    *_many(
        "write_project",
        "combine_pre, ahead",
        ("barrier of the copies", "SIMD_BARRIER;\n                rows", "rows", RACE),
        ("barrier of what is taken", "SIMD_BARRIER;\n                if", "if", RACE),
        ("buffer of a K block", "buffers + k_block %", "buffers + (k_block + 1) %", BITS),
        ("next channels", "C, ahead, rest", "C, k_block, rest", BITS),
    ),
    *_many(
        "write_project_few",
        "combine_pre, few",
        ("barrier of the K blocks", "BARRIER;\nconst int made", "const int made", RACE),
        ("barrier of the totals", "BARRIER;  // the K blocks", "// the K blocks", RACE),
        ("tokens' tail", "T - first < TILE_TOKENS ? int(T - first) :", "", ANYWHERE),
        ("index", "own * RUN, lane", "(own + 1) * RUN, lane", f"{BITS}|{BOUNDS}"),
        (
            "half sum",
            "put_block_sums<COLUMN_TILES>(k_block, "
            "add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands)",
            "auto sums = add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands);"
            f"{HALF.format('sums.products.at[0].tile[0].in_half[0]')}"
            " put_block_sums<COLUMN_TILES>(k_block, sums",
            BITS,
        ),
        ("space", "(y) + begin", "((const device float*)y) + begin", NO_SPACE),
    ),
    *_many(
        "write_project_k_blocks",
        "fewest",
        ("tokens' tail", "T - first < TILE_TOKENS ? int(T - first) :", "", ANYWHERE),
        ("index", "post, stream);", "post, 0);", BITS),
        ("half sum", PRODUCT, HALF_PRODUCT, BITS),
        ("space", "(y) + begin", "((const device float*)y) + begin", NO_SPACE),
    ),
    *_many(
        "project_unmixed_k_blocks",
        "fewest",
        ("tail", "first, T, K, lane", "first, T + 1, K, lane", BOUNDS),
        ("index", "own * RUN, lane", "(own + 1) * RUN, lane", f"{BITS}|{BOUNDS}"),
        ("half sum", PRODUCT, HALF_PRODUCT, BITS),
        ("space", "(x) + begin", "((const device float*)x) + begin", NO_SPACE),
    ),
    *_many(
        "pre_unmixed",
        "pre",
        ("barrier of the sums", f"{SUMMED}\nBARRIER;", SUMMED, RACE),
        ("barrier of what is mapped", "BARRIER;\nfor (int64_t token", "for (int64_t token", RACE),
        NEXT,
        ("tail", "first + TOKENS < T ? first + TOKENS : T", "first + TOKENS", ANYWHERE),
        ("index", "(x) + next * N * C", "(x) + next * C", WRONG),
        ("half sum", f"{SUMMED}\nBARRIER;", f"{_half_sums(SUMMED)} BARRIER;", f"{WRONG}|{RACE}"),
        ("space", "(sums, scale,", "(sums, ((const device float*)scale),", NO_SPACE),
    ),
    *_many(
        "pre_unmixed_k_blocks",
        "fewest",
        ("tail", "c < C; c +=", "c <= C; c +=", ANYWHERE),
        ("index", "token * M + lane]", "token * M + M - 1 - lane]", BITS),
        ("half sum", "(simd_from(total, M)", "(float(half(simd_from(total, M)))", BITS),
        ("space", "float(scale[group])", "float(((const device float*)scale)[group])", NO_SPACE),
    ),
    *_many(
        "mappings_unmixed",
        "mappings",
        ("barrier of the sums", f"{SUMMED}\nBARRIER;", SUMMED, RACE),
        NEXT,
        ("tail", "CHANNELS, first, T,", "CHANNELS, first, T + 1,", ANYWHERE),
        ("index", "partials_shape_1, first", "partials_shape_0, first", ANYWHERE),
        ("half sum", f"{SUMMED}\nBARRIER;", f"{_half_sums(SUMMED)} BARRIER;", f"{WRONG}|{RACE}"),
        ("space", "(sums, scale,", "(sums, ((const device float*)scale),", NO_SPACE),
    ),
    *_many(
        "mappings_unmixed_vjp",
        "mappings",
        ("tail", "there = token < T", "there = token <= T", ANYWHERE),
        ("index", "group * N + b", "group * N + N - 1 - b", f"{WRONG}|{RACE}"),
        ("half sum", "dz * product;", "half(dz * product);", WRONG),
        ("space", "float(scale[group])", "float(((const device float*)scale)[group])", NO_SPACE),
    ),
    *_many(
        "common",
        "fewest",
        ("barrier of the splits", "some, sums, here); BARRIER;", "some, sums, here);", RACE),
        ("barrier of the next splits", "BARRIER;  // the next splits", "// the next splits", RACE),
        (
            "half sum of the splits",
            "total += next.at[k];",
            "total += float(half(next.at[k]));",
            BITS,
        ),
    ),
    *_many(
        "common",
        "combine_pre",
        ("a stream's h_post", "[k % 2][stream]", "[0][stream]", WRONG),
        ("tokens' tail", "8 * k + tile_row(lane) < tokens", "true", ANYWHERE),
        ("columns of h_post", "h_post[token * N + column - N]", "h_post[token * N]", ANYWHERE),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try(fault.op, space=fault.shows == NO_SPACE)
