"""mhc_core.diagnostics: right in every library, differentiable, and safe at the edges."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mhc_core as mhc
from mhc_core import diagnostics

LIBRARIES = ("numpy", "jax", "mlx", "torch")
LAYERS, TOKENS, N, C = 3, 2, 4, 6

Array = Any


def take(library: str, array: Array, dtype: str = "float32") -> Array:
    """Return an array of a library."""
    if library == "numpy":
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    module = "mlx.core" if library == "mlx" else library
    xp: Any = pytest.importorskip(module, reason=f"{library} is not installed")
    if library == "jax":
        return importlib.import_module("jax.numpy").asarray(array, dtype=dtype)
    if library == "mlx":
        return xp.array(array.astype(np.float32)).astype(getattr(xp, dtype))
    return xp.tensor(array).to(getattr(xp, dtype))


def host(array: Array) -> Array:
    return np.asarray(array).astype(np.float64)


def matrices(seed: int = 0, *shape: int) -> Array:
    """Draw mappings as hyper-connections have them: about 1, of both signs, none symmetric."""
    noise = np.random.default_rng(seed).normal(0, 0.3, (*(shape or (LAYERS, TOKENS)), N, N))
    return np.eye(N) + noise


def streams(seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(TOKENS, N, C))


# ---- the formulas, entry by entry ---------------------------------------------------------------


def one_gain(h: Array) -> tuple[float, float]:
    rows = [abs(sum(h[i, j] for j in range(N))) for i in range(N)]
    columns = [abs(sum(h[i, j] for i in range(N))) for j in range(N)]
    return max(rows), max(columns)


def one_error(h: Array) -> tuple[float, float]:
    rows = [abs(sum(h[i, j] for j in range(N)) - 1) for i in range(N)]
    columns = [abs(sum(h[i, j] for i in range(N)) - 1) for j in range(N)]
    return max(rows), max(columns)


def one_entropy(h: Array) -> float:
    each = []
    for row in np.abs(h):
        shares = row / row.sum()
        each.append(-sum(p * np.log(p) for p in shares if p > 0))
    return float(np.mean(each))


def one_similarity(x: Array) -> float:
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    norms = np.linalg.norm(x, axis=-1)
    return float(np.mean([x[i] @ x[j] / (norms[i] * norms[j]) for i, j in pairs]))


def products(h: Array, backward: bool = False) -> Array:
    """Multiply one token's matrices in loops over the remaining layers."""
    made = []
    for layer in range(len(h)):
        product = np.eye(N)
        for other in h[layer:] if backward else h[: layer + 1]:
            product = other @ product
        made.append(product)
    return np.stack(made)


