"""mhc.no_grad: set once, and seen by the backends that can save work by it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import mhc_core as mhc
from mhc_core.gradients import wanted


def test_it_nests_and_ends_with_an_exception() -> None:
    with mhc.no_grad():
        with pytest.raises(KeyError), mhc.no_grad():
            raise KeyError
        assert not wanted()
    assert wanted()


def test_it_holds_in_its_own_thread_only() -> None:
    with mhc.no_grad(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(wanted).result()
        assert not wanted()


@pytest.mark.parametrize("backend", ["numpy", "jax", "mlx-compiled"])
def test_results_and_gradients_of_other_backends_are_the_same(backend: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 4, 8)).astype("f"), rng.normal(size=(3, 8)).astype("f")
    h_post, h_res = rng.uniform(size=(3, 4)).astype("f"), rng.uniform(size=(3, 4, 4)).astype("f")
    arrays = (x, y, h_post, h_res)
    with mhc.use_backend(backend):
        want = mhc.combine(*arrays), *mhc.vjp("combine", arrays, x)
        with mhc.no_grad():
            got = mhc.combine(*arrays), *mhc.vjp("combine", arrays, x)
    for one, other in zip(got, want, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
