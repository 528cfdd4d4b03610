"""MHCLayer and residual_add_agg, as users of mhc-mlx know them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from static_modules import MLX, gradients_match, leaves, off, recorder

import mhc_core as mhc
from mhc_backends.mlx_compiled import ops
from mhc_core.cli import app
from mhc_core.mlx import MHCLayer, diagnostics, residual_add_agg

SHAPES = {"H_pre_raw": (4,), "H_post_raw": (4,), "H_res_raw": (4, 4), "rms_weight": (8,)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


def a_layer(seed: int = 0, **options: Any) -> MHCLayer:
    """Return a layer with random parameters."""
    layer = MHCLayer(n=4, C=8, **options)
    mx.random.seed(seed)
    layer.update({name: mx.random.normal(shape) for name, shape in SHAPES.items()})
    return layer


def formula(layer: MHCLayer, x: mx.array) -> mx.array:
    """Return the layer's formula, written out."""
    h_pre, h_post = mx.sigmoid(layer.H_pre_raw), 2 * mx.sigmoid(layer.H_post_raw)
    logits = layer.H_res_raw
    for _ in range(layer.sinkhorn_iters):
        logits = logits - mx.logsumexp(logits, axis=1, keepdims=True)
        logits = logits - mx.logsumexp(logits, axis=0, keepdims=True)
    h = mx.einsum("i,...ic->...c", h_pre, x)
    y = h * mx.rsqrt(mx.mean(h * h, axis=-1, keepdims=True) + layer.eps) * layer.rms_weight
    return mx.einsum("ij,...jc->...ic", mx.exp(logits), x) + h_post[:, None] * y[..., None, :]


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    layer, x = a_layer(sinkhorn_iters=2, eps=0.1), mx.random.normal((*leading, 4, 8))
    out = layer(x)
    assert out.shape == x.shape
    assert not x.size or off(out, formula(layer, x)) < 1e-6


def test_the_parameters_are_those_that_mhc_mlx_saves() -> None:
    parameters = leaves(MHCLayer(n=4, C=8).trainable_parameters())
    assert {name: array.shape for name, array in parameters.items()} == SHAPES
    assert {array.dtype for array in parameters.values()} == {mx.float32}


def test_it_starts_at_the_identity() -> None:
    x = mx.random.normal((3, 4, 8))
    assert off(MHCLayer(n=4, C=8)(x), x) < 3e-5


def test_without_identity_init_it_starts_at_zeros() -> None:
    parameters = leaves(MHCLayer(n=4, C=8, identity_init=False).parameters())
    assert not any(mx.any(parameters[name]) for name in list(SHAPES)[:3])
    assert mx.all(parameters["rms_weight"] == 1)


def test_mixing_matrix_is_doubly_stochastic() -> None:
    matrix = a_layer(sinkhorn_iters=60).mixing_matrix()
    assert matrix.shape == (4, 4)
    for axis in (0, 1):
        assert float(mx.abs(matrix.sum(axis) - 1).max()) < 1e-5


def test_mixing_matrix_stands_entries_far_beyond_exp() -> None:
    layer = MHCLayer(n=4, C=8)
    layer.H_res_raw = 1000 * mx.eye(4)
    assert mx.allclose(layer.mixing_matrix(), mx.eye(4))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_return_dtype(dtype: mx.Dtype) -> None:
    layer, x = a_layer(), mx.random.normal((3, 4, 8)).astype(dtype)
    exact = layer(x.astype(mx.float32))
    assert mx.array_equal(layer(x), exact)  # float32, as in mhc-mlx, with nothing rounded
    kept = layer(x, return_dtype=dtype)
    assert kept.dtype == dtype
    assert mx.array_equal(kept, exact.astype(dtype))  # rounded once
    assert layer(x.astype(mx.float32), return_dtype=dtype).dtype == dtype
    assert layer(x, return_dtype=mx.float32).dtype == mx.float32


def test_half_precision_streams_are_widened_only_where_float32_is_asked_for(plugins: Any) -> None:
    seen: list[mx.Dtype] = []

    def answer(x: mx.array, *arrays: Any, **static: Any) -> mx.array:
        seen.append(x.dtype)
        return ops.static_layer(x, *arrays, **static)

    plugins.backend("watching", {"static_layer": answer}, **MLX)
    layer, x = a_layer(), mx.ones((1, 4, 8), mx.bfloat16)
    with mhc.use_backend("watching"):
        layer(x, return_dtype=mx.bfloat16)
        layer(x)
    assert seen == [mx.bfloat16, mx.float32]


def test_it_runs_on_the_selected_backend(plugins: Any) -> None:
    asked = recorder(plugins)
    layer, x = a_layer(), mx.ones((1, 4, 8))
    with mhc.use_backend("recorder"):
        layer(x)
        layer.mixing_matrix()
        layer.post_combine(x, x)
        residual_add_agg(x, x, mx.ones((4,)))
    mappings = "static_mappings"
    assert asked == ["static_layer", mappings, mappings, "gated_combine", "residual_add_aggregate"]


def test_without_metal_it_keeps_to_mlx_compiled(plugins: Any) -> None:
    asked = recorder(plugins)
    layer, x = a_layer(use_metal=False), mx.ones((1, 4, 8))
    with mhc.use_backend("recorder"):
        out = layer(x)
        layer.mixing_matrix()
        layer.post_combine(x, x)
    assert asked == []
    assert off(out, formula(layer, x)) < 1e-6


