"""mhc demo's model: the four connections, the gradients, the optimizer, on JAX and on MLX."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from demo_runs import BACKENDS, VARIANTS, model, settings

import mhc_core as mhc
from mhc_core.cli.demo import _adam, _checkpoint, _data, _library, _model
from mhc_core.cli.demo._connections import CONNECTIONS
from mhc_core.cli.demo._train import Task, Trained, train

Array = Any
TEXT = (b"the same procedure as every year, James. " * 40)[:1000]
N, C, TOKENS = 4, 8, 3


def trained(library: str, variant: str, tmp_path: Any, **changed: Any) -> Trained:
    task = Task(
        settings=settings(BACKENDS[library], **changed),
        variant=variant,
        text=TEXT,
        library=_library.library(library),
        folder=tmp_path,
        save_every=100,
        before=None,
    )
    return train(task, lambda taken, loss: None)


# ---- connections, on NumPy in float64 -----------------------------------------------------------


def drawn(variant: str, seed: int = 0) -> dict[str, Array]:
    """Draw the parameters of one layer, none of them at its initial value."""
    rng = np.random.default_rng(seed)
    first = CONNECTIONS[variant].parameters(C, range(1), rng)
    return {k: v[0] + rng.normal(0, 0.3, v.shape[1:]) for k, v in first.items()}


def hyper_connection(x: Array, p: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Return Eqs. (10-13) of arXiv:2409.19606 for one token, entry by entry."""
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]
    pre, post, res = np.zeros(N), np.zeros(N), np.zeros((N, N))
    for j in range(N):
        turned = np.tanh(normed[j] @ p["dynamic"])
        pre[j] = p["scale"][0] * turned[0] + p["static"][j, 0]
        post[j] = p["scale"][1] * turned[1] + p["static"][j, 1]
        res[:, j] = p["scale"][2] * turned[2:] + p["static"][j, 2:]
    return pre, post, res


def test_hyper_connections_are_as_published() -> None:
    rng, connection = np.random.default_rng(1), CONNECTIONS["HC"](np)
    h, y = rng.normal(size=(TOKENS, C)), rng.normal(size=(TOKENS, C))
    first, second = drawn("HC", 1), drawn("HC", 2)
    state, given = connection.start(h, first)
    for t in range(TOKENS):
        x = np.stack([h[t]] * N)
        pre, post, res = hyper_connection(x, first)
        np.testing.assert_allclose(given[t], pre @ x)
        np.testing.assert_allclose(connection.seen(state)[1][t], res)
        following, after = connection.between(state, y, second)
        x = res @ x + np.outer(post, y[t])
        np.testing.assert_allclose(connection.seen(following)[0][t], x)
        pre, post, res = hyper_connection(x, second)
        np.testing.assert_allclose(after[t], pre @ x)
        end = (res @ x + np.outer(post, y[t])).sum(0)
        np.testing.assert_allclose(connection.finish(following, y)[t], end)


def test_mhc_maps_mixes_and_sums() -> None:
    rng, connection = np.random.default_rng(2), CONNECTIONS["mHC"](np)
    h, y = rng.normal(size=(TOKENS, C)), rng.normal(size=(TOKENS, C))
    first, second = (drawn("mHC", seed) for seed in (3, 4))
    x = np.stack([h] * N, axis=1)
    pre, post, res = mhc.mappings(x, first["phi"], first["scale"], first["bias"], mhc.PAPER)
    state, given = connection.start(h, first)
    np.testing.assert_allclose(given, np.einsum("ti,tic->tc", pre, x))
    state, after = connection.between(state, y, second)
    x = np.einsum("tij,tjc->tic", res, x) + post[..., None] * y[:, None]
    pre, post, res = mhc.mappings(x, second["phi"], second["scale"], second["bias"], mhc.PAPER)
    np.testing.assert_allclose(connection.seen(state)[0], x)
    np.testing.assert_allclose(connection.seen(state)[1], res)
    np.testing.assert_allclose(after, np.einsum("ti,tic->tc", pre, x))
    x = np.einsum("tij,tjc->tic", res, x) + post[..., None] * y[:, None]
    np.testing.assert_allclose(connection.finish(state, y), x.sum(1))


