"""GatedConnection and GatedHead: the start, layers that are not plain, dtypes and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn, utils

import mhc_core as mhc
from mhc_core.mlx import GatedConnection, GatedHead

DIMS, N, RANK = 16, 4, 32


def trained(cls: type[Any]) -> Any:
    """Return a module far from its start."""
    mx.random.seed(3)
    module = cls(DIMS, N, RANK, 1e-3)
    moved = [(name, a + mx.random.normal(a.shape) / 4) for name, a in flat(module.parameters())]
    return module.update(utils.tree_unflatten(moved))


def flat(tree: Any) -> list[tuple[str, mx.array]]:
    return list(utils.tree_flatten(tree))


def streams(dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((2, 3, N, DIMS), key=mx.random.key(5)).astype(dtype)


def value(module: Any, x: mx.array) -> mx.array:
    out = module(x) if isinstance(module, GatedHead) else module(x, mx.tanh)
    return mx.square(out.astype(mx.float32)).sum()


class Adapted(nn.Linear):
    """A projection with an adapter that has not been trained yet."""


@pytest.mark.parametrize("cls", [GatedConnection, GatedHead])
def test_layers_that_are_not_plain_compute_the_gates_themselves(cls: type[Any]) -> None:
    plain, adapted, x = trained(cls), trained(cls), streams()
    adapted.input_mix_weight_down.__class__ = Adapted
    wanted, expected = nn.value_and_grad(plain, lambda x: value(plain, x))(x)
    got, gradient = nn.value_and_grad(adapted, lambda x: value(adapted, x))(x)
    assert abs(got - wanted).item() < 1e-4 * wanted.item()
    for (name, one), (other, want) in zip(flat(gradient), flat(expected), strict=True):
        assert name == other
        assert mx.abs(one - want).max() <= 1e-4 * mx.abs(want).max(), name
    assert len(flat(gradient)) == (4 if cls is GatedConnection else 3)


@pytest.mark.parametrize("cls", [GatedConnection, GatedHead])
def test_quantised_gates(cls: type[Any]) -> None:
    plain, quantised = trained(cls), trained(cls)
    nn.quantize(quantised, group_size=32, bits=8)
    for name, layer in quantised.children().items():
        if isinstance(layer, nn.QuantizedLinear):
            rest = layer.scales, layer.biases, layer.group_size, layer.bits
            plain[name].weight = mx.dequantize(layer.weight, *rest)
    assert type(quantised.input_mix_weight_up) is nn.QuantizedLinear
    for dtype, near in ((mx.float32, 1e-4), (mx.bfloat16, 3e-2)):
        x = streams(dtype)
        got, want = (m(x) if cls is GatedHead else m.pre(x)[0] for m in (quantised, plain))
        assert got.dtype == dtype
        apart = mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max()
        assert apart < near * mx.abs(want).max()


class Lora(nn.Module):
    """A low-rank adapter beside a layer that may be quantised."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = mx.random.normal((inputs, 2), key=mx.random.key(inputs)) / 4
        self.b = mx.random.normal((2, outputs), key=mx.random.key(outputs)) / 4

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + x @ self.a @ self.b


@pytest.mark.parametrize("cls", [GatedConnection, GatedHead])
def test_adapters_on_quantised_gates_are_trained(cls: type[Any]) -> None:
    """Check the gradients of all that is trainable against a difference, and nothing else has one.

    The quantised matrices and their scales are frozen; the streams get a gradient through them.
    """
    module, x = trained(cls), streams()
    shapes = {name: module[name].weight.shape for name in NAMES if name in module}
    nn.quantize(module, group_size=32, bits=4)
    for name in NAMES[1:]:
        if name in shapes:
            outputs, inputs = shapes[name]
            module[name] = Lora(module[name], inputs, outputs)
    gradient = nn.value_and_grad(module, lambda x: value(module, x))(x)[1]
    found = dict(flat(gradient))
    assert set(found) == {"hc_norm.weight"} | {
        f"{name}.{part}" for name in shapes if name != "hc_norm" for part in "ab"
    }
    assert all(mx.abs(a).max() > 0 for a in found.values())
    by_x = mx.grad(lambda x: value(module, x))(x)
    norm = sum(mx.square(a).sum() for a in (by_x, *found.values())).item() ** 0.5
    at, values = dict(flat(module.trainable_parameters())), list[float]()
    for step in (1e-2, -1e-2):
        moved = [(name, a + step / norm * found[name]) for name, a in at.items()]
        module.update(utils.tree_unflatten(moved))
        values.append(value(module, x + step / norm * by_x).item())
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(norm, rel=1e-3)


def test_the_start_is_that_of_the_family() -> None:
    connection = GatedConnection(64, 4, 8)
    x = mx.broadcast_to(mx.random.normal((5, 1, 64)), (5, 4, 64))
    h, h_post, h_res = connection.pre(x)
    assert h_res is None
    assert mx.abs(h - mx.fast.rms_norm(x[:, 0], None, 1e-6) / 2).max() < 0.1
    assert mx.abs(h_post - 1).max() < 0.5
    assert h_post.dtype == mx.float32
    assert abs(connection.input_mix_weight_up.weight.std().item() - 0.02) < 0.005
    y = mx.ones((5, 64))
    assert mx.allclose(connection.combine(x, y, h_post), x + h_post[..., None] * y[:, None])


def test_a_cast_of_the_model_casts_the_gates() -> None:
    connection = GatedConnection(DIMS, N, RANK)
    connection.set_dtype(mx.bfloat16)
    x = streams(mx.bfloat16)
    assert {a.dtype for _, a in flat(connection.parameters())} == {mx.bfloat16}
    weights = [a for name in NAMES for a in connection[name].parameters().values()]
    want = mhc.gated_pre(x, *weights, 1e-6)
    for got, wanted in zip(connection.pre(x), want, strict=False):
        assert mx.array_equal(got, wanted)


NAMES = "hc_norm", "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GatedConnection(0), "GatedConnection: dims is 0; needs an integer of at least 1"),
        (lambda: GatedConnection(8, 2.0), "GatedConnection: n is 2.0"),
        (lambda: GatedHead(8, 2, 0), "GatedHead: rank is 0"),
        (lambda: GatedHead(8, 2, 1, -1.0), "GatedHead: eps is -1.0"),
    ],
)
def test_wrong_sizes_are_named(make: Callable[[], Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        make()
