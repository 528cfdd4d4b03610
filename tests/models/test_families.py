"""accelerate on mlx-vlm's GLM-5.3-Flash, HY-V4, Qwen4-Exp and Xing4.0, in one model of each.

The tests of :mod:`test_every_model` that are about ``accelerate`` itself are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

import mlx.core as mx
import mlx.nn as nn
import small
from mlx.utils import tree_flatten, tree_unflatten

import mhc_core as mhc
from mhc_core.mlx import accelerate, restore

Make = Callable[..., Any]
MAKE: dict[str, Make] = {
    "glm5_next": small.mlx_vlm_glm5_next,
    "hy_v4": small.mlx_vlm_hy_v4,
    "qwen4_exp": small.mlx_vlm_qwen4_exp,
    "xing4_0": small.mlx_vlm_xing4_0,
}
OTHER: dict[str, dict[str, Any]] = {  # constants that differ from each other and from the defaults
    "glm5_next": {"hc_mult": 2, "hc_sinkhorn_iters": 3, "hc_eps": 1e-2, "rms_norm_eps": 1e-1},
    "hy_v4": {"hc_mult": 2, "hc_magnitude": 1.5, "hc_eps": 1e-2, "rms_norm_eps": 1e-1},
    "qwen4_exp": {"hc_count": 3, "rms_norm_eps": 1e-1},
    "xing4_0": {
        "hc_mult": 2,
        "hc_sinkhorn_iters": 2,
        "hc_eps": 1e-2,
        "rms_norm_eps": 1e-1,
        "mhc_h_res_clamp_min": -0.5,
        "mhc_h_res_clamp_max": 0.7,
    },
}
NO_GRADIENT = ("glm5_next", "hy_v4", "qwen4_exp")  # as the library has them


@pytest.fixture(params=list(MAKE))
def name(request: pytest.FixtureRequest) -> str:
    """Return each family."""
    return request.param


def in_parts(model: Any, ids: mx.array) -> mx.array:
    """Return the logits of a prompt, of one token and of a short block, with the model's cache."""
    cache = model.language_model.make_cache()
    parts = (ids[:, :11], ids[:, 11:12], ids[:, 12:15])
    return mx.concatenate([small.logits(model, part, cache) for part in parts], axis=1)


def test_logits_and_64_greedy_tokens_are_those_of_the_model(name: str) -> None:
    plain, fast = MAKE[name](), MAKE[name]()
    before = small.classes(fast)
    report = accelerate(fast)
    assert {note.path for note in report.replaced} == {
        path for path, cls in small.classes(fast).items() if cls is not before[path]
    }
    ids = small.tokens(2, small.LONG)
    expected = small.logits(plain, ids)
    assert small.apart(small.logits(fast, ids), expected) < 1e-4
    assert small.apart(in_parts(fast, ids), in_parts(plain, ids)) < 1e-4
    assert expected.std().item() > 0.5  # else any model would do
    greedy = small.greedy(plain, ids)
    with mhc.no_grad():
        assert small.greedy(fast, ids) == greedy
    assert all(len(set(row)) > 10 for row in greedy)
    assert len(restore(fast).replaced) == len(report.replaced)
    assert small.classes(fast) == before
    assert small.equal(small.logits(fast, ids), expected)


def test_other_constants(name: str) -> None:
    plain, fast = MAKE[name](**OTHER[name]), MAKE[name](**OTHER[name])
    accelerate(fast)
    ids = small.tokens(2, small.LONG)
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-5


def quantized(model: Any) -> Any:
    """Quantise all that the library would, in place."""
    allowed = getattr(model.language_model, "quant_predicate", None) or (lambda *_: True)

    def chosen(path: str, module: Any) -> bool:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return bool(fits and allowed(path, module)) and "indexer" not in path

    nn.quantize(model.language_model, group_size=32, bits=8, class_predicate=chosen)
    return model