def test_single_pass_takes_the_mix_of_the_layer_before() -> None:
    rng, connection = np.random.default_rng(5), CONNECTIONS["single-pass"](np)
    h, y = rng.normal(size=(TOKENS, C)), rng.normal(size=(TOKENS, C))
    first, second = (drawn("single-pass", seed) for seed in (6, 7))
    x = np.stack([h] * N, axis=1)
    arrays = (first["phi"], first["scale"], first["bias"])
    before, post, res = mhc.mappings(x, *arrays, mhc.DEEPSEEK_V41)
    state, given = connection.start(h, first)
    np.testing.assert_allclose(given, x[:, 0])  # one-hot on stream 0
    state, after = connection.between(state, y, second)
    x = np.einsum("tij,tjc->tic", res, x) + post[..., None] * y[:, None]
    np.testing.assert_allclose(after, np.einsum("ti,tic->tc", before, x))
    arrays = (second["phi"], second["scale"], second["bias"])
    last, post, res = mhc.mappings(x, *arrays, mhc.DEEPSEEK_V41)
    x = np.einsum("tij,tjc->tic", res, x) + post[..., None] * y[:, None]
    np.testing.assert_allclose(connection.finish(state, y), np.einsum("ti,tic->tc", last, x))


# ---- the model ----------------------------------------------------------------------------------


