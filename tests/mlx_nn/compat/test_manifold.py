"""ManifoldHyperConnection and sinkhorn_knopp, as users of mlx-mhc know them."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from static_modules import gradients_match, leaves, off, recorder

import mhc_core as mhc
from mhc_core.mlx import ManifoldHyperConnection, sinkhorn_knopp

NAMES = ("h_res_raw", "h_pre_raw", "h_pre_bias", "h_post_raw", "h_post_bias")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    mx.random.seed(0)


def a_connection(dims: int = 12, expansion: int = 3, **options: Any) -> ManifoldHyperConnection:
    """Return a connection with random parameters."""
    module = ManifoldHyperConnection(dims, expansion, **options)
    mx.random.seed(3)
    module.update({name: mx.random.normal(module[name].shape) for name in NAMES})
    return module


def formula(module: ManifoldHyperConnection, x: mx.array, y: mx.array) -> mx.array:
    """Return the connection's formula, written out."""
    n = module.expansion
    gated = scaled(module, x).reshape(*x.shape[:-1], n, -1)
    h_post = 2 * mx.sigmoid(module["h_post_raw"] + module["h_post_bias"])
    logits = module["h_res_raw"]
    for _ in range(module.sinkhorn_iterations):
        logits = logits - mx.logsumexp(logits, axis=1, keepdims=True)
        logits = logits - mx.logsumexp(logits, axis=0, keepdims=True)
    out = h_post[:, None] * (y.reshape(gated.shape) + mx.exp(logits) @ gated)
    return out.reshape(x.shape)


def scaled(module: ManifoldHyperConnection, x: mx.array) -> mx.array:
    h_pre = mx.sigmoid(module["h_pre_raw"] + module["h_pre_bias"])
    return (h_pre[:, None] * x.reshape(*x.shape[:-1], module.expansion, -1)).reshape(x.shape)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (1, 1), (2, 1, 3), (0, 4)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    module = a_connection(sinkhorn_iterations=4)
    x, y = mx.random.normal((*leading, 12)), mx.random.normal((*leading, 12))
    assert module.pre_scale(x).shape == x.shape
    out = module.post_combine(x, y)
    assert out.shape == x.shape
    assert mx.array_equal(module(x, y), out)
    if x.size:
        assert off(module.pre_scale(x), scaled(module, x)) < 1e-6
        assert off(out, formula(module, x, y)) < 1e-6


def test_arguments_and_parameters_are_those_of_mlx_mhc() -> None:
    signature = inspect.signature(ManifoldHyperConnection)
    defaults = {name: p.default for name, p in list(signature.parameters.items())[:3]}
    empty = inspect.Parameter.empty
    assert defaults == {"dims": empty, "expansion": 2, "sinkhorn_iterations": 20}
    parameters = leaves(ManifoldHyperConnection(64, 4).trainable_parameters())
    shapes = {name: array.shape for name, array in parameters.items()}
    assert shapes == {"h_res_raw": (4, 4)} | dict.fromkeys(NAMES[1:], (4,))


def test_it_starts_as_in_mlx_mhc() -> None:
    mx.random.seed(5)
    module = ManifoldHyperConnection(64, 4)
    mx.random.seed(5)
    assert mx.array_equal(module.h_res_raw, mx.random.normal((4, 4)) / 2)
    assert not any(mx.any(module[name]) for name in NAMES[1:])


@pytest.mark.parametrize("expansion", [1, 2, 4, 16])
def test_by_name_it_starts_at_the_plain_residual(expansion: int) -> None:
    module = ManifoldHyperConnection(64, expansion, init="residual")
    layer, x = nn.Linear(64, 64), mx.random.normal((2, 5, 64))
    wanted = x + layer(x)
    assert off(module(x, layer(x)), wanted) < 1e-3
    assert off(module.post_combine(x, layer(module.pre_scale(x))), wanted) < 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_are_those_of_the_formula(training: bool) -> None:
    module, x, W = a_connection(), mx.random.normal((2, 5, 12)), mx.random.normal((12, 12))
    module.train(training)
    module.post_combine(x, module.pre_scale(x))

    def gradients(scale: Any, combine: Any) -> Any:
        def loss(x: mx.array, W: mx.array) -> mx.array:
            return mx.sum(mx.sin(combine(x, mx.tanh(scale(x) @ W))))

        return nn.value_and_grad(module, loss)(x, W)[1], mx.grad(loss, argnums=(0, 1))(x, W)

    wanted = gradients(lambda x: scaled(module, x), lambda x, y: formula(module, x, y))
    assert gradients_match(gradients(module.pre_scale, module.post_combine), wanted, 2e-5)


