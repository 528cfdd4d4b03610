"""A layer's input in FP8: elements and scales against ml_dtypes and the definition, per library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mhc_core import fp8

BFLOAT16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
NUMBERS = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)


def numbers(dtype: Any, C: int) -> np.ndarray[Any, Any]:
    """Return rows of very different sizes, with all that decides: ties, 448 and its neighbours."""
    rng = np.random.default_rng(C)
    rows = rng.normal(size=(40, C)) * np.exp2(rng.integers(-40, 40, (40, 1)))
    finite = np.sort(NUMBERS[np.isfinite(NUMBERS)])
    ties = (finite[1:] + finite[:-1]) / 2  # halfway between two elements
    many = np.resize(np.concatenate([ties, -ties]), (8, C))
    many[:, 0] = 448.0  # so that the scale is 1
    rows[:8] = many
    steps = np.float32(448.0) + np.arange(-3, 4).astype(np.float32) * np.float32(2**-15)
    rows[8:15] = np.clip(rng.normal(size=(7, C)), -1, 1)
    rows[8:15, -1] = steps * np.exp2(np.arange(-9, 5, 2))
    rows[15] = 0
    rows[16] = np.clip(rows[16], -1e-5, 1e-5)
    rows[17, :1] = 3e38
    return rows.astype(dtype)


def oracle(h: np.ndarray[Any, Any], block: int) -> tuple[Any, Any]:
    """Return elements and scales by the definition, in float64 and by ml_dtypes' conversion."""
    wide = h.astype(np.float64)
    elements, exponents = np.empty(h.shape, np.uint8), list[Any]()
    for start in range(0, h.shape[-1], block):
        part = wide[..., start : start + block]
        largest = np.maximum(np.abs(part).max(-1), np.float64(np.float32(1e-4)))
        mantissa, exponent = np.frexp(largest / 448)
        exponent = exponent - (mantissa == 0.5)  # the least with 2^exponent >= largest / 448
        scaled = np.ldexp(part, -exponent[..., None])
        assert np.abs(scaled).max() <= 448
        elements[..., start : start + block] = scaled.astype(E4M3).view(np.uint8)
        exponents.append(exponent + 127)
    return elements, np.stack(exponents, -1).astype(np.uint8)


def in_mlx(compiled: bool) -> Callable[..., Any]:
    mx = pytest.importorskip("mlx.core", reason="needs MLX")

    def run(h: np.ndarray[Any, Any], block: int) -> Any:
        from mhc_backends.mlx_common import from_host, to_host

        def quantised(h: Any) -> Any:
            return fp8.quantised(h, block)

        found = (mx.compile(quantised) if compiled else quantised)(from_host(h))
        again = fp8.dequantised(*found, block)
        return *map(to_host, found), to_host(again)

    return run


def in_jax(h: np.ndarray[Any, Any], block: int) -> Any:
    @jax.jit
    def both(h: Any) -> Any:
        found = fp8.quantised(h, block)
        return *found, fp8.dequantised(*found, block)

    return map(np.asarray, both(jnp.asarray(h)))


def in_numpy(h: np.ndarray[Any, Any], block: int) -> Any:
    found = fp8.quantised(h, block)
    return *found, fp8.dequantised(*found, block)


LIBRARIES: dict[str, Callable[[], Callable[..., Any]]] = {
    "numpy": lambda: in_numpy,
    "jax": lambda: in_jax,
    "mlx": lambda: in_mlx(False),
    "mlx, compile": lambda: in_mlx(True),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_elements_and_scales_are_those_of_the_definition(library: str) -> None:
    run = LIBRARIES[library]()
    for dtype, block, C in ((np.float32, 128, 256), (BFLOAT16, 32, 72), (np.float16, 128, 5)):
        h = numbers(np.float32, C)
        h = (np.clip(h, -6e4, 6e4) if dtype == np.float16 else h).astype(dtype)
        elements, scales, again = run(h, block)
        want, exponents = oracle(h, block)
        assert scales.dtype == elements.dtype == np.uint8
        assert np.array_equal(scales, exponents)
        assert np.array_equal(elements, want)
        spread = np.repeat(exponents.astype(np.int64) - 127, block, -1)[..., :C]
        assert np.array_equal(again, np.ldexp(NUMBERS[want], spread).astype(np.float32))


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_not_finite_is_nan(library: str) -> None:
    h = np.ones((3, 40), np.float32)
    h[0, 1], h[1, 2], h[2, 3] = np.inf, -np.inf, np.nan
    *_, again = LIBRARIES[library]()(h, 32)
    assert np.array_equal(np.isnan(again), ~np.isfinite(h))


def test_the_rounding_is_a_constant_of_the_gradient() -> None:
    """Train through it by the straight-through estimator of the module's text."""
    mx = pytest.importorskip("mlx.core", reason="needs MLX")
    h = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)

    def loss(xp: Any, stop: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def value(h: Any) -> Any:
            rounded = fp8.dequantised(*fp8.quantised(h)).astype(h.dtype)
            return (xp.square(h + stop(rounded - h)) / 2).sum()

        return value

    want = in_numpy(h, 128)[-1]
    got = jax.jit(jax.grad(loss(jnp, jax.lax.stop_gradient)))(jnp.asarray(h))
    assert np.allclose(got, want, rtol=1e-6)
    assert np.allclose(mx.grad(loss(mx, mx.stop_gradient))(mx.array(h)), want, rtol=1e-6)


def test_wrong_arguments_are_named() -> None:
    h = np.ones((2, 200), np.float32)
    for block in (64, 0, "128", True, None):
        with pytest.raises(ValueError, match=r"quantised: block is .*; needs 128 or 32"):
            fp8.quantised(h, block)
    with pytest.raises(TypeError, match="quantised: h"):
        fp8.quantised(np.ones(3, np.int32))
    with pytest.raises(TypeError, match="quantised: h"):
        fp8.quantised([1.0])
    with pytest.raises(ValueError, match="quantised: h"):
        fp8.quantised(np.float32(1) * np.ones((), np.float32))
    elements, scales = fp8.quantised(h)
    with pytest.raises(ValueError, match=r"dequantised: scales has shape \(2, 2\); needs \(2, 7\)"):
        fp8.dequantised(elements, scales, 32)
