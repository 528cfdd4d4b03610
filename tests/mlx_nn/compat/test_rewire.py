"""MHCRewire: a connection around any module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from static_modules import gradients_match, leaves, off, recorder

import mhc_core as mhc
from mhc_core.mlx import MHCLayer, MHCRewire

DIMS = 64


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


class Block(nn.Module):
    """A transformer's block, whose attention takes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(DIMS)
        self.attention = nn.MultiHeadAttention(DIMS, 4)
        self.mlp = nn.Sequential(nn.Linear(DIMS, 2 * DIMS), nn.GELU(), nn.Linear(2 * DIMS, DIMS))

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        h = self.norm(x)
        return self.mlp(x + self.attention(h, h, h, mask))


def quantized(bits: int) -> nn.QuantizedLinear:
    return nn.QuantizedLinear.from_linear(nn.Linear(DIMS, DIMS), group_size=32, bits=bits)


INNER: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(DIMS, DIMS), (5, DIMS)),
    "without a bias": (lambda: nn.Linear(DIMS, DIMS, bias=False), (5, DIMS)),
    "quantized to 4 bits": (lambda: quantized(4), (5, DIMS)),
    "quantized to 8 bits": (lambda: quantized(8), (2, 3, DIMS)),
    "convolution": (lambda: nn.Conv2d(DIMS, DIMS, 3, padding=1), (2, 5, 6, DIMS)),
    "block": (Block, (2, 7, DIMS)),
    "one vector": (lambda: nn.Linear(DIMS, DIMS), (DIMS,)),
    "five axes": (lambda: nn.Linear(DIMS, DIMS), (2, 1, 3, 2, DIMS)),
}
EVERY = pytest.mark.parametrize("kind", INNER)


def wrapped(kind: str, n: int = 4, **options: Any) -> tuple[MHCRewire, mx.array]:
    make, shape = INNER[kind]
    mx.random.seed(1)
    return MHCRewire(make(), DIMS, n, **options), mx.random.normal(shape)


def scatter(module: MHCRewire) -> None:
    """Set the connection's parameters to random values."""
    raw = {name: mx.random.normal(module.mhc[name].shape) for name in MHCLayer.raw}
    module.mhc.update(raw)