def test_the_variable_leaves_metal_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = a_layer(), mx.random.normal((2, 4, 8))
    before = layer(x)
    assert layer._should_use_metal(2, 4, 8)
    monkeypatch.setenv("MHC_MLX_DISABLE_METAL", "1")
    assert not layer._should_use_metal(2, 4, 8)
    assert mhc.backends()["mlx-metal"].reason == "MHC_MLX_DISABLE_METAL=1 is set"
    assert off(layer(x), before) < 1e-6
    with pytest.raises(mhc.BackendUnavailableError, match="MHC_MLX_DISABLE_METAL=1"):
        mhc.static_layer(x, *layer.parameters().values(), backend="mlx-metal")


HINTS: dict[str, Any] = {
    "threads_per_group": None,
    "auto_dispatch": False,
    "compile_reference": True,
    "dispatch_policy": "latency",
    "hybrid_latency": True,
    "hybrid_min_C": 1,
    "latency_avoid_fused_n32_max_C": 1,
    "latency_avoid_fused_B1_min_n": 1,
    "throughput_allow_fused_n32_min_B": 1,
    "throughput_allow_fused_n32_min_C": 1,
    "throughput_allow_fused_n32_small_C": 0,
    "fused_backward": True,
    "mix_kernel": "2d",
}


def test_what_steers_their_kernels_is_kept_and_changes_nothing() -> None:
    x = mx.random.normal((3, 4, 8))
    steered = a_layer(**HINTS)
    assert {name: getattr(steered, name) for name in HINTS} == HINTS
    assert mx.array_equal(steered(x), a_layer()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "MHCLayer: n is 0; needs an integer of at least 1"),
        ({"C": -1}, "MHCLayer: C is -1; needs an integer"),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters is 0"),
        ({"eps": -1e-5}, "eps is -1e-05; needs a finite number of at least 0"),
        ({"dispatch_policy": "fast"}, "dispatch_policy is 'fast'; needs 'auto' or"),
        ({"mix_kernel": "3d"}, "mix_kernel is '3d'; needs 'auto' or"),
        ({"threads_per_group": 0}, "threads_per_group is 0"),
        ({"hybrid_min_C": 0}, "hybrid_min_C is 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHCLayer(**{"n": 4, "C": 8, **options})


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 4, 7), (8,)])
def test_streams_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x_expanded has shape .*; needs \[\.\.\., n=4, C=8\]"):
        a_layer()(mx.ones(shape))


def test_post_combine() -> None:
    layer = a_layer()
    x, y = mx.random.normal((2, 4, 8)), mx.random.normal((2, 4, 8))
    h_pre, h_post, h_res = layer.mappings()
    wanted = h_post[:, None] * (y + h_res @ (h_pre[:, None] * x))
    assert off(layer.post_combine(x, y), wanted) < 1e-6


def test_saved_weights_come_back(tmp_path: Path) -> None:
    layer, x = a_layer(), mx.random.normal((2, 4, 8))
    for file in ("weights.npz", "weights.safetensors"):
        layer.save_weights(str(tmp_path / file))
        again = MHCLayer(n=4, C=8).load_weights(str(tmp_path / file))
        assert mx.array_equal(again(x), layer(x))


def test_it_can_be_pickled_and_copied_even_after_a_trace() -> None:
    layer, x = a_layer(sinkhorn_iters=2).eval(), mx.random.normal((2, 4, 8))
    mx.eval(mx.compile(lambda: layer.mixing_matrix(), inputs=layer.state)())
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert mx.array_equal(again(x), layer(x))
        assert mx.array_equal(again.mixing_matrix(), layer.mixing_matrix())


def test_gradients_are_those_of_the_formula() -> None:
    layer, x = a_layer(), mx.random.normal((3, 4, 8))

    def loss(function: Any) -> Any:
        return nn.value_and_grad(layer, lambda x: mx.sum(mx.sin(function(x))))(x)[1]

    wanted = loss(lambda x: formula(layer, x))
    assert gradients_match(loss(layer), wanted)


def test_it_trains_inside_compile() -> None:
    # the compiler unrolls Sinkhorn, which takes g++ seconds
    layer, optimizer = a_layer(sinkhorn_iters=1), optim.SGD(1.0)
    x, y = mx.random.normal((16, 4, 8)), mx.random.normal((16, 4, 8))
    state = [layer.state, optimizer.state]

    def step() -> mx.array:
        value, grads = nn.value_and_grad(layer, lambda: mx.mean((layer(x) - y) ** 2))()
        optimizer.update(layer, grads)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [float(compiled()) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_frozen_parameters_stay() -> None:
    layer = a_layer().freeze()
    assert not leaves(layer.trainable_parameters())
    layer.unfreeze(keys=["rms_weight"])
    assert list(leaves(layer.trainable_parameters())) == ["rms_weight"]
    assert list(leaves(layer.unfreeze().trainable_parameters())) == list(leaves(layer.parameters()))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_parameters_of_half_precision_are_computed_with_in_float32(dtype: mx.Dtype) -> None:
    layer, x = a_layer(), mx.random.normal((2, 4, 8))
    layer.set_dtype(dtype)
    narrow = layer(x)
    layer.set_dtype(mx.float32)  # the same numbers
    assert mx.array_equal(narrow, layer(x))


def test_residual_add_agg() -> None:
    x, res, h_pre = mx.random.normal((3, 4, 8)), mx.random.normal((3, 4, 8)), mx.arange(4) / 4
    out, h = residual_add_agg(x, res, h_pre)
    assert off(out, x + res) == 0
    assert off(h, mx.einsum("i,bic->bc", h_pre, x + res)) < 1e-6
    out, h = residual_add_agg(x.astype(mx.bfloat16), res.astype(mx.bfloat16), h_pre)
    assert (out.dtype, h.dtype) == (mx.float32, mx.float32)


def test_diagnostics_is_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    diagnostics()
    assert capsys.readouterr().out == CliRunner().invoke(app, ["info"]).output