def test_quantised_models_and_models_quantised_later(name: str) -> None:
    ids = small.tokens(1, small.LONG)
    plain, before, after = quantized(MAKE[name]()), quantized(MAKE[name]()), MAKE[name]()
    accelerate(before)
    accelerate(after)
    quantized(after)
    assert any("Quantized" in cls.__name__ for cls in small.classes(before).values())
    expected = in_parts(plain, ids)
    assert small.apart(in_parts(before, ids), expected) < 1e-4
    assert small.equal(in_parts(before, ids), in_parts(after, ids))


CONNECTIONS = ("hc.", "hc_", "hyper_connection")
STEP = 5e-4  # the loss curves so much along the other gradients that 5e-3 is off by a fifth


def slope(model: Any, ids: mx.array, at: dict[str, mx.array], along: dict[str, mx.array]) -> float:
    """Return the derivative of the loss along a direction of length 1, by a difference."""
    values = list[float]()
    for sign in (1, -1):
        model.update(tree_unflatten([(k, at[k] + sign * STEP * along[k]) for k in along]))
        values.append(small.loss(model, ids).item())
    model.update(tree_unflatten([(k, at[k]) for k in along]))
    return (values[0] - values[1]) / (2 * STEP)


def test_gradients_are_the_slopes_of_the_loss(name: str) -> None:
    """Check along the hyper-connections' own gradients, and along all others.

    Everything is chosen, so that no choice turns over within a step. The library's own connections
    have the same gradients, once its indexers choose constants.
    """
    config: dict[str, Any] = {"index_topk": 64, "n_routed_experts": 2}
    if name == "qwen4_exp":
        config = {"num_experts": 2, "indexer_budget": 64}
    if name == "xing4_0":
        config.pop("index_topk")
    ids = small.tokens(2, small.LONG)
    if name in NO_GRADIENT:
        with pytest.raises(ValueError, match=r"VJP with respect to indices|Not implemented for"):
            small.gradients(MAKE[name](), ids)
    model, plain = MAKE[name](**config), MAKE[name](**config)
    accelerate(model, trainable=True)
    family: Any = import_module(f"mhc_backends.mlx_nn.models.mlx_vlm_{name}").FAMILY
    for _, module in plain.named_modules():
        if type(module) in family.trainable:
            module.__class__ = family.trainable[type(module)].cls
    gradient, theirs = (
        dict(tree_flatten(small.gradients(one.train(), ids)[1])) for one in (model, plain)
    )
    for path, expected in theirs.items():
        assert mx.abs(gradient[path] - expected).max() <= 1e-4 * mx.abs(expected).max(), path
    ours = {path for path in gradient if any(word in path for word in CONNECTIONS)}
    assert all(mx.abs(gradient[path]).max().item() > 0 for path in ours)
    at = dict(tree_flatten(model.trainable_parameters()))
    for paths in (ours, gradient.keys() - ours):
        norm = sum(mx.square(gradient[path]).sum() for path in paths).item() ** 0.5
        along = {path: gradient[path] / norm for path in paths}
        assert slope(model, ids, at, along) == pytest.approx(norm, rel=1e-2)


def test_hy_v4_keeps_h_post_of_its_library_and_says_so() -> None:
    """Compare with hc_eps so large that adding it to H_post, as transformers does, would show."""
    plain, fast = (small.mlx_vlm_hy_v4(hc_eps=0.1) for _ in range(2))
    report = accelerate(fast)
    ids = small.tokens(1, small.LONG)
    assert small.apart(small.logits(fast, ids), small.logits(plain, ids)) < 1e-4
    assert "without the hc_eps that transformers adds" in str(report)
    x = mx.random.normal((1, 3, 4, 64))
    connection = fast.layers[0].hc_attn_layer.hc_pre
    right = connection.projection
    _, added, _ = mhc.mappings(x, right.phi, right.scale, right.bias, mhc.HY_V4)
    assert small.apart(connection(x)[1], plain.layers[0].hc_attn_layer.hc_pre(x)[1]) < 1e-6
    assert not small.equal(connection(x)[1], added)


def test_attention_residuals_are_refused() -> None:
    library: Any = import_module("mlx_vlm.models.kimi_k3")
    model = library.Model.__new__(library.Model)
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match="attention residuals are not hyper-connections"):
        accelerate(model)