EXPECTED: dict[str, Callable[[Array], Array]] = {
    "gain": lambda h: np.array([[one_gain(m) for m in layer] for layer in h]),
    "sum_errors": lambda h: np.array([[one_error(m) for m in layer] for layer in h]),
    "entropy": lambda h: np.array([[one_entropy(m) for m in layer] for layer in h]),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", EXPECTED)
def test_numbers_of_a_mapping(library: str, name: str) -> None:
    h = matrices()
    told = getattr(diagnostics, name)(take(library, h))
    parts = told if isinstance(told, tuple) else (told,)
    assert all(type(part) is type(take(library, h)) for part in parts)
    got = np.stack([host(part) for part in parts], axis=-1).reshape(EXPECTED[name](h).shape)
    np.testing.assert_allclose(got, EXPECTED[name](h), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_products_and_their_gains(library: str) -> None:
    h = matrices()
    ahead = np.stack([products(h[:, t]) for t in range(TOKENS)], axis=1)
    back = np.stack([products(h[:, t], backward=True) for t in range(TOKENS)], axis=1)
    own = take(library, h)
    np.testing.assert_allclose(host(diagnostics.composite(own)), ahead, rtol=1e-5, atol=1e-5)
    got = host(diagnostics.composite(own, "backward"))
    np.testing.assert_allclose(got, back, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ahead[-1], back[0])
    forward, backward = (host(part) for part in diagnostics.composite_gain(own))
    for layer in range(LAYERS):
        for token in range(TOKENS):
            assert forward[layer, token] == pytest.approx(
                one_gain(ahead[layer, token])[0], rel=1e-5
            )
            assert backward[layer, token] == pytest.approx(
                one_gain(back[layer, token])[1], rel=1e-5
            )


@pytest.mark.parametrize("library", LIBRARIES)
def test_similarity_of_streams(library: str) -> None:
    x = streams()
    got = host(diagnostics.stream_similarity(take(library, x)))
    np.testing.assert_allclose(got, [one_similarity(one) for one in x], rtol=1e-5, atol=1e-6)
    alone = diagnostics.stream_similarity(take(library, x[:, :1]))
    assert host(alone).tolist() == [1.0] * TOKENS


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_list_of_layers_is_the_same_as_their_stack(library: str) -> None:
    h = take(library, matrices())
    for ours, theirs in zip(
        diagnostics.composite_gain([h[k] for k in range(LAYERS)]),
        diagnostics.composite_gain(h),
        strict=True,
    ):
        np.testing.assert_array_equal(host(ours), host(theirs))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_summary_is_one_number_each(library: str) -> None:
    h, x = matrices(), streams()
    told = diagnostics.summary(take(library, h), take(library, x))
    assert all(part.shape == () for part in told.values())
    forward, backward = diagnostics.composite_gain(h)
    layer = [part.mean(axis=1).max() for part in diagnostics.gain(h)]
    errors = [part.max() for part in diagnostics.sum_errors(h)]
    want = {
        "gain_forward": forward[-1].mean(),
        "gain_backward": backward[0].mean(),
        "layer_gain_forward": layer[0],
        "layer_gain_backward": layer[1],
        "row_error": errors[0],
        "column_error": errors[1],
        "entropy": diagnostics.entropy(h).mean(),
        "stream_similarity": diagnostics.stream_similarity(x).mean(),
    }
    assert {k: float(v) for k, v in told.items()} == pytest.approx(want, rel=1e-5)
    assert "stream_similarity" not in diagnostics.summary(take(library, h))


# ---- what they mean -----------------------------------------------------------------------------


def test_doubly_stochastic_products_do_not_amplify_however_deep() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (64, TOKENS, N, N))
    forward, backward = diagnostics.composite_gain(mhc.sinkhorn(logits, iterations=200))
    np.testing.assert_allclose(forward, 1, atol=1e-3)
    np.testing.assert_allclose(backward, 1, atol=1e-3)
    forward, _ = diagnostics.composite_gain(matrices(0, 64, TOKENS))
    assert forward[-1].min() > 100


def test_only_the_axis_done_last_is_exact_and_the_other_comes_closer() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (100, N, N))
    column_errors: list[float] = []
    for iterations in (1, 5, 20):
        row_error, column_error = diagnostics.sum_errors(mhc.sinkhorn(logits, iterations))
        assert row_error.max() < 1e-12
        column_errors.append(float(column_error.max()))
    assert column_errors == sorted(column_errors, reverse=True)
    assert column_errors[0] > 10 * column_errors[-1]


def test_entropy_and_similarity_at_their_ends() -> None:
    assert float(diagnostics.entropy(np.eye(N))) == 0
    assert float(diagnostics.entropy(np.full((N, N), 0.25))) == pytest.approx(np.log(N))
    same = np.ones((N, 1)) * np.arange(1.0, C + 1)
    assert float(diagnostics.stream_similarity(same)) == pytest.approx(1)
    assert float(diagnostics.stream_similarity(np.eye(N, C))) == pytest.approx(0)
    assert float(diagnostics.stream_similarity(np.zeros((N, C)))) == 0


# ---- dtypes, compilers, gradients ---------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_numbers_are_float32(library: str, dtype: str) -> None:
    h, x = take(library, matrices(), dtype), take(library, streams(), dtype)
    for told in (*diagnostics.composite_gain(h), *diagnostics.summary(h, x).values()):
        assert str(told.dtype).rpartition(".")[2] == "float32"


def test_float64_stays() -> None:
    for told in diagnostics.summary(matrices(), streams()).values():
        assert told.dtype == np.float64


