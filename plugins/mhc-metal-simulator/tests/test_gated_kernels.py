"""The kernels of gates with a low-rank projection: right, for few tokens and for many, and guarded.

In the kit the rank is smaller than a tile of columns; here it has several, and tails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import (  # noqa: E402
    BOUNDS,
    RACE,
    WRONG,
    Fault,
    agree,
    as_float64,
    rounded,
    seeded,
)
from mhc_backends.kernels import launch  # noqa: E402
from mhc_backends.kernels.ops import gated_head, gated_pre  # noqa: E402
from mhc_core.math import load  # noqa: E402
from test_projection_kernels import KERNELS, small  # noqa: E402

EPS = 0.1
FEW, MANY = False, True


class Size(NamedTuple):
    """T tokens of n streams of C channels of a dtype, and the rank of the gates."""

    T: int
    n: int
    C: int
    rank: int
    dtype: str = "float32"


@contextlib.contextmanager
def launched(many: bool) -> Iterator[None]:
    """Run the kernels as for few tokens or for many, in a few small threadgroups."""
    with small(0), pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "gated_steps", lambda n, C: 2)
        patch.setattr(launch, "GATED_COLUMN_SHARES", 1)
        patch.setattr(launch, "whole_streams", lambda T, n: many)
        patch.setattr(launch, "channel_tiles", lambda T, C: 4 if many else 2)
        yield


def _draw(size: Size) -> list[mx.array]:
    (T, n, C, rank, dtype), rng = size, np.random.default_rng(size.n)
    K = n * C

    def normal(scale: float, *shape: int) -> mx.array:
        return mx.array((scale * rng.normal(size=shape)).astype(np.float32))

    x = normal(1, T, n, C).astype(getattr(mx, dtype))
    weights = normal(2 * K**-0.5, rank, K), normal(rank**-0.5, K, rank), normal(K**-0.5, n, K)
    return [x, normal(0.3, K), *weights]


def _cotangents(size: Size) -> list[mx.array]:
    (T, n, C, _, dtype), rng = size, np.random.default_rng(size.C)
    g_h, g_post = (mx.array(rng.normal(size=(T, k)).astype(np.float32)) for k in (C, n))
    return [g_h.astype(getattr(mx, dtype)), g_post]


def _held(size: Size, ways: Sequence[bool] = (FEW,), head: bool = False, back: bool = True) -> None:
    """Compare with NumPy in float64, ``back`` too, in two orders of the threads."""
    primals, made, heads = _draw(size), list[list[mx.array]](), list[list[mx.array]]()
    wide, pulled = as_float64(primals), _cotangents(size)
    for many in ways:
        with launched(many), simulator.options(schedules=["forward", "reversed"]):
            made.append([*gated_pre.forward(KERNELS, *primals, eps=EPS)])
            if back:
                made[-1] += gated_pre.vjp(KERNELS, primals, pulled, eps=EPS)
            if head:
                heads.append([gated_head.forward(KERNELS, *primals[:4], eps=EPS)])
                heads[-1] += gated_head.vjp(KERNELS, primals[:4], pulled[:1], eps=EPS)
    want = [*mhc.gated_pre(*wide, EPS, backend="numpy")]
    if back:
        want += mhc.vjp("gated_pre", wide, as_float64(pulled), eps=EPS, backend="numpy")
    for one in made:
        agree(one, rounded(tuple(want), one))
    for one in heads:
        given = wide[:4], as_float64(pulled[:1])
        want = [mhc.gated_head(*given[0], EPS, backend="numpy")]
        want += mhc.vjp("gated_head", *given, eps=EPS, backend="numpy")
        agree(one, rounded(tuple(want), one))
        assert mx.array_equal(one[0], made[0][0]), "the head's launches give other bits"
    for all_ways in (made, heads):
        same = (
            mx.array_equal(a, b) for one in all_ways for a, b in zip(one, all_ways[0], strict=True)
        )
        assert all(same), "the launches for few tokens give other bits"


def test_a_rank_of_several_tiles_with_tails() -> None:
    _held(Size(19, 3, 101, 37), (FEW, MANY), head=True)


def test_more_streams_than_columns_in_a_tile() -> None:
    _held(Size(3, 18, 6, 3))


def test_more_tokens_than_a_stage_of_the_factors() -> None:
    _held(Size(150, 2, 33, 5), (MANY,))


def test_formulas_make_what_the_kernels_keep() -> None:
    """So that a forward by formulas, on a part of the channels, can precede the kernels' vjp."""
    primals = _draw(Size(3, 4, 24, 5))
    for op, count in ((gated_pre, 5), (gated_head, 4)):
        _, kept = op.forward_with_saved(KERNELS, *primals[:count], eps=EPS)
        formulas = load(op.__name__.rpartition(".")[2]).residuals
        want = formulas(*as_float64(primals[:count]), eps=EPS)
        agree([*kept], rounded(tuple(want), [*kept]))