def test_it_trains_inside_compile() -> None:
    # the compiler unrolls Sinkhorn, which takes g++ seconds
    module, optimizer = a_connection(sinkhorn_iterations=1), optim.SGD(1.0)
    x, W = mx.random.normal((3, 4, 12)), mx.random.normal((12, 12))
    state = [module.state, optimizer.state]

    def loss() -> mx.array:
        y = mx.tanh(module.pre_scale(x) @ W)
        return mx.mean((module.post_combine(x, y) - 2 * x) ** 2)

    def step() -> mx.array:
        value, grads = nn.value_and_grad(module, loss)()
        optimizer.update(module, grads)
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)
    losses = [float(compiled()) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


def test_it_runs_on_the_selected_backend(plugins: Any) -> None:
    asked = recorder(plugins)
    module, x = a_connection(), mx.ones((1, 2, 12))
    with mhc.use_backend("recorder"):
        module.post_combine(x, module.pre_scale(x))
    assert asked == ["pre_scale", "sinkhorn_knopp", "gated_combine"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays(dtype: mx.Dtype) -> None:
    module, x = a_connection(), mx.random.normal((2, 5, 12))
    wanted = module(module.pre_scale(x), x)
    narrow = module.pre_scale(x.astype(dtype))
    assert narrow.dtype == dtype
    found = module(narrow, x.astype(dtype))
    assert found.dtype == dtype
    assert off(found, wanted) < (1e-2 if dtype == mx.bfloat16 else 1e-3)


# ---- evaluation computes the mappings once ------------------------------------------------------


def other(module: ManifoldHyperConnection) -> dict[str, mx.array]:
    return {name: module[name][::-1] + 1 for name in NAMES}


def assigned(module: ManifoldHyperConnection) -> None:
    for name, array in other(module).items():
        setattr(module, name, array)


def written_into(module: ManifoldHyperConnection) -> None:
    for name, array in other(module).items():
        getattr(module, name)[:] = array


def written_by_item(module: ManifoldHyperConnection) -> None:
    for name, array in other(module).items():
        module[name][:] = array


def written_by_parameters(module: ManifoldHyperConnection) -> None:
    held = nn.Sequential(module).parameters()["layers"][0]
    for name, array in other(module).items():
        held[name][:] = array


def loaded_again(module: ManifoldHyperConnection) -> None:
    """Load the same arrays with other content: only the loading itself can be noticed."""
    new = other(module)
    arrays = dict(dict.items(module))
    x = mx.ones((1, 12))
    module.post_combine(x, module.pre_scale(x))
    for name, array in new.items():
        arrays[name][:] = array
    module.load_weights([(name, arrays[name]) for name in new])


CHANGES: dict[str, Any] = {
    "update": lambda module: module.update(other(module)),
    "load_weights": lambda module: module.load_weights(list(other(module).items())),
    "an optimizer": lambda module: optim.SGD(1.0).update(module, other(module)),
    "set_dtype": lambda module: module.set_dtype(mx.bfloat16),
    "assignment": assigned,
    "writing into it": written_into,
    "writing into it, by item": written_by_item,
    "writing into it, by parameters": written_by_parameters,
    "loading the same arrays": loaded_again,
}


@pytest.mark.parametrize("change", CHANGES)
def test_in_evaluation_new_weights_are_noticed_by_both_stages(change: str) -> None:
    module, x, y = a_connection(), mx.random.normal((2, 5, 12)), mx.random.normal((2, 5, 12))
    module.eval()
    before = module.pre_scale(x), module.post_combine(x, y)
    CHANGES[change](module)
    after = module.pre_scale(x), module.post_combine(x, y)
    module.train()
    wanted = module.pre_scale(x), module.post_combine(x, y)
    for found, old, new in zip(after, before, wanted, strict=True):
        assert mx.array_equal(found, new)
        assert not mx.array_equal(found, old)


@pytest.mark.parametrize("name", NAMES)
def test_in_evaluation_each_parameter_is_noticed_alone(name: str) -> None:
    module, x = a_connection().eval(), mx.random.normal((2, 5, 12))
    before = module(x, x)
    module.update({name: module[name][::-1] + 1})
    assert not mx.array_equal(module(x, x), before)


def test_in_evaluation_everything_is_computed_once(
    plugins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recorder(plugins)
    gates: list[int] = []
    sigmoid = mx.sigmoid
    monkeypatch.setattr(mx, "sigmoid", lambda a: gates.append(1) or sigmoid(a))
    module, x = a_connection(), mx.ones((1, 2, 12))

    def run() -> tuple[int, int]:
        with mhc.use_backend("recorder"):
            module.post_combine(x, module.pre_scale(x))
        return asked.count("sinkhorn_knopp"), len(gates)

    assert [run(), run()] == [(1, 3), (2, 6)]
    module.eval()
    assert [run(), run(), run()] == [(3, 8)] * 3
    module.sinkhorn_iterations = 3
    assert run() == (4, 8)


def test_inside_a_model_it_follows_the_models_mode() -> None:
    """Check a connection in a model: MLX sets its mode without calling its train()."""
    model = nn.Sequential(lambda x: x)
    model.connection = module = a_connection()
    x = mx.random.normal((2, 5, 12))
    model.eval()
    before = module(x, x)
    model.train()
    module.h_res_raw = -module.h_res_raw
    trained = module(x, x)
    model.eval()
    assert mx.array_equal(module(x, x), trained)
    assert not mx.array_equal(trained, before)


def test_evaluation_inside_compile_and_after_it() -> None:
    module, x = a_connection(sinkhorn_iterations=3).eval(), mx.random.normal((2, 5, 12))
    fixed, following = mx.compile(module), mx.compile(module, inputs=module.state)
    for _ in range(2):
        for function in (fixed, following, module):
            assert off(function(x, x), formula(module, x, x)) < 1e-6
    module.update(other(module))
    for _ in range(2):
        for function in (following, module):
            assert off(function(x, x), formula(module, x, x)) < 1e-6


def test_what_evaluation_keeps_is_no_state() -> None:
    module, x = a_connection().eval(), mx.random.normal((2, 5, 12))
    module(x, x)
    assert set(leaves(module.state)) == set(NAMES)
    assert set(mx.grad(lambda m: mx.sum(m(x, x)))(module)) == set(NAMES)


# ---- models -------------------------------------------------------------------------------------


def test_saved_weights_come_back(tmp_path: Path) -> None:
    module, x = a_connection(), mx.random.normal((2, 5, 12))
    for file in ("weights.npz", "weights.safetensors"):
        module.save_weights(str(tmp_path / file))
        again = ManifoldHyperConnection(12, 3).load_weights(str(tmp_path / file))
        assert mx.array_equal(again(x, x), module(x, x))


def test_it_can_be_pickled_and_copied_even_after_a_trace() -> None:
    module, x = a_connection(sinkhorn_iterations=3).eval(), mx.random.normal((2, 5, 12))
    mx.eval(mx.compile(module, inputs=module.state)(x, x))
    for again in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert mx.array_equal(again(x, x), module(x, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 12, "expansion": 5}, "dims is 12; needs a multiple of expansion=5"),
        ({"dims": 0}, "ManifoldHyperConnection: dims is 0"),
        ({"dims": 12, "expansion": 0}, "expansion is 0"),
        ({"dims": 12, "sinkhorn_iterations": 0}, "sinkhorn_iterations is 0"),
        ({"dims": 12, "init": "zeros"}, "init is 'zeros'; needs 'mlx-mhc' or 'residual'"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManifoldHyperConnection(**options)


def test_another_last_axis_is_named() -> None:
    module, x = a_connection(), mx.ones((2, 5, 24))
    for call in (lambda: module.pre_scale(x), lambda: module(x, x)):
        with pytest.raises(ValueError, match=r"x has shape \(2, 5, 24\); needs \[\.\.\., dims=12"):
            call()


def test_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="gated_combine"):
        a_connection()(mx.ones((2, 5, 12)), mx.ones((2, 4, 12)))


# ---- sinkhorn_knopp -----------------------------------------------------------------------------


def test_its_arguments_are_those_of_mlx_mhc() -> None:
    parameters = list(inspect.signature(sinkhorn_knopp).parameters.items())[:4]
    assert [(name, p.default) for name, p in parameters[1:]] == [
        ("max_iterations", 100),
        ("epsilon", 1e-6),
        ("log_space", True),
    ]
    assert parameters[0][0] == "matrix"


@pytest.mark.parametrize("log_space", [True, False], ids=["log", "direct"])
def test_a_batch_is_projected_matrix_by_matrix(log_space: bool) -> None:
    matrices = mx.random.normal((2, 3, 4, 4))
    together = sinkhorn_knopp(matrices, log_space=log_space)
    for axis in (-1, -2):
        assert float(mx.abs(together.sum(axis) - 1).max()) < 1e-5
    for i in range(2):
        for j in range(3):
            alone = sinkhorn_knopp(matrices[i, j], log_space=log_space)
            assert off(together[i, j], alone) < 1e-6


@pytest.mark.parametrize("log_space", [True, False], ids=["log", "direct"])
def test_it_works_inside_compile(log_space: bool) -> None:
    def project(matrix: mx.array) -> mx.array:
        return sinkhorn_knopp(matrix, max_iterations=4, log_space=log_space)

    matrix = mx.random.normal((2, 4, 4))
    compiled = mx.compile(project)
    assert off(compiled(matrix), project(matrix)) < 1e-6
    assert off(compiled(matrix + mx.eye(4)), project(matrix + mx.eye(4))) < 1e-6


@pytest.mark.parametrize("log_space", [True, False], ids=["log", "direct"])
def test_it_stops_once_it_has_converged(log_space: bool) -> None:
    matrix = 3 * mx.random.normal((4, 4))
    loose = sinkhorn_knopp(matrix, epsilon=0.05, log_space=log_space)
    steps = [sinkhorn_knopp(matrix, k, 0.0, log_space) for k in range(1, 100)]
    errors = [max(float(mx.abs(s.sum(axis) - 1).max()) for axis in (0, 1)) for s in steps]
    first = next(k for k, error in enumerate(errors) if error < 0.05)
    assert 0 < first < 90
    assert off(loose, steps[first]) < 1e-6
    assert off(loose, steps[first + 1]) > 1e-5