def test_the_loss_is_that_of_a_transformer_in_numpy() -> None:
    """Compare the residual variant with one in float64 NumPy, with one loop over the layers."""
    made, parameters = model("jax", "residual")
    tokens = _data.batch(TEXT, 0, 0, 2, 8)
    p = {name: np.asarray(array, np.float64) for name, array in parameters.items()}

    def normed(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    losses = []
    for row in tokens:
        x = p["bytes"][row[:-1]] + p["positions"]
        for block in range(2):
            q, k, v = np.split(
                normed(x, p["attention.norm"][block]) @ p["attention.in"][block], 3, 1
            )
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                scores = q[:, head] @ k[:, head].T / 2 + np.triu(np.full((8, 8), -np.inf), 1)
                shares = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(shares / shares.sum(1, keepdims=True) @ v[:, head])
            x = x + np.concatenate(heads, axis=1) @ p["attention.out"][block]
            inner = np.maximum(normed(x, p["mlp.norm"][block]) @ p["mlp.in"][block], 0) ** 2
            x = x + inner @ p["mlp.out"][block]
        logits = normed(x, p["norm"]) @ p["logits"]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses += [-math.log(share[byte]) for share, byte in zip(shares, row[1:], strict=True)]
    xp = made.xp
    assert float(made.loss(parameters, xp.asarray(tokens))) == pytest.approx(np.mean(losses), 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_layer_sees_what_comes_later(variant: str) -> None:
    made, parameters = model("mlx", variant)
    tokens = _data.batch(TEXT, 0, 0, 2, 8)
    changed = tokens.copy()
    changed[:, 5] = 90
    before, after = (made.look(parameters, made.xp.asarray(t)) for t in (tokens, changed))
    for ours, theirs in zip(before, after, strict=True):
        one, other = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_array_equal(one[:, :, :5], other[:, :, :5])
    assert not np.array_equal(np.asarray(before[0])[:, :, 5:], np.asarray(after[0])[:, :, 5:])
    assert before.h_res.shape[:3] == (4, 2, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_libraries_train_alike_and_every_parameter_learns(variant: str, tmp_path: Any) -> None:
    depth = 4 if variant == "mHC" else 2  # JAX's compiler takes its time
    outcomes = {name: trained(name, variant, tmp_path, depth=depth) for name in BACKENDS}
    ours, theirs = outcomes["jax"].history, outcomes["mlx"].history
    for name in ("loss", "norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-4)
    np.testing.assert_allclose(ours["gain_forward"], theirs["gain_forward"], rtol=1e-4)
    np.testing.assert_allclose(outcomes["jax"].kept.h_res, outcomes["mlx"].kept.h_res, atol=2e-3)
    start = _model.initial(settings(depth=depth), variant)
    for one in outcomes.values():
        for name, array in one.parameters.items():
            moved = np.abs(array - start[name]).reshape(len(array), -1).max(axis=1)
            unseen = name == "bytes"  # few bytes of 256 are in the text
            assert moved.max() > 0 if unseen else moved.min() > 0, name
        assert one.history["memory"][-1] > 0


@pytest.mark.parametrize(("library", "variant"), [("jax", "residual"), ("mlx", "mHC")])
def test_the_same_seed_gives_the_same_numbers_and_another_one_others(
    library: str, variant: str, tmp_path: Any
) -> None:
    first, again, other = (
        trained(library, variant, tmp_path, seed=seed, depth=2) for seed in (1, 1, 2)
    )
    for name in ("loss", "norm", "gain_backward"):
        np.testing.assert_array_equal(first.history[name], again.history[name])
    for name, array in first.parameters.items():
        np.testing.assert_array_equal(array, again.parameters[name])
    assert not np.array_equal(first.history["loss"], other.history["loss"])


def test_it_learns(tmp_path: Any) -> None:
    for variant in ("HC", "single-pass"):
        loss = trained("mlx", variant, tmp_path, steps=80, rate=0.02, depth=2).history["loss"]
        assert loss[-5:].mean() < loss[:5].mean() / 2
        assert loss[-5:].mean() < 2.2


def test_variants_share_the_transformer_and_the_text() -> None:
    first = {variant: _model.initial(settings(), variant) for variant in VARIANTS}
    for name, array in first["residual"].items():
        for variant in VARIANTS:
            np.testing.assert_array_equal(array, first[variant][name])


def test_the_loss_at_the_start_hardly_depends_on_the_variant() -> None:
    losses = []
    for variant in VARIANTS:
        made, parameters = model("mlx", variant)
        tokens = made.xp.asarray(_data.batch(TEXT, 0, 0, 2, 8))
        losses.append(float(made.loss(parameters, tokens)))
    assert max(losses) - min(losses) < 0.3


# ---- the step -----------------------------------------------------------------------------------


def test_adamw_and_the_norm() -> None:
    """Compare two steps with those made by hand, from gradients 30 and 0.3 times the parameters."""
    p = {"mlp.in": np.array([[1.0, -2.0]]), "norm": np.array([0.5])}
    zeros = {name: np.zeros_like(array) for name, array in p.items()}
    tokens: Any = None
    moments, at = (zeros, zeros), [_adam.rates(step, 100, 0.1) for step in (20, 21)]
    grown = iter((30.0, 0.3))

    def gradients_of(parameters: Any, tokens: Any) -> Any:
        grow = next(grown)
        return np.float64(7), {name: grow * array for name, array in parameters.items()}

    step = _adam.make_step(np, gradients_of)
    want = {name: array.copy() for name, array in p.items()}
    m, v = ({name: 0.0 * array for name, array in p.items()} for _ in range(2))
    for grow, given in zip((30.0, 0.3), at, strict=True):
        norm = grow * math.sqrt(sum((array**2).sum() for array in want.values()))
        stepped = step(p, *moments, tokens, given)
        assert stepped.loss == 7
        assert float(stepped.norm) == pytest.approx(norm)
        for name in want:
            g = grow * want[name] * min(1, 1 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            change = m[name] * given[1] / (np.sqrt(v[name] * given[2]) + 1e-8)
            decay = 0.1 * want[name] if name == "mlp.in" else 0
            want[name] = want[name] - given[0] * (change + decay)
            np.testing.assert_allclose(stepped.parameters[name], want[name], rtol=1e-6)
        p, moments = stepped.parameters, (stepped.first, stepped.second)


def test_rates_rise_and_fall() -> None:
    rates = [float(_adam.rates(step, 100, 0.5)[0]) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 * k for k in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05, rel=0.01)
    assert _adam.rates(3, 100, 1)[1:] == pytest.approx([1 / (1 - 0.9**4), 1 / (1 - 0.95**4)])


def test_windows_depend_on_seed_and_step_alone_and_reach_the_whole_text() -> None:
    text = bytes(range(40))
    first = _data.batch(text, 3, 7, 4, 8)
    np.testing.assert_array_equal(first, _data.batch(text, 3, 7, 4, 8))
    assert not np.array_equal(first, _data.batch(text, 3, 8, 4, 8))
    assert not np.array_equal(first, _data.batch(text, 4, 7, 4, 8))
    assert first.shape == (4, 9)
    assert (np.diff(first, axis=1) == 1).all()
    many = _data.batch(text, 0, 0, 2000, 8)
    assert set(many[:, 0].tolist()) == set(range(32))
    assert many.max() == 39


def test_the_standard_library_is_real_text_and_always_the_same() -> None:
    text = _data.read(None, 64)
    assert len(text) > 1_000_000
    assert b"def " in text
    assert _data.digest(text) == _data.digest(_data.read(None, 64))


def test_history_is_whole(tmp_path: Any) -> None:
    one = trained("mlx", "HC", tmp_path, steps=45)
    assert {len(one.history[name]) for name in ("loss", "norm", "seconds")} == {45}
    looked = one.history["looked"].tolist()
    assert looked == list(range(0, 45, 2))
    assert len(one.history["gain_forward"]) == len(looked)
    assert min(one.history["seconds"]) > 0
    stored = _checkpoint.load(
        _checkpoint.path(tmp_path, "HC"), settings("mlx-compiled", steps=45), "HC"
    )
    assert stored.step == 45
    np.testing.assert_array_equal(stored.history["loss"], one.history["loss"])
