"""Kernels in the CUDA dialect, forward and back, run on a CPU against NumPy in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_on_cpu import launcher, needs_gcc

import mhc_core as mhc
from mhc_backends.kernels import launch
from mhc_conformance.cases import with_variant
from mhc_conformance.subject import several

mx = pytest.importorskip("mlx.core", reason="MLX is not installed, which launches the kernels")
pytestmark = needs_gcc

# as launch.BUSY: all sizes count as few tokens, or as many; or as the fewest
FEW, MANY, FEWEST = 2**30, 0, 2**31
NARROW = {"float32": 0.0, "float16": 2**-10, "bfloat16": 2**-7}


class Case(NamedTuple):
    """T tokens of n streams of C channels, two parts and tails of all; `back` with the vjp."""

    op: str
    dtype: str
    n: int
    busy: int
    back: bool = False
    T: int = 21
    C: int = 296
    mixes: bool = True


CASES = [
    Case("combine_pre", "bfloat16", 4, MANY, back=True, C=288, mixes=False),
    Case("combine_pre", "float32", 3, FEW, back=True, T=9, mixes=False),
    Case("combine_pre", "bfloat16", 4, FEWEST, T=18, mixes=False),
    Case("pre", "float16", 4, FEWEST, T=3, mixes=False),
    Case("mappings", "float32", 2, MANY, mixes=False),
    Case("combine", "bfloat16", 4, MANY, back=True, mixes=False),
    Case("combine", "bfloat16", 8, MANY, back=True, T=3, C=72),
    Case("combine_pre", "bfloat16", 4, MANY, back=True),
    Case("combine_pre", "float32", 4, FEW, back=True, T=9),
    Case("combine_pre", "float16", 3, MANY),
    Case("combine_pre", "bfloat16", 6, FEW, T=3),
    Case("combine_pre", "bfloat16", 4, FEW, T=37),
    Case("combine_pre", "float16", 2, FEW, T=18, mixes=True),
    Case("combine_pre", "bfloat16", 4, FEWEST, T=18),
    Case("combine_pre", "float32", 4, FEWEST, T=3),
    Case("pre", "bfloat16", 4, FEW, T=3),
    Case("pre", "float32", 4, FEWEST, T=3),
    Case("pre", "float16", 4, MANY, T=70, C=64),
    Case("pre", "bfloat16", 4, MANY, T=70, C=64),  # whole blocks: the streams are on their way
    # whole slabs of channels: dx and dphi in one pass
    Case("pre", "bfloat16", 4, MANY, back=True, T=37, C=128),
    Case("pre", "bfloat16", 3, FEW, back=True, T=16, C=64, mixes=False),
    Case("combine_pre", "bfloat16", 4, MANY, back=True, T=53, C=128),
    Case("combine_pre", "bfloat16", 3, FEW, back=True, T=5, C=64),
    Case("combine_pre", "bfloat16", 4, MANY, back=True, T=18, C=64, mixes=False),
    Case("combine_pre", "bfloat16", 2, FEW, back=True, T=18, C=128),
    Case("head", "bfloat16", 4, MANY, back=True, T=17, C=64),
    Case("mappings", "bfloat16", 2, MANY, back=True, T=17, C=256),
    Case("pre_norm", "float32", 4, FEW, back=True, T=3),
    Case("pre_norm", "float32", 3, FEW, T=3, mixes=False),
    Case("combine_pre_norm", "float32", 4, FEWEST, T=3),
    Case("combine_pre_norm", "float32", 4, FEWEST, T=3, mixes=False),
    Case("head", "float32", 4, FEW, back=True),
    Case("head", "bfloat16", 4, MANY),
    Case("mappings", "float32", 2, MANY),
    Case("mappings", "float16", 1, FEW),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def _draw(case: Case) -> list[Any]:
    """Draw an op's arrays; x' is exact in every dtype, so that its rounding cannot differ."""
    _, dtype, n, _, _, T, C, mixes = case
    rng, m = np.random.default_rng(n), n if case.op == "head" else n * n * mixes + 2 * n

    def steps(most: int, *shape: int) -> Any:
        return mx.array(rng.integers(-most, most + 1, shape).astype(np.float32))

    def normal(*shape: int) -> Any:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    streams, layer = (steps(2, T, *last).astype(getattr(mx, dtype)) for last in ((n, C), (C,)))
    phi = normal(m, n * C) / (2 * n * C) ** 0.5
    h_res = steps(2, T, n, n) / 2 if mixes else None
    mapped = [layer, steps(2, T, n) / 2, h_res] if "combine" in case.op else []
    if case.op == "combine":
        return [streams, *mapped]
    weight = [normal(C)] if "norm" in case.op else []
    parts = 1 if case.op == "head" else 2 + mixes
    return [streams, *mapped, phi, normal(parts), normal(m), *weight]


def _float64(array: Any) -> Any:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _close(got: Sequence[Any], want: Sequence[Any]) -> None:
    from mhc_backends.kernels.mlx import dtype_name

    for one, other in zip(got, want, strict=True):
        size = np.abs(other).max()
        off = np.abs(_float64(one) - other).max() / size
        allowed = 4e-6 + NARROW[dtype_name(one.dtype)]
        assert off <= allowed, f"{one.shape} is off by {off:.2g}"


def _there(arrays: Sequence[Any]) -> list[Any]:
    return [array for array in arrays if array is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_on_a_cpu(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    monkeypatch.setattr(launch, "BUSY", case.busy)
    monkeypatch.setattr(launch, "FEWEST_TOKENS", {"cuda": case.T if case.busy == FEWEST else 0})
    own = Ops(Kernels(launcher(folder), "cuda", 227 * 1024))
    variant, primals = mhc.DEEPSEEK_V4 if case.mixes else mhc.HY_V4, _draw(case)
    static = {} if case.op == "combine" else dict(with_variant(case.op, variant, h_raw=True))
    with mhc.no_grad():
        outputs = several(getattr(own, case.op)(*primals, **static))
    wide = [None if array is None else _float64(array) for array in primals]
    want = several(getattr(mhc, case.op)(*wide, **static, backend="numpy"))
    _close(_there(outputs), _there(want))
    if case.busy in (FEW, FEWEST):  # the kernels for many tokens have the same bits
        monkeypatch.setattr(launch, "BUSY", MANY)
        monkeypatch.setattr(launch, "FEWEST_TOKENS", {"cuda": 0})
        with mhc.no_grad():
            many = several(getattr(own, case.op)(*primals, **static))
        pairs = zip(_there(outputs), _there(many), strict=True)
        assert all(mx.array_equal(a, b) for a, b in pairs)
    if case.back:
        given = _cotangents(outputs)
        gradients = own.vjp(case.op, primals, given, **static)
        wide_given = tuple(None if one is None else _float64(one) for one in given)
        want = mhc.vjp(case.op, tuple(wide), wide_given, **static, backend="numpy")
        _close(_there(gradients), _there(want))


def _cotangents(outputs: Sequence[Any]) -> list[Any]:
    rng = np.random.default_rng(5)

    def like(out: Any) -> Any:
        return mx.array(rng.normal(size=out.shape).astype(np.float32)).astype(out.dtype)

    return [None if out is None else like(out) for out in outputs]


def test_one_pass_for_dx_and_dphi(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the kernels of several passes, where float64 does not round h before the norm.

    The cotangent of h is float32 there, and arrays begin anywhere.
    """
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    made: list[str] = []

    def recording(*, name: str, **texts: Any) -> Any:
        made.append(name)
        return launcher(folder)(name=name, **texts)

    own = Ops(Kernels(recording, "cuda", 227 * 1024))
    case = Case("combine_pre_norm", "bfloat16", 4, MANY, T=19, C=64)
    static = dict(with_variant(case.op, mhc.DEEPSEEK_V4, h_raw=False))
    primals = [mx.concatenate([one.reshape(-1)[:1], one.reshape(-1)]) for one in _draw(case)]
    primals = [one[1:].reshape(like.shape) for one, like in zip(primals, _draw(case), strict=True)]
    outputs = getattr(own, case.op)(*primals, **static)
    given = _cotangents(several(outputs))
    one_pass = own.vjp(case.op, primals, given, **static)
    assert any(name.startswith("mhc_project_vjp") for name in made)
    del made[:]
    monkeypatch.setattr(launch, "SLAB_STREAMS", ())
    passes = own.vjp(case.op, primals, given, **static)
    assert any(name.startswith("mhc_project_dphi") for name in made)
    _close(_there(one_pass), [_float64(one) for one in _there(passes)])