def test_they_run_under_the_compilers() -> None:
    import jax
    import mlx.core as mx

    def numbers(h: Array, x: Array) -> list[Array]:
        return list(diagnostics.summary(h, x).values())

    h, x = matrices(), streams()
    for library, compiled in (("jax", jax.jit(numbers)), ("mlx", mx.compile(numbers))):
        own = (take(library, h), take(library, x))
        for ours, theirs in zip(compiled(*own), numbers(h, x), strict=True):
            assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def _smooth_sum(h: Array, x: Array) -> Array:
    forward, backward = diagnostics.composite_gain(h)
    errors = diagnostics.sum_errors(h)
    parts = (*errors, diagnostics.entropy(h), diagnostics.stream_similarity(x))
    return sum((part.sum() for part in parts), forward[-1].sum() + backward[0].sum())


def test_gradients_are_those_of_the_numbers() -> None:
    import jax
    import mlx.core as mx

    h, x, step = matrices(), streams(), 1e-6
    rng = np.random.default_rng(3)
    along_h, along_x = rng.normal(size=h.shape), rng.normal(size=x.shape)
    ends = [_smooth_sum(h + s * along_h, x + s * along_x) for s in (step, -step)]
    slope = (ends[0] - ends[1]) / (2 * step)
    for library, pulled in (
        ("jax", jax.jit(jax.grad(_smooth_sum, argnums=(0, 1)))),
        ("mlx", mx.grad(_smooth_sum, argnums=(0, 1))),
    ):
        dh, dx = pulled(take(library, h), take(library, x))
        got = (host(dh) * along_h).sum() + (host(dx) * along_x).sum()
        assert got == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("library", ["jax", "mlx"])
def test_gradients_are_finite_where_entries_and_streams_are_zero(library: str) -> None:
    import jax
    import mlx.core as mx

    def pulled(function: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
        if library == "mlx":
            return mx.grad(function, argnums=(0, 1))
        return jax.jit(jax.grad(function, argnums=(0, 1)))

    x = take(library, np.zeros((1, N, C)))
    for h in (np.zeros((2, 1, N, N)), np.stack([np.eye(N)[None]] * 2)):
        for gradient in pulled(_smooth_sum)(take(library, h), x):
            assert np.isfinite(host(gradient)).all()


# ---- errors and words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: diagnostics.gain(np.ones((2, 3))), ValueError, "gain: h_res has shape (2, 3)"),
        (lambda: diagnostics.gain(np.ones((2, 2), int)), TypeError, "gain: h_res has dtype int64"),
        (lambda: diagnostics.entropy([[1.0]]), TypeError, "entropy: h_res is a list"),
        (lambda: diagnostics.sum_errors(3.0), TypeError, "sum_errors: h_res is a float"),
        (lambda: diagnostics.stream_similarity(np.ones(3)), ValueError, "needs (..., n, C)"),
        (lambda: diagnostics.composite(np.eye(2)), ValueError, "needs [L, ..., n, n] or a list"),
        (lambda: diagnostics.composite([]), ValueError, "composite: h_res is empty"),
        (lambda: diagnostics.summary(np.ones((0, 2, 2))), ValueError, "L at least 1"),
        (
            lambda: diagnostics.composite([np.eye(2), np.eye(3)]),
            ValueError,
            "layers of shapes (2, 2) and (3, 3)",
        ),
        (
            lambda: diagnostics.composite(np.ones((1, 2, 2)), "back"),  # pyright: ignore
            ValueError,
            "direction is 'back'; needs 'forward' or 'backward'",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_importing_it_brings_no_array_library() -> None:
    code = "import sys, mhc_core.diagnostics; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not {"numpy", "jax", "mlx", "torch", "array_api_compat"} & set(done.stdout.split())


@pytest.mark.parametrize("name", diagnostics.__all__)
def test_every_function_tells_its_formula_shapes_and_example(name: str) -> None:
    text = inspect.getdoc(getattr(diagnostics, name)) or ""
    for head in ("Parameters\n---", "Returns\n---", "Examples\n---", "``[..."):
        assert head in text or (name in ("summary", "composite_gain", "composite"))
    for parameter in inspect.signature(getattr(diagnostics, name)).parameters:
        assert f"\n{parameter}\n" in text


def test_the_examples_run() -> None:
    result = doctest.testmod(diagnostics)
    assert result.attempted > len(diagnostics.__all__)
    assert not result.failed
