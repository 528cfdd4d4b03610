"""GatedConnection and GatedHead: those of MLX, with layers that are not plain, and compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mhc_torch import load_hyper_connections
from mhc_torch.nn import GatedConnection, GatedHead

DIMS, N, RANK = 6, 4, 3


class Adapted(nn.Linear):
    """A projection of another class, as with an adapter."""


def trained(cls: type[Any], eps: float = 1e-3) -> Any:
    """Return a module far from its start."""
    torch.manual_seed(2)
    module = cls(DIMS, N, RANK, eps)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) / 2
    return module


def step(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x) if isinstance(module, GatedHead) else module(x, torch.tanh)
    own = dict(module.named_parameters())
    gradients = torch.autograd.grad(out.float().pow(3).sum(), [x, *own.values()])
    return {"out": out, **dict(zip(["x", *own], gradients, strict=True))}


def same(got: dict[str, Any], want: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, one in got.items():
        expected = want[name].detach()
        assert (one - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("cls", [GatedConnection, GatedHead])
def test_layers_that_are_not_plain_compute_the_gates_themselves(cls: type[Any]) -> None:
    module, adapted, x = trained(cls), trained(cls), torch.randn(2, 3, N, DIMS)
    want = step(module, x)
    adapted.input_mix_weight_up.__class__ = Adapted
    same(step(adapted, x), want)
    same(step(module.double(), x.double()), step(adapted.double(), x.double()), 1e-10)
    layer = () if cls is GatedHead else (torch.tanh,)
    assert trained(cls).bfloat16()(x.bfloat16(), *layer).dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [GatedConnection, GatedHead])
def test_layers_with_hooks_are_called(cls: type[Any]) -> None:
    """Check what calibration and pruning do: hooks that look, and hooks that make the weight."""
    x, layer = torch.randn(2, 3, N, DIMS), () if cls is GatedHead else (torch.tanh,)
    module, want = trained(cls), trained(cls)(x, *layer)
    for path in [path for path, _ in module.named_children()]:
        called: list[str] = []
        handle = module.get_submodule(path).register_forward_hook(
            lambda *_, called=called, path=path: called.append(path)
        )
        same({"": module(x, *layer)}, {"": want})
        assert called == [path]
        handle.remove()
    prune.l1_unstructured(module.input_mix_weight_up, "weight", 0.5)
    with torch.no_grad():
        module.input_mix_weight_up.weight_orig.mul_(2)
    other = trained(cls)
    with torch.no_grad():
        other.input_mix_weight_up.weight.mul_(2 * module.input_mix_weight_up.weight_mask)
    same({"": module(x, *layer)}, {"": other(x, *layer)})


def test_two_constants_compile_without_a_graph_break() -> None:
    x = torch.randn(3, N, DIMS)
    compiled = torch.compile(lambda m, x: m(x), fullgraph=True, backend="eager")
    for head in (trained(GatedHead), trained(GatedHead, 1e-1)):
        assert torch.allclose(compiled(head, x), head(x), atol=1e-6)


@pytest.mark.parametrize("name", ["GatedConnection", "GatedHead"])
def test_they_are_those_of_mlx(name: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="compares with MLX")
    from mlx import utils

    from mhc_core import mlx as theirs

    cls, other = {"GatedConnection": GatedConnection, "GatedHead": GatedHead}[name], vars(theirs)
    start, expected = cls(32, N, 16), other[name](32, N, 16)
    found = dict(utils.tree_flatten(expected.parameters()))
    assert set(start.state_dict()) == set(found)
    for path, tensor in start.state_dict().items():
        assert tensor.shape == found[path].shape
        assert tensor.std() == pytest.approx(found[path].std().item(), rel=0.3)
    module, x = trained(cls), torch.randn(2, N, DIMS)
    twin = other[name](DIMS, N, RANK, 1e-3)
    arrays = {path: mx.array(a.numpy()) for path, a in module.state_dict().items()}
    twin.update(utils.tree_unflatten(list(arrays.items())))
    layer = ((), ()) if name == "GatedHead" else ((torch.tanh,), (mx.tanh,))
    got, want = module(x, *layer[0]), twin(mx.array(x.numpy()), *layer[1])
    same({"": got}, {"": torch.tensor(np.array(want))})


def test_start_and_device() -> None:
    module = GatedConnection(DIMS, N, RANK, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert not module.hc_norm.weight.any()
    assert 0.01 < module.input_mix_weight_up.weight.std() < 0.03
    with pytest.raises(ValueError, match="GatedHead: rank is 0; needs an integer of at least 1"):
        GatedHead(8, rank=0)


def test_gates_are_loaded_in_their_dtype_and_named_in_errors() -> None:
    start = "model.layers.0.{}_hyper_connection."
    weights = {
        start.format(part) + name: tensor.bfloat16()
        for part in ("attn", "mlp")
        for name, tensor in trained(GatedConnection).state_dict().items()
    }
    loaded = load_hyper_connections(weights)
    for part, module in zip(("attn", "mlp"), loaded.layers[0], strict=True):
        for name, tensor in module.state_dict().items():
            given = weights[start.format(part) + name]
            assert torch.equal(tensor, given)
            assert tensor.dtype == torch.bfloat16
            assert tensor.data_ptr() != given.data_ptr()
    assert loaded.head is None
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    model.layers[0].attn_hyper_connection = trained(GatedConnection)
    model.layers[0].mlp_hyper_connection = trained(GatedConnection)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = start.format("mlp") + "block_inject_weight.weight"
    for spoil, says in (
        ({last: torch.zeros(N, DIMS)}, f"{last} has shape"),
        ({f"{last}.more": torch.zeros(1)}, "named like hyper-connections"),
        ({last: torch.full((N, N * DIMS), torch.nan)}, f"{last} holds NaN"),
    ):
        with pytest.raises(ValueError, match=says):
            load_hyper_connections(weights | spoil, model)
    with pytest.raises(ValueError, match=r"block_inject_weight\.weight is missing"):
        load_hyper_connections({n: a for n, a in weights.items() if n != last}, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    load_hyper_connections(weights, model)
    assert torch.equal(
        model.layers[0].mlp_hyper_connection.hc_norm.weight.bfloat16(),
        weights[start.format("mlp") + "hc_norm.weight"],
    )


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_gates_that_mlx_quantised_are_dequantised(mode: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="quantises with MLX")
    dims, rank, weights, wanted = 16, 32, {}, {}
    for part in ("attn", "mlp"):
        for name, tensor in GatedConnection(dims, N, rank).state_dict().items():
            path = f"layers.0.{part}_hyper_connection.{name}"
            weights[path] = wanted[path] = tensor.bfloat16()
            if name == "hc_norm.weight":
                continue
            group = 16 if mode == "nvfp4" else 32
            parts = mx.quantize(mx.array(tensor.numpy()), group_size=group, mode=mode)
            whole = mx.dequantize(*parts, group_size=group, mode=mode).astype(mx.float32)
            wanted[path] = torch.tensor(np.array(whole))
            for own, array in zip(("weight", "scales", "biases"), parts, strict=False):
                weights[f"{path.rpartition('.')[0]}.{own}"] = torch.tensor(np.array(array))
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module()])
    for part in ("attn", "mlp"):
        setattr(model.layers[0], f"{part}_hyper_connection", GatedConnection(dims, N, rank))
    loaded = load_hyper_connections(weights, model)
    for part, module in zip(("attn", "mlp"), loaded.layers[0], strict=True):
        for name, tensor in module.state_dict().items():
            path = f"layers.0.{part}_hyper_connection.{name}"
            affine = mode == "affine" and "norm" not in name
            assert tensor.dtype == (torch.float32 if affine else torch.bfloat16)
            assert torch.allclose(tensor.float(), wanted[path].float(), rtol=1e-6, atol=1e-8)
            own = model.state_dict()[path]
            assert own.dtype == torch.float32  # the model's
            assert torch.equal(own, tensor.float())
    assert (
        weights["layers.0.attn_hyper_connection.block_inject_weight.weight"].dtype == torch.uint32
    )
