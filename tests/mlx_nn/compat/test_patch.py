"""AutoPatcher: every Linear that can have a connection gets one, once, and is reported."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from static_modules import leaves, off, recorder

import mhc_core as mhc
from mhc_core.mlx import AutoPatcher, MHCRewire, PatchReport

DIMS, N = 32, 4
Pair = namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


def square(dims: int = DIMS) -> nn.Linear:
    return nn.Linear(dims, dims)


def patch(model: nn.Module, n: int = N, **options: Any) -> PatchReport:
    return AutoPatcher.patch(model, n, verbose=False, **options)


def names(report: PatchReport) -> list[str]:
    return [one.name for one in report.wrapped]


def reasons(report: PatchReport) -> dict[str, str]:
    return {one.name: one.reason for one in report.left}


class Attention(nn.Module):
    """A pretrained-like attention with four Linears of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = square(), square(), square(), square()

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.q(x) @ self.k(x).swapaxes(-1, -2)
        return self.o(mx.softmax(scores / DIMS, axis=-1) @ self.v(x))


class Model(nn.Module):
    """A small language model whose output head has the size of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIMS, DIMS)
        self.layers = [Attention(), Attention()]
        self.mlp = nn.Sequential(nn.Linear(DIMS, 2 * DIMS), nn.GELU(), nn.Linear(2 * DIMS, DIMS))
        self.lm_head = square()

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.mlp(x))


def test_what_is_wrapped_and_why_the_rest_is_not() -> None:
    report = patch(Model())
    wanted = [f"layers.{i}.{name}" for i in range(2) for name in "qkvo"]
    assert sorted(names(report)) == sorted(wanted)
    assert {(one.class_name, one.dims, one.reason) for one in report.wrapped} == {
        ("Linear", DIMS, "")
    }
    other = "only Linear and QuantizedLinear are wrapped"
    assert reasons(report) == {
        "embed": other,
        "mlp.layers.0": "it maps 32 dims to 64; a residual connection needs the same size",
        "mlp.layers.1": other,
        "mlp.layers.2": "it maps 64 dims to 32; a residual connection needs the same size",
        "lm_head": "its name is in skip, which by default has the names of output heads",
    }
    lines = str(report).splitlines()
    assert "layers.0.q (Linear): wrapped" in lines
    assert f"embed (Embedding): {other}" in lines
    assert len(lines) == 13


def test_each_layer_keeps_its_signal() -> None:
    model, x = Model(), mx.random.normal((2, 5, DIMS))
    before = {k: getattr(model.layers[0], k) for k in "qkvo"}
    patch(model)
    for name, layer in before.items():
        wrapper = getattr(model.layers[0], name)
        assert isinstance(wrapper, MHCRewire)
        assert wrapper.inner is layer
        assert off(wrapper(x), layer(x) + x) < 1e-3


def test_the_start_of_mhc_mlx_is_there_by_its_name() -> None:
    model, x = nn.Sequential(nn.Linear(DIMS, DIMS, bias=False)), mx.random.normal((2, DIMS))
    patch(model, init="mhc-mlx")
    assert float(mx.linalg.norm(model(x)) / mx.linalg.norm(x)) < 1e-9


def test_patching_twice_wraps_once() -> None:
    model = Model()
    patch(model)
    parameters = list(leaves(model.parameters()))
    report = patch(model, n=2)
    assert report.wrapped == []
    assert reasons(report)["layers.1.v"] == "it is already wrapped, with n=4"
    assert list(leaves(model.parameters())) == parameters


def test_a_module_that_is_held_twice_is_wrapped_once() -> None:
    model = nn.Module()
    model.one = model.other = square()
    model.third = [model.one]
    report = patch(model)
    assert names(report) == ["one"]
    assert model.one is model.other is model.third[0]
    assert isinstance(model.one, MHCRewire)
    assert isinstance(model.one.inner, nn.Linear)


def test_a_model_that_holds_itself_ends() -> None:
    model, one, other = nn.Module(), nn.Module(), nn.Module()
    model.one, one.whole, one.other, one.linear = one, model, other, square()
    other.one = one
    assert names(patch(model)) == ["one.linear"]


def test_every_container_is_looked_into() -> None:
    model = nn.Module()
    model.sequential = nn.Sequential(nn.Sequential(square()), nn.ReLU())
    model.list = [square(), [square()]]
    model.dict = {"a": square(), "b": {"c": [square()]}}
    model.tuple = (square(), 3, {"d": (square(),)}, nn.Sequential(square()))
    model.named = Pair(square(), "text")
    model.plain = {"numbers": [1, 2.5], "array": mx.ones((2,)), "none": (None,)}
    report = patch(model)
    places = {
        "sequential.layers.0.layers.0": model.sequential.layers[0].layers[0],
        "list.0": model.list[0],
        "list.1.0": model.list[1][0],
        "dict.a": model.dict["a"],
        "dict.b.c.0": model.dict["b"]["c"][0],
        "tuple.0": model.tuple[0],
        "tuple.2.d.0": model.tuple[2]["d"][0],
        "tuple.3.layers.0": model.tuple[3].layers[0],
        "named.0": model.named[0],
    }
    assert set(names(report)) == set(places)
    assert all(isinstance(module, MHCRewire) for module in places.values())
    assert isinstance(model.named, Pair)
    assert model.named.second == "text"
    assert model.tuple[1] == 3
    unseen = {one.name for one in report.wrapped if one.reason.startswith("in a tuple")}
    assert unseen == {"tuple.0", "tuple.2.d.0", "tuple.3.layers.0", "named.0"}
    seen = {
        name.rpartition(".inner.")[0] for name in leaves(model.parameters()) if ".inner." in name
    }
    assert seen == set(places) - unseen  # what MLX trains and saves, as the report says


def test_a_tuple_without_a_linear_stays_the_same_object() -> None:
    model = nn.Module()
    model.tuple = before = (nn.ReLU(), (1, 2))
    patch(model)
    assert model.tuple is before


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_quantized_layers(bits: int, group_size: int) -> None:
    model = nn.Sequential(square(64), nn.Linear(64, 128), nn.Linear(128, 64))
    nn.quantize(model, group_size=group_size, bits=bits)
    report = patch(model)
    assert names(report) == ["layers.0"]
    assert report.wrapped[0].class_name == "QuantizedLinear"
    assert report.wrapped[0].dims == 64
    assert reasons(report)["layers.2"].startswith("it maps 128 dims to 64")
    layer, x = model.layers[0], mx.random.normal((3, 64))
    assert off(layer(x), layer.inner(x) + x) < 1e-3


def test_quantized_in_floating_point() -> None:
    model = nn.Sequential(square(64))
    nn.quantize(model, mode="mxfp4")
    assert patch(model).wrapped[0].dims == 64


def test_a_size_that_n_does_not_divide() -> None:
    report = patch(nn.Sequential(square(), square(30)))
    assert names(report) == ["layers.0"]
    assert reasons(report) == {"layers.1": "its 30 dims are not a multiple of n=4"}


@pytest.mark.parametrize("name", ["lm_head", "output", "embed_out", "head", "classifier"])
def test_output_heads_are_never_wrapped_unasked(name: str) -> None:
    model, inside = nn.Module(), nn.Module()
    model.inside, inside.q = inside, square()
    setattr(model, name, square())
    setattr(inside, name, nn.Sequential(square()))
    assert names(patch(model)) == ["inside.q"]
    report = patch(model, skip=())
    assert sorted(names(report)) == sorted([name, f"inside.{name}.layers.0"])


def test_skip_takes_whole_paths_and_last_parts() -> None:
    report = patch(Model(), skip=("layers.0.q", "layers.1", "v", "lm_head"))
    assert names(report) == ["layers.0.k", "layers.0.o"]


def test_a_linear_alone_cannot_be_replaced() -> None:
    report = patch(square())
    assert report.wrapped == []
    assert reasons(report) == {"": "it is the model itself, which cannot be replaced in place"}


def test_it_prints_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(square(), nn.ReLU())
    AutoPatcher.patch(model, n_streams=N)
    assert capsys.readouterr().out.splitlines() == [
        "[AutoPatcher] Rewiring layers.0 (dims=32, streams=4)",
        "[AutoPatcher] Patched 1 layers.",
    ]
    AutoPatcher.patch(model, N, False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_streams": 0}, "AutoPatcher: n_streams is 0"),
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    model = Model()
    for each in (model, nn.Sequential(nn.ReLU())):  # with and without a Linear
        with pytest.raises(ValueError, match=message):
            AutoPatcher.patch(each, **{"n_streams": N, "verbose": False, **arguments})
    assert not any(isinstance(module, MHCRewire) for module in model.modules())


def test_no_model_is_named() -> None:
    with pytest.raises(TypeError, match=r"AutoPatcher: model is a dict; needs an nn\.Module"):
        AutoPatcher.patch({"linear": square()})  # type: ignore[arg-type]


def test_options_reach_every_layer() -> None:
    model = Model()
    patch(model, sinkhorn_iters=3, use_metal=False)
    wrappers = [m for m in model.modules() if isinstance(m, MHCRewire)]
    assert {(w.mhc.sinkhorn_iters, w.mhc.use_metal) for w in wrappers} == {(3, False)}


# ---- the model afterwards -----------------------------------------------------------------------


def test_it_stays_in_its_mode() -> None:
    model = Model().eval()
    model.layers[1].train()
    patch(model)
    assert not model.layers[0].q.training
    assert not model.layers[0].q.mhc.training
    assert model.layers[1].q.training
    assert model.layers[1].q.mhc.training


def test_of_a_frozen_model_the_connections_train() -> None:
    model, tokens = Model(), mx.array([[1, 2, 3, 4]])
    model.freeze()
    patch(model, sinkhorn_iters=2)
    trainable = leaves(model.trainable_parameters())
    assert len(trainable) == 8 * 4
    assert all(".mhc." in name for name in trainable)
    frozen = {k: v for k, v in leaves(model.parameters()).items() if ".mhc." not in k}
    optimizer = optim.Adam(0.1)
    state = [model.state, optimizer.state]

    def step() -> mx.array:
        def loss() -> mx.array:
            return mx.mean(nn.losses.cross_entropy(model(tokens), tokens))

        value, grads = nn.value_and_grad(model, loss)()
        optimizer.update(model, grads)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [float(compiled()) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.1
    after = leaves(model.parameters())
    assert all(mx.array_equal(after[name], array) for name, array in frozen.items())


def test_in_evaluation_its_mappings_are_computed_once(plugins: Any) -> None:
    asked = recorder(plugins)
    model, tokens = Model().eval(), mx.array([[1, 2, 3]])
    patch(model)
    with mhc.use_backend("recorder"):
        for _ in range(3):
            model(tokens)
    assert asked.count("static_mappings") == 8
    assert asked.count("gated_combine") == 24


def test_saved_weights_come_back_and_it_can_be_quantized(tmp_path: Path) -> None:
    model, tokens = Model(), mx.array([[1, 2, 3]])
    patch(model)
    file = str(tmp_path / "weights.safetensors")
    model.save_weights(file)
    again = Model()
    patch(again)
    assert mx.array_equal(again.load_weights(file)(tokens), model(tokens))
    again.eval()
    before = again(tokens)
    nn.quantize(again, group_size=32, bits=8)
    assert isinstance(again.layers[0].q.inner, nn.QuantizedLinear)
    assert 0 < off(again(tokens), before) < 5e-2
    again.save_weights(file)
    third = Model()
    patch(third)
    nn.quantize(third, group_size=32, bits=8)
    assert mx.array_equal(third.load_weights(file)(tokens), again(tokens))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_of_half_precision_stays_one(dtype: mx.Dtype) -> None:
    model, tokens = Model(), mx.array([[1, 2, 3]])
    patch(model)
    model.apply(lambda a: a.astype(dtype))
    assert model(tokens).dtype == dtype