def test_gates_on_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the kernels of gates, for few tokens and for many, which have the same bits."""
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    own = Ops(Kernels(launcher(folder), "cuda", 227 * 1024))
    (T, n, C, rank), rng = (37, 3, 101, 37), np.random.default_rng(3)
    K = n * C

    def normal(size: float, *shape: int) -> Any:
        return mx.array((size * rng.normal(size=shape)).astype(np.float32))

    weights = normal(2 * K**-0.5, rank, K), normal(rank**-0.5, K, rank), normal(K**-0.5, n, K)
    primals = [normal(1, T, n, C), normal(0.3, K), *weights]
    given = [normal(1, T, C), normal(1, T, n)]
    wide, wide_given = (tuple(map(_float64, arrays)) for arrays in (primals, given))
    want = mhc.gated_pre(*wide, 0.1, backend="numpy")
    back = mhc.vjp("gated_pre", wide, wide_given, eps=0.1, backend="numpy")
    monkeypatch.setattr(launch, "gated_steps", lambda n, C: 2)
    made: list[Any] = []
    for many in (False, True):
        monkeypatch.setattr(launch, "whole_streams", lambda T, n, many=many: many)
        monkeypatch.setattr(launch, "channel_tiles", lambda T, C, many=many: 4 if many else 2)
        with mhc.no_grad():
            made += [[*own.gated_pre(*primals, eps=0.1)]]
        made[-1] += own.vjp("gated_pre", primals, given, eps=0.1)
        _close(made[-1], [*want, *back])
    narrow = [array.astype(mx.bfloat16) for array in primals], [given[0].astype(mx.bfloat16)]
    wide, wide_given = (tuple(map(_float64, arrays)) for arrays in (narrow[0][:4], narrow[1]))
    back = mhc.vjp("gated_head", wide, wide_given, eps=0.1, backend="numpy")
    _close(own.vjp("gated_head", narrow[0][:4], narrow[1], eps=0.1), back)
    assert all(mx.array_equal(a, b) for a, b in zip(made[0], made[-1], strict=True))


def test_mappings_begin_anywhere(folder: Path) -> None:
    """Check views such as flat[1:5], passed as they are whatever the streams' addresses."""
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    own = Ops(Kernels(launcher(folder), "cuda", 227 * 1024))
    x, y = mx.arange(3 * 4 * 8.0).reshape(3, 4, 8), mx.ones((3, 8))
    flat = mx.arange(40.0)
    mx.eval(x, y, flat)
    wide = np.arange(40.0)
    for start in (0, 1, 2):
        h_pre, h_res = flat[start : start + 4], flat[start : start + 16].reshape(4, 4)
        weights, matrix = wide[start : start + 4], wide[start : start + 16].reshape(4, 4)
        _close([own.aggregate(x, h_pre)], [np.einsum("n,tnc->tc", weights, _float64(x))])
        want = np.einsum("ij,tjc->tic", matrix, _float64(x)) + weights[:, None]
        _close([own.combine(x, y, h_pre, h_res)], [want])


def test_a_nan_that_gpus_make_stays_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check NaN with bits 0x7fffffff, as GPUs make it: they overflow in the rounding to TF32."""
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels

    case = Case("mappings", "float32", 2, MANY)
    monkeypatch.setattr(launch, "BUSY", case.busy)
    monkeypatch.setattr(launch, "FEWEST_TOKENS", {"cuda": case.T if case.busy == FEWEST else 0})
    own = Ops(Kernels(launcher(folder), "cuda", 227 * 1024))
    streams, phi, *rest = _draw(case)
    unknown = np.array(phi)
    unknown[0, 5] = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
    with mhc.no_grad():
        h_pre, *_ = own.mappings(streams, mx.array(unknown), *rest, variant=mhc.DEEPSEEK_V4)
    assert np.isnan(np.array(h_pre)).tolist() == [[True, False]] * case.T
