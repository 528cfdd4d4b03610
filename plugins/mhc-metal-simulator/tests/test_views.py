"""Arrays may begin anywhere in a buffer: MLX passes a contiguous view as it is, at its offset."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest

mhc = pytest.importorskip("mhc_core", reason="mhc-core is not installed, whose kernels these are")

from kernel_checks import BACKEND, moved  # noqa: E402
from mhc_backends.kernels import launch as launches  # noqa: E402
from mhc_backends.kernels.ops import OPS  # noqa: E402
from mhc_backends.mlx_common import as_tuple, from_host  # noqa: E402
from mhc_conformance.cases import Case, Sizes, cases, data  # noqa: E402

ORDINARY = Sizes((2, 3), 4, 8, "the kit's ordinary batch, whose kernels it compiles")
MAPPED = ("aggregate", "combine", "residual_add_aggregate", "pre_scale", "gated_combine")


def _equal_bits(got: Any, want: Any) -> None:
    for one, other in zip(as_tuple(got), as_tuple(want), strict=True):
        assert mx.array_equal(one, other, equal_nan=True)


def _try(case: Case, dtype: str, starts: tuple[int, ...]) -> None:
    drawn = data(case, dtype, seed=0)
    primals, cotangents = (tuple(map(from_host, arrays)) for arrays in drawn)
    public = getattr(mhc, case.op)
    want = as_tuple(public(*primals, **case.options, backend=BACKEND))
    given = cotangents if len(want) > 1 else cotangents[0]
    gradients = mhc.vjp(case.op, primals, given, **case.options, backend=BACKEND)
    count = len(primals)
    arrays = (*primals, *cotangents)
    for start, k in itertools.product(
        starts, range(len(arrays))
    ):  # one is elsewhere, not the others
        views = (*arrays[:k], moved(arrays[k], start), *arrays[k + 1 :])
        if k < count:
            _equal_bits(public(*views[:count], **case.options, backend=BACKEND), want)
        given = views[count:] if len(want) > 1 else views[count]
        got = mhc.vjp(case.op, views[:count], given, **case.options, backend=BACKEND)
        _equal_bits(got, gradients)


@pytest.mark.parametrize("op", OPS)
def test_every_input_begins_anywhere(op: str) -> None:
    """Check that addresses change no number; a misaligned vector is a fault in the simulator."""
    _try(Case(op, "views", ORDINARY, next(iter(cases(op, "float32"))).static), "float32", (1, 2))


@pytest.mark.parametrize(("n", "shared"), [(2, False), (4, True)])
@pytest.mark.parametrize("op", MAPPED)
def test_mappings_begin_anywhere(op: str, n: int, shared: bool) -> None:
    """Check two streams, whose matrices are 16 bytes in rows of 8, and bfloat16's other vectors."""
    sizes = ORDINARY._replace(n=n)
    _try(Case(op, "views", sizes, shared=shared), "bfloat16", (1, 2))


@pytest.mark.parametrize("busy", [launches.BUSY, 0])
def test_what_the_products_read_begins_anywhere(busy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check whole blocks of channels: known to be aligned once everything that is read is."""
    monkeypatch.setattr(launches, "BUSY", busy)
    sizes, static = ORDINARY._replace(n=2, C=32), next(iter(cases("combine_pre", "float32"))).static
    _try(Case("combine_pre", "views", sizes, static), "bfloat16", (1, 2))
