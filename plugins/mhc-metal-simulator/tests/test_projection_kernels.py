"""The kernels of the ops with a projection, for many tokens and for few: right, and guarded.

test_traffic_table.py checks the bytes that they move, and the launches per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

import mhc_metal_simulator as simulator

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import (  # noqa: E402
    BACKEND,
    BOUNDS,
    RACE,
    SPACE,
    WRONG,
    Fault,
    agree,
    cramped,
    seeded,
)
from mhc_backends.kernels import launch as launches  # noqa: E402
from mhc_backends.kernels import table  # noqa: E402
from mhc_backends.kernels.mlx import Kernels, Out  # noqa: E402
from mhc_backends.kernels.ops import _projection, combine_pre, head, mappings, pre  # noqa: E402

from mhc_metal_simulator import traffic  # noqa: E402

KERNELS = Kernels(simulator.metal_kernel, "metal")
# as launch.BUSY: all sizes count as many tokens, or as few; or as the fewest
MANY, FEW, FEWEST = 0, 2**30, 2**31


@contextlib.contextmanager
def small(busy: int, threads: int = 64) -> Iterator[None]:
    """Let one threadgroup of few simdgroups do all the work, in the kernels for many or for few."""
    with cramped(), pytest.MonkeyPatch.context() as patch:
        shapes = {name: replace(shape, threads=threads) for name, shape in table.TABLE.items()}
        patch.setattr(table, "TABLE", shapes)
        patch.setattr(launches, "MOST_GRID", threads)
        patch.setattr(launches, "BUSY", busy)
        patch.setattr(launches, "FEWEST_TOKENS", {"metal": busy if busy == FEWEST else 0})
        patch.setattr(launches, "FEWEST_SPLITS", FEWEST)
        patch.setattr(launches, "SPLITS_AT_ONCE", 2)
        yield


# ---- the ops -------------------------------------------------------------------------------------


class Size(NamedTuple):
    """T tokens of n streams of C channels of a dtype."""

    T: int
    n: int
    C: int
    dtype: str = "float32"


OPS = ("pre", "mappings", "head", "combine_pre", "combine_pre with h_pre", "shared mappings")
OPS_IN_SHORT = ("pre", "mappings", "head", "shared mappings")  # which have all kernels
SIZES = [  # tails of tokens, channels and columns, and the way for arrays that are all aligned
    Size(5, 4, 37),
    Size(19, 4, 296, "bfloat16"),
    Size(70, 4, 37, "bfloat16"),
    Size(19, 4, 320, "bfloat16"),
    Size(19, 1, 37),
    Size(70, 3, 296),
    Size(5, 9, 37),
]


def _public(name: str) -> str:
    return "combine_pre" if name == "shared mappings" else name.split()[0]


def _draw(name: str, size: Size) -> list[mx.array]:
    """Draw an op's arrays; x' is exact in every dtype, so that its rounding cannot differ."""
    T, n, C, dtype = size
    rng, m = np.random.default_rng(n), n if name == "head" else n * n + 2 * n

    def steps(most: int, *shape: int) -> mx.array:
        return mx.array(rng.integers(-most, most + 1, shape).astype(np.float32))

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    streams = steps(2, T, n, C).astype(getattr(mx, dtype))
    phi = normal(m, n * C) / (2 * n * C) ** 0.5
    parameters = [phi, normal(1 if name == "head" else 3), normal(m)]
    if _public(name) != "combine_pre":
        return [streams, *parameters]
    ahead = () if name == "shared mappings" else (T,)
    layer = steps(2, T, C).astype(streams.dtype)
    mapped = [steps(2, *ahead, n) / 2, steps(2, *ahead, n, n) / 2]
    given = [] if name == "combine_pre" else [normal(*ahead, n)]
    return [streams, layer, *mapped, *parameters, *given]


def _outputs(name: str, primals: Sequence[Any], variant: Any, backend: str) -> list[Any]:
    arrays, given = primals[:7], primals[7:]
    made = getattr(mhc, _public(name))(*arrays, variant, *given, backend=backend)
    return list(made) if isinstance(made, tuple | list) else [made]


def _vjp(name: str, primals: Sequence[Any], given: Any, variant: Any, backend: str) -> list[Any]:
    cotangents = given[0] if name == "head" else tuple(given)
    return list(
        mhc.vjp(_public(name), tuple(primals), cotangents, variant=variant, backend=backend)
    )


def _cotangents(outputs: Sequence[mx.array]) -> list[mx.array]:
    # dscale is one sum of many terms: with this key none is small beside them
    keys = mx.random.split(mx.random.key(5), len(outputs))
    return [
        mx.random.normal(out.shape, key=key).astype(out.dtype)
        for out, key in zip(outputs, keys, strict=True)
    ]


def _float64(array: mx.array) -> Any:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _close(got: Sequence[mx.array], truth: Sequence[Any]) -> None:
    """Compare with NumPy in float64, rounded as the kernels round."""
    rounded = [
        mx.array(np.asarray(wide).astype(np.float32)).astype(one.dtype)
        for one, wide in zip(got, truth, strict=True)
    ]
    agree(got, rounded)


def _run(name: str, size: Size, variant: Any) -> None:
    """Run an op and its vjp on the simulator, in two orders of the threads, and compare."""
    primals = _draw(name, size)
    with simulator.options(schedules=["forward", "reversed"]):
        outputs = _outputs(name, primals, variant, BACKEND)
        given = _cotangents(outputs)
        gradients = _vjp(name, primals, given, variant, BACKEND)
    wide = [_float64(array) for array in primals]
    _close(outputs, _outputs(name, wide, variant, "numpy"))
    assert [g.dtype for g in gradients] == [p.dtype for p in primals]
    _close(gradients, _vjp(name, wide, [_float64(g) for g in given], variant, "numpy"))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(map(str, size)))
def test_few_small_threadgroups(size: Size) -> None:
    """Check the kernels for many tokens; those for few give the same bits."""
    variant = mhc.DEEPSEEK_V4 if size.n in (3, 4) else mhc.PAPER
    with small(MANY):
        for name in OPS if size.n == 4 else OPS_IN_SHORT:
            _run(name, size, variant)


@pytest.mark.parametrize("name", ["pre", "mappings", "head", "combine_pre"])
def test_a_token_does_not_depend_on_its_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a token depends neither on its batch nor on the kernels for few tokens or many."""
    T, variant = 600, mhc.PAPER
    monkeypatch.setattr(launches, "BUSY", 16)
    assert launches.few(1, 296)
    assert not launches.few(T, 296)
    primals = _draw(name, Size(T, 4, 296, "bfloat16"))
    alone = [array[:1] if array.shape[0] == T else array for array in primals]
    many = _outputs(name, primals, variant, BACKEND)
    given = _cotangents(many)
    gradients = _vjp(name, primals, given, variant, BACKEND)
    ones = _outputs(name, alone, variant, BACKEND)
    ones += _vjp(name, alone, [g[:1] for g in given], variant, BACKEND)
    for of_many, of_one in zip([*many, *gradients], ones, strict=True):
        if of_many.shape[0] == T:  # what is not is a sum over the tokens
            assert mx.array_equal(of_many[:1], of_one)
    again = _vjp(name, primals, given, variant, BACKEND)
    assert all(mx.array_equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("busy", [MANY, FEW])
@pytest.mark.parametrize("name", ["pre", "combine_pre"])
def test_threads_change_nothing(name: str, busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "BUSY", busy)
    monkeypatch.setattr(table, "MOST_THREADS", {"metal": 1024})  # as CUDA has them
    primals = _draw(name, Size(70 if busy == MANY else 13, 4, 296, "bfloat16"))
    before = _outputs(name, primals, mhc.PAPER, BACKEND)
    for threads in (32, 96, 1024):
        with small(busy, threads):
            after = _outputs(name, primals, mhc.PAPER, BACKEND)
        assert all(mx.array_equal(a, b) for a, b in zip(before, after, strict=True))


# ---- one kernel at a time ------------------------------------------------------------------------

TINY = Size(2, 1, 3)  # of which MLX passes all but phi in constant memory
VARIANT = replace(mhc.PAPER, sinkhorn_iterations=3)


def _launched(busy: int, make: Callable[[], Any]) -> Any:
    """Run kernels whose name says whether tokens are few."""
    with small(busy), simulator.record() as records:
        made = make()
    kernels = [traffic.kernel_of(record) for record in records]
    assert [name.endswith("_few") for name in kernels] == [busy == FEW]
    return made


SQUARES_UNIT = 2.0**-16  # squares_unit() of common/norm.h, in which sums of squares are kept


def _sums(partials: mx.array, x: mx.array, phi: mx.array) -> None:
    """Compare split-K partials with x . phi and x . x over their own channels."""
    products: list[Any] = []
    squares: list[Any] = []
    wide, across = _float64(x), _float64(phi).reshape(phi.shape[0], *x.shape[1:])
    for begin in range(0, x.shape[2], launches.SPLIT_CHANNELS):
        own = slice(begin, begin + launches.SPLIT_CHANNELS)
        products.append(np.einsum("tnc,mnc->tm", wide[..., own], across[..., own]))
        squares.append((wide[..., own] ** 2).sum(axis=(1, 2)))
    summed = [partials[..., :-1], partials[..., -1] / SQUARES_UNIT]
    _close(summed, [np.stack(products, 1), np.stack(squares, 1)])


def _equal_bits(few: mx.array, many: mx.array) -> None:
    assert mx.array_equal(few, many), "the kernel for few tokens gives other bits"


def _normal(shape: Sequence[int], dtype: Any = mx.float32, seed: int = 3) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def _project(size: Size, busy: int) -> None:
    x, phi, *_ = _draw("pre", size)
    x = _normal(x.shape, x.dtype)
    partials = _launched(busy, lambda: _projection.project(KERNELS, x, phi))
    _sums(partials, x, phi)
    if busy == FEW:
        _equal_bits(partials, _launched(MANY, lambda: _projection.project(KERNELS, x, phi)))


def _combine_project(size: Size, busy: int) -> None:
    for name in ("combine_pre", "shared mappings"):
        _combined([_normal(array.shape, array.dtype) for array in _draw(name, size)[:5]], busy)


def _combined(arrays: Sequence[mx.array], busy: int) -> None:
    x, y, h_post, h_res, phi = arrays
    made, (partials, _) = _launched(busy, lambda: _projection.combine_project(KERNELS, *arrays))
    mixed = np.einsum("...ij,...jc->...ic", _float64(h_res), _float64(x))
    _close([made], [mixed + _float64(h_post)[..., None] * _float64(y)[:, None]])
    _sums(partials, made, phi)
    if busy == FEW:
        many = _launched(MANY, lambda: _projection.combine_project(KERNELS, *arrays))
        _equal_bits(made, many[0])
        _equal_bits(partials, many[1].array)


@contextlib.contextmanager
def on_their_way(k_blocks: int) -> Iterator[None]:
    """Prefetch K blocks into buffers, with room for them, as only CUDA does by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(launches.AHEAD, "metal", k_blocks)
        patch.setattr(KERNELS, "memory", 32768)
        yield


def _project_ahead(size: Size, busy: int) -> None:
    for k_blocks in (2, 1):
        with on_their_way(k_blocks):
            _project(size, busy)


def _combine_project_ahead(size: Size, busy: int) -> None:
    with on_their_way(1):
        _combine_project(size, busy)


def _weights_vjp(size: Size, busy: int) -> None:
    T, n, C, dtype = size
    x, dh = _normal((T, n, C), getattr(mx, dtype)), _normal((T, C), getattr(mx, dtype), 4)
    with small(busy):
        dw = _projection.weights_vjp(KERNELS, x, dh)
    _close([dw], [np.einsum("tnc,tc->tn", _float64(x), _float64(dh))])


def _back(size: Size, busy: int) -> None:
    """Check project_dx and project_dphi."""
    T, n, C, _ = size
    x, phi, *_ = _draw("pre", size)
    x, dh = _normal(x.shape, x.dtype), _normal((T, C), x.dtype, 4)
    du, pull, w = (
        _normal((T, phi.shape[0]), seed=5),
        2.0**24 * _normal((T, 1), seed=6),  # in units of pull_unit()
        _normal((T, n), seed=7),
    )
    g = _normal(x.shape, x.dtype, 8)
    local = _projection.Local(du, pull, du)
    out = Out(x.shape, mx.float32)
    with small(busy):
        dx, dphi, _ = _projection.projection_pullback(KERNELS, x, phi, local, out, w, dh, g)
    flat, wide = _float64(x).reshape(T, n * C), _float64(du)
    through = (wide @ _float64(phi) - _float64(pull) * 2.0**-24 * flat).reshape(x.shape)
    _close(
        [dx, dphi],
        [through + _float64(w)[..., None] * _float64(dh)[:, None] + _float64(g), wide.T @ flat],
    )


def _end(size: Size, busy: int) -> None:
    """Check pre on partials that others might have made: more than a thread adds at a time."""
    T, n, C, _ = size
    x, phi, scale, bias = _draw("pre", size)
    x, given = _normal(x.shape, x.dtype), _normal((T, n), seed=4)
    wide, columns = _float64(x), phi.shape[0]
    u = wide.reshape(T, n * C) @ _float64(phi).T
    numbers = np.concatenate([u, (wide**2).sum(axis=(1, 2))[:, None]], axis=1)
    shares = np.random.default_rng(1).uniform(size=(1, 11, 1))
    units = np.append(np.ones(columns), SQUARES_UNIT)
    partials = mx.array((numbers[:, None] * units * shares / shares.sum()).astype(np.float32))
    arrays = [wide, *(_float64(array) for array in (phi, scale, bias))]
    h, h_post, h_res = mhc.pre(*arrays, VARIANT, backend="numpy")
    h_pre, *_ = mhc.mappings(*arrays, VARIANT, backend="numpy")
    r = 1 / np.sqrt(numbers[:, columns:] / (n * C) + VARIANT.norm_eps)
    sums = _projection.Sums(partials)
    with small(busy):
        made = _projection.pre(KERNELS, x, sums, scale, bias, None, VARIANT)
        _close([*made[:4], *made.saved], [h, h_pre, h_post, h_res, u, r])
        other = _projection.pre(KERNELS, x, sums, scale, bias, given, VARIANT)
        mixed = np.einsum("tn,tnc->tc", _float64(given), wide)
        _close([*other[:4], *other.saved], [mixed, h_pre, h_post, h_res, u, r])


def _fewest(op: str, size: Size) -> None:
    """Check an op of the fewest tokens, and that it has the bits of the kernels for many."""
    primals = _draw(op, size)
    primals[0] = _normal(primals[0].shape, primals[0].dtype) if op == "pre" else primals[0]
    module = pre if op == "pre" else combine_pre
    made: list[list[mx.array]] = []
    for busy in (FEWEST, MANY):
        with small(busy), simulator.record() as records:
            outputs, saved = module.forward_with_saved(KERNELS, *primals, variant=VARIANT)
        kernels = [traffic.kernel_of(record) for record in records]
        assert all(name.endswith("_k_blocks") == (busy == FEWEST) for name in kernels), kernels
        made.append([*outputs, *saved])
    count = len(outputs)
    arrays = [_float64(array) for array in primals]
    wanted = _outputs(op, arrays, VARIANT, "numpy")
    _close(made[0][:count], wanted)
    projected = [wanted[0] if op != "pre" else arrays[0], arrays[1 if op == "pre" else 4]]
    _close(made[0][-3:-1], _projected(projected))
    for few, many in zip(*made, strict=True):
        _equal_bits(few, many)


def _fewest_pre(size: Size, _: int) -> None:
    _fewest("pre", size)


def _fewest_combine_pre(size: Size, _: int) -> None:
    for op in ("combine_pre with h_pre", "shared mappings"):
        _fewest(op, size)


def _mappings(size: Size, busy: int) -> None:
    primals = _draw("mappings", size)
    with small(busy):
        outputs, saved = mappings.forward_with_saved(KERNELS, *primals, variant=VARIANT)
    arrays = [_float64(array) for array in primals]
    truth = mhc.mappings(*arrays, VARIANT, backend="numpy")
    _close([*outputs, *saved], [*truth, *_projected(arrays)])


def _head(size: Size, busy: int) -> None:
    primals = _draw("head", size)
    with small(busy):
        (h,), (u, w, r) = head.forward_with_saved(KERNELS, *primals, variant=VARIANT)
    arrays = [_float64(array) for array in primals]
    products, inverse = _projected(arrays)
    weights = 1 / (1 + np.exp(-(products * inverse * arrays[2] + arrays[3]))) + VARIANT.pre_eps
    truth = mhc.head(*arrays, VARIANT, backend="numpy")
    _close([h, u, r, w], [truth, products, inverse, weights])


def _projected(arrays: Sequence[Any]) -> tuple[Any, Any]:
    flat = arrays[0].reshape(arrays[0].shape[0], -1)
    mean = (flat**2).mean(axis=1, keepdims=True)
    return flat @ arrays[1].T, 1 / np.sqrt(mean + VARIANT.norm_eps)


AHEAD_SIZES = [  # phi of a split is put once, and then a stage at a time
    Size(70, 1, 288, "bfloat16"),  # whose last K block is half a one
    Size(70, 1, 256, "bfloat16"),
    Size(40, 2, 256, "bfloat16"),
    Size(37, 3, 320, "bfloat16"),
    Size(50, 4, 96, "float16"),
    Size(70, 1, 128),
    Size(50, 4, 64),
    Size(20, 6, 64, "bfloat16"),
]
CHECKS: dict[str, tuple[Callable[[Size, int], None], int, Sequence[Size]]] = {
    "project": (_project, MANY, [Size(37, 3, 37), TINY, Size(37, 4, 296, "bfloat16")]),
    "project_few": (_project, FEW, [Size(37, 3, 37), TINY, Size(70, 4, 296, "bfloat16")]),
    "combine_project": (_combine_project, MANY, [Size(37, 3, 37), TINY]),
    "combine_project_few": (  # at most 16 tokens; others take combine_project
        _combine_project,
        FEW,
        [Size(13, 3, 37), TINY, Size(13, 9, 37), Size(13, 4, 296, "bfloat16")],
    ),
    "pre_k_blocks": (
        _fewest_pre,
        FEWEST,
        [Size(19, 3, 37), TINY, Size(3, 4, 544, "bfloat16"), Size(5, 2, 288), Size(5, 2, 6)],
    ),
    "combine_project_k_blocks": (
        _fewest_combine_pre,
        FEWEST,
        [Size(13, 3, 37), TINY, Size(19, 4, 288, "bfloat16"), Size(5, 4, 64)],
    ),
    "weights_vjp": (_weights_vjp, MANY, [Size(5, 3, 37), TINY]),
    "project, ahead": (_project_ahead, MANY, [Size(70, 3, 160), *AHEAD_SIZES[:2]]),
    "combine_project, ahead": (_combine_project_ahead, MANY, AHEAD_SIZES[2:4]),
    "back": (_back, MANY, [Size(70, 3, 37), TINY, Size(40, 5, 37)]),
    "back, narrow": (_back, MANY, [Size(70, 3, 37, "bfloat16")]),
    "pre": (_end, MANY, [Size(13, 3, 37), Size(5, 3, 150)]),
    "mappings": (_mappings, FEW, [Size(13, 3, 37)]),
    "head": (_head, FEW, [Size(13, 3, 37)]),
}
"""The sizes for each of them, those that see most first."""


def _try(name: str, space: bool = False) -> None:
    check, busy, sizes = CHECKS[name]
    for size in (TINY, *sizes) if space and TINY in sizes else sizes:
        check(size, busy)


@pytest.mark.parametrize("name", CHECKS)
def test_each_kernel_by_itself(name: str) -> None:
    with simulator.options(schedules=["forward", "reversed"]):
        _try(name)


@pytest.mark.parametrize("k_blocks", [1, 2])
@pytest.mark.parametrize("size", AHEAD_SIZES, ids=lambda size: "-".join(map(str, size)))
def test_rows_on_their_way(size: Size, k_blocks: int) -> None:
    """Check that what goes through buffers gives right sums, and the bits of what does not."""
    drawn = _draw("combine_pre", size)[:5]
    arrays = [_normal(array.shape, array.dtype) for array in drawn]

    def make() -> list[mx.array]:
        partials = _projection.project(KERNELS, arrays[0], arrays[4])
        made, sums = _projection.combine_project(KERNELS, *arrays)
        return [partials, made, sums.array]

    with small(MANY), simulator.options(schedules=["forward", "reversed"]):
        at_once = make()
        with on_their_way(k_blocks):
            later = make()
            _project(size, MANY)
            _combine_project(size, MANY)
    assert all(mx.array_equal(one, other) for one, other in zip(later, at_once, strict=True))


# ---- seeded faults -------------------------------------------------------------------------------


def _halved(value: str, name: str, count: int) -> str:
    return f"{value} for (int e = 0; e < {count}; e++) {name}.at[e] = float(half({name}.at[e]));"


def _device(name: str) -> str:
    return f"((const device float*){name})"


def _many(kernel: str, *faults: tuple[str, str, str, str], op: str = "") -> list[Fault]:
    return [Fault(kernel, *fault, op or kernel) for fault in faults]


NO_SPACE = f"{SPACE}|no matching function"
ANYWHERE = f"{BOUNDS}|{WRONG}|nothing was written before"
BITS = "other bits"
ROUNDED = _halved("", "sums.squares[0]", 2)
MULTIPLIED = "add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands)"


def _half_k_block(tiles: str, first: str) -> tuple[str, str, str, str]:
    """Round the sums of a K block, of some tiles of columns from the first one on."""
    multiplied = f"add_k_block(zero_sums<{tiles}, 1>(), rows, phi_operands)"
    put = f"put_block_sums<COLUMN_TILES>(k_block, {{}}, {first}, tokens, lane);"
    halved = f"auto sums = {multiplied};{ROUNDED} {put.format('sums')}"
    return "half sum", put.format(multiplied), halved, WRONG


K_BLOCK_MADE = f"{MULTIPLIED}, column, tokens, lane);"
HALF_PRODUCTS = _halved("", "sums.products.at[0].tile[0].in_half[0]", 2)
HALF_K_BLOCK_MADE = (
    "[&] { auto sums = add_k_block(zero_sums<COLUMN_TILES, 1>(), rows, phi_operands);"
    f"{HALF_PRODUCTS} return sums; }}(), column, tokens, lane);"
)
FEW_BARRIERS = [
    (
        "barrier of the K blocks",
        "BARRIER;\n            const int made",
        "const int made",
        RACE,
    ),
    ("barrier of the totals", "BARRIER;  // the K blocks", "// the K blocks", RACE),
]
SUMMED = "partials_shape_1, first, T, sums, here);"


def _half_sums(numbers: str) -> str:
    """Round the sums, each in the thread that made it."""
    return (
        f"{SUMMED} for (int k = here.id; k < int(T - first < TOKENS ? T - first : TOKENS) *"
        f" ({numbers} + 1); k += here.threads) sums[k] = float(half(sums[k]));"
    )


STAGED_DU = "for (int k = 0; k < STAGE_STEPS; k += 2)"
NEXT = ("barrier of the next tokens", "BARRIER;  // the next tokens", "// the next tokens", RACE)

FAULTS = (
    *_many(
        "project",
        ("tail", "C - begin - channel;", "C - begin - channel + 1;", ANYWHERE),
        ("index", "[staged * OPERAND]", "[(STAGE_STEPS - RUN - staged) * OPERAND]", WRONG),
        (
            "half sum",
            "&operands[staged * OPERAND], lane));",
            f"&operands[staged * OPERAND], lane));{ROUNDED}",
            WRONG,
        ),
        ("space", "(x) + begin", f"({_device('x')}) + begin", NO_SPACE),
    ),
    *_many(
        "project",
        ("phi of all iterations", "(!once || iteration", "(iteration", WRONG),
        ("barrier of the copies", "SIMD_BARRIER;\n                rows", "rows", RACE),
        ("barrier of what is taken", "SIMD_BARRIER;\n                if", "if", RACE),
        ("buffer of a K block", "buffers + k_block %", "buffers + (k_block + 1) %", WRONG),
        ("simdgroups' buffers", "simdgroup * AHEAD * BUFFER", "simdgroup * BUFFER", RACE),
        ("next channels", "C, ahead, rest", "C, k_block, rest", WRONG),
        ("next tokens", "channel, next, T", "channel, first, T", WRONG),
        ("odd K blocks", "once && k_blocks % (AHEAD + !AHEAD) == 0", "once", WRONG),
        op="project, ahead",
    ),
    *_many(
        "project_few",
        *FEW_BARRIERS,
        ("tail", "first, T, K", "first, T + 1, K", BOUNDS),
        ("tokens' tail", "T - first < TILE_TOKENS ? int(T - first) :", "", ANYWHERE),
        ("index", "own * RUN, lane", "(own + 1) * RUN, lane", WRONG),
        _half_k_block("COLUMN_TILES", "0"),
        ("space", "(x) + begin", f"({_device('x')}) + begin", NO_SPACE),
    ),
    *_many(
        "combine_project",
        ("tail", "token < T ? token : T - 1", "token", BOUNDS),
        ("stores' tail", "stores[r] = token < T", "stores[r] = token <= T", ANYWHERE),
        ("index", "(i + stream) * N,", "i * N,", WRONG),
        ("half sum", "operand, lane));", f"operand, lane));{ROUNDED}", WRONG),
        ("space", "(y) + channel, first", f"({_device('y')}) + channel, first", NO_SPACE),
    ),
    *_many(
        "combine_project",
        ("phi of all iterations", "(!once || iteration", "(iteration", WRONG),
        ("simdgroups' buffers", "simdgroup * AHEAD * BUFFER", "0", RACE),
        ("next channels", "C, c + STEP_CHANNELS, lane", "C, c, lane", WRONG),
        ("next tokens", "(y) + channel, next, T", "(y) + channel, first, T", WRONG),
        op="combine_project, ahead",
    ),
    *_many(
        "combine_project_few",
        *FEW_BARRIERS,
        ("tail", "own < T ? own : T - 1", "own", BOUNDS),
        ("stores' tail", "tile_row(lane) < T)", "tile_row(lane) <= T)", ANYWHERE),
        ("index", "value(post[r], i)", "value(post[r], 0)", WRONG),
        ("columns", "column + tile * TILE", "column + TILE", WRONG),
        _half_k_block("AT_ONCE", "tile"),
        ("space", "at(h_post) + row", f"at({_device('h_post')}) + row", NO_SPACE),
    ),
    *_many(
        "project_k_blocks",
        ("tail", "first, T, K, lane", "first, T + 1, K, lane", BOUNDS),
        ("tokens' tail", "T - first < TILE_TOKENS ? int(T - first) :", "", ANYWHERE),
        ("index", "own * RUN, lane", "(own + 1) * RUN, lane", f"{WRONG}|{BOUNDS}"),
        ("half sum", K_BLOCK_MADE, HALF_K_BLOCK_MADE, f"{WRONG}|{BITS}"),
        ("space", "(x) + begin", f"({_device('x')}) + begin", NO_SPACE),
        op="pre_k_blocks",
    ),
    *_many(
        "combine_project_k_blocks",
        ("tail", "at < tokens ? first + at : T - 1", "first + at", BOUNDS),
        ("stores' tail", "&& at < tokens)", "&& at <= tokens)", ANYWHERE),
        ("index", "(h_post_shape_0, token) * N", "(h_post_shape_0, token)", ANYWHERE),
        ("streams of other K blocks", "&& k != i)", "&& k != N - 1 - i)", ANYWHERE),
        ("half sum", K_BLOCK_MADE, HALF_K_BLOCK_MADE, f"{WRONG}|{BITS}"),
        ("space", "(y) + channel, first", f"({_device('y')}) + channel, first", NO_SPACE),
    ),
    *_many(
        "pre_k_blocks",
        ("tail", "if (own < C)", "if (own <= C)", ANYWHERE),
        ("index", "token * M + lane]", "token * M + M - 1 - lane]", WRONG),
        ("half sum", "(simd_from(total, M)", "(float(half(simd_from(total, M)))", WRONG),
        ("space", "float(scale[group])", f"float({_device('scale')}[group])", NO_SPACE),
    ),
    *_many(
        "project_dx",
        ("barrier of the stage before", "BARRIER;  // the stage", "// the stage", RACE),
        ("barrier", "        }\n        BARRIER;\n", "        }\n", RACE),
        ("tail", "first < T ? first : T - 1", "first", BOUNDS),
        ("stores' tail", "if (first + 8 * r < T)", "if (first + 8 * r <= T)", ANYWHERE),
        ("index", "tokens[r]) * N + i]", "tokens[r]) * N]", WRONG),
        (
            "half sum",
            "sum = add(sum, -pulls[r], times(pull_unit(), floats(xs[r])));",
            _halved("sum = add(sum, -pulls[r], times(pull_unit(), floats(xs[r])));", "sum", 8),
            WRONG,
        ),
        ("space", "= pull[", f"= {_device('pull')}[", NO_SPACE),
        op="back",
    ),
    *_many(
        "project_dphi",
        ("columns' tail", "if (to < M)", "if (to <= M)", ANYWHERE),
        ("index", "(own * M + to)", "(own * M + M - 1 - to)", WRONG),
        (
            "scaled sum",
            "channels_of(sums, tile, j), C",
            "times(1.001f, channels_of(sums, tile, j)), C",
            WRONG,
        ),
        op="back",
    ),
    *_many(  # in common/project/dphi_sums.h
        "common",
        ("barrier of du", f"BARRIER;\n{STAGED_DU}", STAGED_DU, RACE),
        ("barrier of the du before", "BARRIER;  // those before", "// those before", RACE),
        ("tail of du", "next, T, rest", "next, T + 1, rest", BOUNDS),
        (
            "index of dphi",
            "sums.at[k / 2].at[0].tile[tile].in_half[k % 2]",
            "sums.at[k % 2].at[0].tile[tile].in_half[k / 2]",
            WRONG,
        ),
        (
            "half sum of dphi",
            "multiply<COLUMN_TILES>(rows, shared));",
            _halved(
                "multiply<COLUMN_TILES>(rows, shared));", "sums.at[s].at[0].tile[0].in_half[0]", 2
            ),
            WRONG,
        ),
        ("space of du", "(du, M", f"({_device('du')}, M", NO_SPACE),
        op="back",
    ),
    *_many(
        "weights_vjp",
        ("barrier", "BARRIER;  // the next", "// the next", RACE),
        ("tail", "c < C; c +=", "c <= C; c +=", ANYWHERE),
        ("index", "(token * N + i) * C", "token * N * C", WRONG),
        (
            "half sum",
            "add_dot(sums[i], load<W>(ACCESS::at(x) + (token * N + i) * C + c), layer);",
            "float(half(add_dot(sums[i], load<W>(ACCESS::at(x) + (token * N + i) * C + c),"
            " layer)));",
            WRONG,
        ),
        ("space", "ACCESS::at(dh) +", f"ACCESS::at({_device('dh')}) +", NO_SPACE),
    ),
    *_many(
        "pre",
        ("barrier of the sums", f"{SUMMED}\n    BARRIER;", SUMMED, RACE),
        (
            "barrier of what is mapped",
            "BARRIER;\n    if (here.group_y",
            "if (here.group_y",
            RACE,
        ),
        NEXT,
        ("tail", "first + TOKENS < T ? first + TOKENS : T", "first + TOKENS", ANYWHERE),
        ("index", "(x) + next * N * C", "(x) + next * C", WRONG),
        ("next channels", "last ? own : c + step", "own", WRONG),
        ("index given", "token) * N + i]", "token) * N]", WRONG),
        ("half sum", SUMMED, _half_sums("M"), WRONG),
        ("space", "(sums, scale,", f"(sums, {_device('scale')},", NO_SPACE),
    ),
    *_many(
        "head",
        ("barrier of the sums", f"{SUMMED}\n    BARRIER;", SUMMED, RACE),
        NEXT,
        ("tail", "k < TOKENS && first + k < T;", "k < TOKENS;", ANYWHERE),
        ("index", "u[token * N + i] =", "u[token * N + N - 1 - i] =", WRONG),
        ("half sum", SUMMED, _half_sums("N"), WRONG),
        ("space", "float(scale[0])", f"float({_device('scale')}[0])", NO_SPACE),
    ),
    *_many(
        "mappings",
        ("barrier of the sums", f"{SUMMED}\n    BARRIER;", SUMMED, RACE),
        ("barrier of what is mapped", "BARRIER;\n    mix_matrices", "mix_matrices", RACE),
        NEXT,
        ("tail", "CHANNELS, first, T,", "CHANNELS, first, T + 1,", ANYWHERE),
        ("index", "partials_shape_1, first", "partials_shape_0, first", ANYWHERE),
        ("half sum", SUMMED, _half_sums("M"), WRONG),
        ("space", "(sums, scale,", f"(sums, {_device('scale')},", NO_SPACE),
    ),
    # what they share: the products
    *_many(
        "common",
        ("rows' tail", "if (k < rest) out.word", "if (k <= rest) out.word", ANYWHERE),
        ("phi's tail", "if (k < rest) out.at", "if (k <= rest) out.at", BOUNDS),
        ("phi's last columns", "(row < M ? row : M - 1) * K", "row * K", BOUNDS),
        ("rows beyond x", "(token < T ? token : T - 1) * K", "token * K", BOUNDS),
        ("columns beyond phi", "at < M && token < T)\n", "at <= M && token < T)\n", ANYWHERE),
        ("sums beyond", "at < M && token < T)\n", "at < M && token <= T)\n", ANYWHERE),
        ("barrier of the phi before", "/ SIMD;\n    BARRIER;\n", "/ SIMD;\n", RACE),
        ("squares of four lanes", "return v + simd_partner(v, 8);", "return v;", WRONG),
        op="project",
    ),
    *_many(
        "common",
        ("half sum of the K blocks", "totals[at] = sum;", "totals[at] = float(half(sum));", WRONG),
        (
            "the order of the K blocks",
            "sum += k_blocks[k_block *",
            "sum += k_blocks[(count - 1 - k_block) *",
            BITS,
        ),
        ("columns of the totals", "k < PRODUCTS && column + k < M", "k < PRODUCTS", ANYWHERE),
        op="project_few",
    ),
    *_many(
        "common",
        ("rows of a K block", "row < tokens && at < Block", "at < Block", ANYWHERE),
        ("numbers of a K block", "at < BlockSums<M>::SQUARES)", "true)", f"{ANYWHERE}|{RACE}"),
        ("the last K blocks", "begin + k < left ?", "true ?", ANYWHERE),
        ("K blocks of a split", "left - split * BLOCKS", "left", ANYWHERE),
        ("products of a split", "if (first + k < M)", "", f"{ANYWHERE}|{RACE}"),
        ("squares of the lanes", "+ (sum.at[2] + sum.at[3])", "", WRONG),
        ("barrier of the splits", "some, sums, here); BARRIER;", "some, sums, here);", RACE),
        ("barrier of the next splits", "BARRIER;  // the next splits", "// the next splits", RACE),
        (
            "half sum of the splits",
            "total += next.at[k];",
            "total += float(half(next.at[k]));",
            f"{WRONG}|{BITS}",
        ),
        op="pre_k_blocks",
    ),
    *_many(
        "common",
        ("streams mixed", "value(res, first + j)", "value(res, first)", WRONG),
        ("barrier of the phi", "}\n}\nBARRIER;\n}", "}\n}\n}", RACE),
        op="combine_project",
    ),
    *_many(
        "common",
        ("copies' tail", "if (rest > c + more)", "if (c + more >= 0)", ANYWHERE),
        ("nothing in a buffer", "put_nothing(like, to, lane);", "{}", ANYWHERE),
        ("copies' lanes", "row_lane(lane, frag / COUNT)", "row_lane(lane, own)", ANYWHERE),
        ("copies' fragments", "(frag - COUNT * own) * NUMBERS", "(frag - own) * NUMBERS", ANYWHERE),
        (
            "rows of a buffer",
            "buffer + k * RowFragments<R>::COUNT * SIMD, lane",
            "buffer, lane",
            WRONG,
        ),
        op="project, ahead",
    ),
    *_many(
        "common",
        ("the layer's copy", "y.at[0][r] + c, lane", "y.at[0][0] + c, lane", WRONG),
        op="combine_project, ahead",
    ),
    *_many(
        "common",
        ("rows beyond phi", "row < M ? rest - channel : 0", "rest - channel", BOUNDS),
        ("columns beyond du", "at < M && token < T ?", "token < T ?", BOUNDS),
        ("tokens beyond du", "at < M && token < end ?", "at < M ?", BOUNDS),
        ("an N tile's channels", "* 2 + n_tile % 2) *", "* 2) *", ANYWHERE),
        op="back",
    ),
    *_many(
        "common",
        ("halves of words", ">> (channel % 2 * 16)", ">> (0)", WRONG),
        op="back, narrow",
    ),
    # what they share: the last stage
    *_many(
        "common",
        ("the last partial", "for (; k < count; k++)", "for (; k + 1 < count; k++)", WRONG),
        (
            "half sum of the partials",
            "sum_one_by_one<PARTIALS_AT_ONCE>(from, count, NUMBERS)",
            "float(half(sum_one_by_one<PARTIALS_AT_ONCE>(from, count, NUMBERS)))",
            WRONG,
        ),
        ("the last tokens", "T - first < TOKENS ? int(T - first) : TOKENS", "TOKENS", ANYWHERE),
        ("groups of columns", "column < 2 * N ? 1 : 2", "column <= 2 * N ? 1 : 2", ANYWHERE),
        ("a token's logits", "= sums[k * NUMBERS + at]", "= sums[at]", WRONG),
        ("the sigmoid below zero", "exp(z < 0.0f ? z : -z)", "exp(-z)", WRONG),
        op="pre",
    ),
    *_many(
        "common",
        (
            "the collapse's tail",
            "c < C; c += next_channel<W>(here)",
            "c <= C; c += next_channel<W>(here)",
            ANYWHERE,
        ),
        (
            "half sum of the streams",
            "load<W>(streams + int64_t(i) * C + c));",
            "times(float(half(1.0f / 3)) * 3, load<W>(streams + int64_t(i) * C + c)));",
            WRONG,
        ),
        op="head",
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.kernel}: {fault.what}")
def test_seeded_faults_are_caught(fault: Fault) -> None:
    errors = (AssertionError, simulator.SimulatorError)
    with seeded(fault), pytest.raises(errors, match=fault.shows):
        _try(fault.op, space=fault.shows == NO_SPACE)