def formula(module: MHCRewire, x: mx.array) -> mx.array:
    """Return the connection's formula, written out."""
    raw = (module.mhc[name] for name in MHCLayer.raw)
    h_pre, h_post, h_res = mhc.static_mappings(*raw, module.mhc.sinkhorn_iters)
    slices = (*x.shape[:-1], module.n, module.dims // module.n)
    gated = h_pre[:, None] * x.reshape(slices)
    y = module.inner(gated.reshape(x.shape)).reshape(slices)
    return (h_post[:, None] * (y + h_res @ gated)).reshape(x.shape)


@EVERY
@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_wrapping_a_layer_starts_at_the_plain_residual(kind: str, n: int) -> None:
    module, x = wrapped(kind, n)
    assert off(module(x), module.inner(x) + x) < 1e-3


def test_the_start_of_mhc_mlx_is_there_by_its_name() -> None:
    module, x = wrapped("without a bias", init="mhc-mlx")
    for name in MHCLayer.raw:
        assert mx.array_equal(module.mhc[name], MHCLayer(4, DIMS // 4)[name])
    assert float(mx.linalg.norm(module(x)) / mx.linalg.norm(x)) < 1e-9


@pytest.mark.parametrize("init", ["residual", "mhc-mlx"])
def test_without_identity_init_it_starts_at_zeros(init: str) -> None:
    module, _ = wrapped("linear", init=init, identity_init=False)
    assert not any(mx.any(module.mhc[name]) for name in MHCLayer.raw)


def test_its_parameters_can_leave_the_start() -> None:
    """Check the start: were it nearer to 1, H_pre would have almost no gradient."""
    module, x = wrapped("linear")
    grads = nn.value_and_grad(module, lambda x: mx.sum(module(x) ** 2))(x)[1]["mhc"]
    for name in MHCLayer.raw:
        assert float(mx.abs(grads[name]).max()) > 1e-3, name


@EVERY
def test_the_formula(kind: str) -> None:
    module, x = wrapped(kind)
    scatter(module)
    assert off(module(x), formula(module, x)) < 1e-5


@EVERY
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_those_of_the_formula(kind: str, training: bool) -> None:
    module, x = wrapped(kind)
    scatter(module)
    module.inner.freeze()
    module.train(training)
    module(x)

    def gradients(function: Any) -> Any:
        loss = nn.value_and_grad(module, lambda x: mx.sum(mx.sin(function(x))))
        return loss(x)[1], mx.grad(lambda x: mx.sum(mx.sin(function(x))))(x)

    wanted = gradients(lambda x: formula(module, x))
    assert gradients_match(gradients(module), wanted, 3e-5)


def test_the_layers_own_weights_get_gradients() -> None:
    module, x = wrapped("block")
    grads = nn.value_and_grad(module, lambda x: mx.sum(module(x) ** 2))(x)[1]
    assert all(mx.any(g) for g in leaves(grads["inner"]).values())


def test_more_arguments_reach_the_layer() -> None:
    module, x = wrapped("block")
    mask = nn.MultiHeadAttention.create_additive_causal_mask(7)
    assert mx.array_equal(module(x, mask), module(x, mask=mask))
    assert off(module(x, mask), module.inner(x, mask) + x) < 1e-3
    assert off(module(x, mask), module(x)) > 1e-3


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_of_half_precision_stays_one(dtype: mx.Dtype) -> None:
    module, x = wrapped("linear")
    wanted = module(x)
    module.inner.set_dtype(dtype)
    seen: list[mx.Dtype] = []

    class Seeing(nn.Module):
        def __call__(self, x: mx.array, inner: Any = module.inner) -> mx.array:
            seen.append(x.dtype)
            return inner(x)

    module.inner = Seeing()
    found = module(x.astype(dtype))
    assert seen == [dtype]
    assert found.dtype == dtype
    assert off(found, wanted) < (2e-2 if dtype == mx.bfloat16 else 2e-3)


def test_a_layer_of_float32_in_a_model_of_half_precision_does_not_widen_it() -> None:
    module, x = wrapped("linear")
    assert module(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_it_runs_on_the_selected_backend(plugins: Any) -> None:
    asked = recorder(plugins)
    module, x = wrapped("linear")
    with mhc.use_backend("recorder"):
        module(x)
    assert asked == ["static_mappings", "pre_scale", "gated_combine"]
    asked.clear()
    module, x = wrapped("linear", use_metal=False)
    with mhc.use_backend("recorder"):
        module(x)
    assert asked == []


# ---- evaluation computes the mappings once ------------------------------------------------------


def other(module: MHCRewire) -> dict[str, Any]:
    return {"mhc": {"H_pre_raw": module.mhc["H_pre_raw"] - 10}}


def assigned(module: MHCRewire) -> None:
    module.mhc.H_pre_raw = module.mhc["H_pre_raw"] - 10


def written_into(module: MHCRewire) -> None:
    module.mhc.H_pre_raw[:] = -1


def added_in_place(module: MHCRewire) -> None:
    module.mhc.H_pre_raw += -10


def loaded(module: MHCRewire) -> None:
    weights = [(f"mhc.{k}", v) for k, v in leaves(other(module)["mhc"]).items()]
    module.load_weights(weights, strict=False)


def optimized(module: MHCRewire) -> None:
    optim.SGD(1.0).update(module, {"mhc": {"H_pre_raw": mx.full((4,), 10.0)}})


CHANGES: dict[str, Any] = {
    "update": lambda module: module.update(other(module)),
    "load_weights": loaded,
    "an optimizer": optimized,
    "assignment": assigned,
    "writing into it": written_into,
    "adding in place": added_in_place,
}


@pytest.mark.parametrize("change", CHANGES)
def test_in_evaluation_new_weights_are_noticed(change: str, plugins: Any) -> None:
    asked = recorder(plugins)
    module, x = wrapped("linear")
    module.eval()
    with mhc.use_backend("recorder"):
        before = [module(x), module(x), module(x)]
        assert asked.count("static_mappings") == 1
        CHANGES[change](module)
        assert off(module(x), before[0]) > 0.1
        assert asked.count("static_mappings") == 2
        assert off(module(x), formula(module, x)) < 1e-5


def test_in_evaluation_a_new_dtype_is_noticed() -> None:
    module, x = wrapped("linear")
    scatter(module)
    module.eval()
    before = module(x)
    module.set_dtype(mx.bfloat16)
    after = module(x)
    assert not mx.array_equal(after, before)
    assert mx.array_equal(after, module.train()(x))


def test_in_evaluation_another_number_of_iterations_is_noticed() -> None:
    module, x = wrapped("linear")
    scatter(module)
    module.eval()
    before = module(x)
    module.mhc.sinkhorn_iters = 1
    assert not mx.array_equal(module(x), before)


def test_what_evaluation_keeps_is_no_state() -> None:
    module, x = wrapped("linear")
    names = list(leaves(module.state))
    module.eval()
    module(x)
    assert list(leaves(module.state)) == names
    assert "_cache" not in mx.grad(lambda m: mx.sum(m(x)))(module)["mhc"]


def test_evaluation_inside_compile_and_after_it() -> None:
    module, x = wrapped("linear", sinkhorn_iters=3)
    scatter(module)
    wanted = module(x)
    module.eval()
    fixed, following = mx.compile(module), mx.compile(module, inputs=module.state)
    for _ in range(2):
        assert off(fixed(x), wanted) < 1e-6
        assert off(following(x), wanted) < 1e-6
        assert off(module(x), wanted) < 1e-6
    module.update(other(module))
    for _ in range(2):
        assert off(following(x), formula(module, x)) < 1e-5
        assert off(module(x), formula(module, x)) < 1e-5


# ---- models -------------------------------------------------------------------------------------


def test_saved_weights_come_back_under_the_names_of_mhc_mlx(tmp_path: Path) -> None:
    module, x = wrapped("linear")
    scatter(module)
    file = str(tmp_path / "weights.safetensors")
    module.save_weights(file)
    assert set(mx.load(file)) == {
        "inner.weight",
        "inner.bias",
        "mhc.H_pre_raw",
        "mhc.H_post_raw",
        "mhc.H_res_raw",
        "mhc.rms_weight",
    }
    again = MHCRewire(nn.Linear(DIMS, DIMS), DIMS, 4)
    assert mx.array_equal(again.load_weights(file)(x), module(x))


def test_it_can_be_quantized_later() -> None:
    module, x = wrapped("linear")
    scatter(module)
    module.eval()
    before = module(x)
    nn.quantize(module, group_size=32, bits=8)
    assert isinstance(module.inner, nn.QuantizedLinear)
    assert 0 < off(module(x), before) < 2e-2
    assert list(leaves(module.parameters()["mhc"])) == list(leaves(MHCLayer(4, 16).parameters()))


def test_over_a_quantized_layer_the_connection_alone_trains_inside_compile() -> None:
    module, x = wrapped("quantized to 4 bits", sinkhorn_iters=2)
    y = mx.random.normal(x.shape)
    module.inner.freeze()  # of a quantized layer the bias alone is trainable
    assert {name.split(".")[0] for name in leaves(module.trainable_parameters())} == {"mhc"}
    optimizer = optim.Adam(0.1)
    state = [module.state, optimizer.state]

    def step() -> mx.array:
        value, grads = nn.value_and_grad(module, lambda: mx.mean((module(x) - y) ** 2))()
        optimizer.update(module, grads)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [float(compiled()) for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]


SIMULATED = mhc.backends().get("mlx-metal-simulator")


@pytest.mark.skipif(
    SIMULATED is None or not SIMULATED.available,
    reason="plugins/mhc-metal-simulator, which runs Metal kernels here, is not installed",
)
def test_it_trains_on_the_kernels() -> None:
    module = MHCRewire(nn.Linear(12, 12), 12, 3)
    layer = MHCLayer(3, 4)
    both = nn.Sequential(module, lambda x: layer(x.reshape(-1, 3, 4)))
    both.layer = layer
    x = mx.random.normal((5, 12))
    for part in (module.mhc, layer):
        part.update({name: mx.random.normal(part[name].shape) for name in MHCLayer.raw})
    loss = nn.value_and_grad(both, lambda x: mx.sum(mx.sin(both(x))))
    value, wanted = loss(x)
    with mhc.use_backend("mlx-metal-simulator"):
        found, grads = loss(x)
        mx.eval(found, grads)
    assert off(found, value) < 1e-5
    assert gradients_match(grads, wanted, 2e-5)
    assert all(mx.any(wanted["layer"][name]) for name in MHCLayer.raw)


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DIMS, 7), "MHCRewire: dims is 64; needs a multiple of n=7"),
        ((0, 4), "MHCRewire: dims is 0"),
        ((DIMS, 0), "MHCRewire: n is 0"),
    ],
)
def test_bad_sizes_are_named(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHCRewire(nn.Linear(DIMS, DIMS), *arguments)


def test_an_unknown_start_is_named() -> None:
    with pytest.raises(ValueError, match="init is 'identity'; needs 'residual' or 'mhc-mlx'"):
        MHCRewire(nn.Linear(DIMS, DIMS), DIMS, init="identity")


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(TypeError, match="iterations"):
        MHCRewire(nn.Linear(DIMS, DIMS), DIMS, iterations=3)


def test_another_last_axis_is_named() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 32\); needs \[\.\.\., dims=64\]"):
        wrapped("linear")[0](mx.ones((2, 32)))


def test_a_layer_that_changes_the_shape_is_named() -> None:
    module = MHCRewire(nn.Linear(DIMS, 32), DIMS)
    with pytest.raises(ValueError, match=r"the inner Linear returned shape \(2, 32\); needs"):
        module(mx.ones((2, DIMS)))


def test_a_layer_that_returns_several_is_named() -> None:
    class Pair(nn.Module):
        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            return x, x

    with pytest.raises(TypeError, match="the inner Pair returned a tuple; needs one array"):
        MHCRewire(Pair(), DIMS)(mx.ones((2, DIMS)))