def test_a_token_does_not_depend_on_its_batch() -> None:
    """Check as many tokens as take whole streams against one, which takes splits."""
    T = 1030
    x, *weights = _draw(Size(T, 4, 40, 5, "bfloat16"))
    assert launch.gated_token_tiles(T, 4, "bfloat16") == 2
    assert not launch.whole_streams(1, 4)
    many = gated_pre.forward(KERNELS, x, *weights, eps=EPS)
    one = gated_pre.forward(KERNELS, x[1027:1028], *weights, eps=EPS)
    assert all(mx.array_equal(a[1027:1028], b) for a, b in zip(many, one, strict=True))
    g = _cotangents(Size(T, 4, 40, 5, "bfloat16"))
    dx, *_ = gated_pre.vjp(KERNELS, [x, *weights], g, eps=EPS)
    alone = [one[1027:1028] for one in (x, *g)]
    assert mx.array_equal(
        dx[1027:1028],
        gated_pre.vjp(KERNELS, [alone[0], *weights], alone[1:], eps=EPS)[0],
    )


# ---- seeded faults -------------------------------------------------------------------------------


def _all(kernel: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(kernel, *fault, "gated_pre") for fault in faults]


SPLIT, SUM = "total = add_split(total, sums, lane);", "total.squares[0].at[0]"
PRODUCTS, SUMMED = "total = plus(total,", "total.at[0].tile[0].in_half[0].at[0]"
ANYWHERE = f"{BOUNDS}|{WRONG}|nothing was written before|never written"
FAULTS = (
    *_all(
        "gated_project",
        ("tail", "begin + SPLIT < C ? begin + SPLIT : C", "begin + SPLIT", ANYWHERE),
        ("index", "stream + c, C - c, lane", "c, C - c, lane", WRONG),
        ("half sum", SPLIT, f"{SPLIT} {SUM} = float(half({SUM}));", WRONG),
    ),
    *_all(
        "gated_low",
        ("barrier of the sums", "BARRIER;\nif", "if", RACE),
        ("barrier of the next token", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "!squares && column < M", "!squares", ANYWHERE),
        ("index", "i * parts) * WIDTH", "parts) * WIDTH", f"{WRONG}|{BOUNDS}"),
        (
            "half sum",
            "sums[i * SIMD + lane], z);",
            "float(half(sums[i * SIMD + lane])), z);",
            WRONG,
        ),
    ),
    *_all(
        "gated_collapse",
        ("barrier of the gated numbers", "BARRIER;\nfor", "for", RACE),
        ("barrier of the next streams", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "done + simdgroups >= N && c < C", "done + simdgroups >= N", ANYWHERE),
        ("index", "r[token * N + i]", "r[token * N]", WRONG),
        (
            "half sum",
            "sum += gated[s * NUMBERS + at]",
            "sum += half(gated[s * NUMBERS + at])",
            WRONG,
        ),
    ),
    *_all(
        "gated_collapse_vjp",
        ("barrier of the sums", "SIMD_BARRIER;\nif", "if", RACE),
        ("barrier of the next stream", "SIMD_BARRIER;  // the next", "// the next", RACE),
        ("tail", "if (lane < tokens)", "", ANYWHERE),
        ("index", "r[token * N + i]", "r[token * N]", WRONG),
        ("half sum", "sum += e;", "sum += half(e);", WRONG),
    ),
    *_all(
        "gated_dlow",
        ("tail", "begin + SPLIT < C ? begin + SPLIT : C", "begin + SPLIT", WRONG),
        ("index", "(stream + c)", "c", WRONG),
        ("half sum", f"{PRODUCTS} sums);", f"{PRODUCTS} sums); {SUMMED} = half({SUMMED});", WRONG),
    ),
    *_all(
        "gated_low_vjp",
        ("barrier of the next token", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "inject ? column < M : column < RANK", "true", ANYWHERE),
        ("index", "i * splits) * RANK", "splits) * RANK", f"{WRONG}|{BOUNDS}"),
        ("half sum", "pulls[i] = fma", "pulls[i] = half(pulls[i]), pulls[i] = fma", WRONG),
    ),
    *_all(
        "gated_dx",
        ("barrier of the terms", "SIMD_BARRIER;\nif", "if", RACE),
        ("barrier of the next stream", "SIMD_BARRIER;  // the next", "// the next", RACE),
        ("tail", "if (begin + lane < C)", "", ANYWHERE),
        ("index", "pulled[token * N + i]", "pulled[token * N]", WRONG),
        ("half sum", "own[row * COLUMNS + lane];", "half(own[row * COLUMNS + lane]);", WRONG),
    ),
    *_all(
        "gated_dfactors",
        ("tail", "to < M ? C - channel : 0", "C - channel", ANYWHERE),
        ("index", "i * T * M", "0", WRONG),
        (
            "half sum",
            "out = channels_of(sums, tile, j);",
            "out = channels_of(sums, tile, j); out.at[0] = float(half(out.at[0]));",
            WRONG,
        ),
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    back = fault.kernel not in ("gated_project", "gated_low", "gated_collapse")
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _held(Size(3, 3, 101, 37), back=back)
