"""mhc_torch.nn: the modules are those of mhc_core.mlx, and PyTorch's own tools take them."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mhc_core as mhc
from mhc_torch import _norms
from mhc_torch.nn import HyperConnectedBlock, HyperConnectedStack, HyperConnection, HyperHead

DIMS, COUNT = 6, 3
QUICK = replace(mhc.DEEPSEEK_V4, sinkhorn_iterations=2, norm_eps=1e-3, pre_eps=1e-2)
PAPER = replace(mhc.PAPER, sinkhorn_iterations=2)

orders = pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])


class Layer(nn.Module):
    """A layer with dropout that counts how often it runs."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(DIMS, DIMS)
        self.dropout = nn.Dropout(dropout)
        self.runs = 0

    def forward(self, h: torch.Tensor, scale: float = 1.0, cache: Any = None) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return scale * self.dropout(torch.tanh(self.linear(h)))


def made(
    single_pass: bool = False,
    variant: mhc.Variant = QUICK,
    recompute: Any = "auto",
    dropout: float = 0.0,
    count: int = COUNT,
) -> HyperConnectedStack:
    """Return the same stack for the same arguments, its parameters far from the start."""
    torch.manual_seed(3)
    blocks = [
        HyperConnectedBlock(Layer(dropout), DIMS, 4, variant, nn.RMSNorm(DIMS, eps=1e-5))
        for _ in range(count)
    ]
    head = None if single_pass else HyperHead(DIMS, 4, variant)
    stack = HyperConnectedStack(blocks, 4, single_pass, recompute, head)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return stack


def gradients(stack: nn.Module, h: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the output, and the gradients of one number by h and by every parameter."""
    h = h.detach().requires_grad_()
    stack.zero_grad()
    out = stack(h, **kwargs)
    (out.float() * torch.linspace(-1, 2, out.numel()).reshape(out.shape)).sum().backward()
    named = {name: p.grad for name, p in stack.named_parameters()}
    return {name: g.clone() for name, g in {"out": out.detach(), "h": h.grad, **named}.items()}


def same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert set(got) == set(want)
    for name, one in got.items():
        error = (one - want[name]).abs().max()
        assert error <= tolerance * want[name].abs().max(), (name, error)


# ---- the modules of MLX -------------------------------------------------------------------------


@orders
@pytest.mark.parametrize("variant", [PAPER, QUICK], ids=["paper", "deepseek"])
def test_outputs_and_gradients_are_those_of_mlx(single_pass: bool, variant: mhc.Variant) -> None:
    mx = pytest.importorskip("mlx.core", reason="compares with MLX")
    from mlx import nn as mnn
    from mlx import utils

    from mhc_core import mlx as theirs

    class MLXLayer(mnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = mnn.Linear(DIMS, DIMS)

        def __call__(self, h: Any) -> Any:
            return mx.tanh(self.linear(h))

    stack = made(single_pass, variant)
    blocks = [
        theirs.HyperConnectedBlock(MLXLayer(), DIMS, 4, variant, mnn.RMSNorm(DIMS))
        for _ in range(COUNT)
    ]
    head = None if single_pass else theirs.HyperHead(DIMS, 4, variant)
    other = theirs.HyperConnectedStack(blocks, 4, single_pass, "auto", head)
    other.load_weights([(k, mx.array(v.numpy())) for k, v in stack.state_dict().items()])
    h = torch.randn(2, 3, DIMS)
    got = gradients(stack, h)

    def loss(parameters: Any, h: Any) -> Any:
        other.update(parameters)
        out = other(h)
        weights = mx.array(np.linspace(-1, 2, out.size, dtype=np.float32))
        return (out * weights.reshape(out.shape)).sum(), out

    (_, out), (by_parameters, by_h) = mx.value_and_grad(loss, argnums=[0, 1])(
        other.trainable_parameters(), mx.array(h.numpy())
    )
    want = dict(utils.tree_flatten(by_parameters)) | {"h": by_h, "out": out}
    wanted = {name: torch.tensor(np.array(array)) for name, array in want.items()}
    first = {name for name in wanted if name.startswith("blocks.0.connection")}  # equal streams
    same(
        {name: got[name] for name in set(got) - first},
        {name: wanted[name] for name in set(wanted) - first},
        1e-4,
    )


def test_the_start_is_that_of_mlx() -> None:
    pytest.importorskip("mlx.core", reason="compares with MLX")
    from mhc_core import mlx as theirs

    for ours, other in ((HyperConnection, theirs.HyperConnection), (HyperHead, theirs.HyperHead)):
        for variant in (mhc.PAPER, mhc.DEEPSEEK_V4):
            module, expected = ours(64, 4, variant), other(64, 4, variant).parameters()
            assert set(module.state_dict()) == set(expected)
            for name, tensor in module.state_dict().items():
                array = np.array(expected[name])
                assert tensor.shape == array.shape
                if name in ("phi", "fn"):
                    assert tensor.std() == pytest.approx(array.std(), rel=0.2)
                else:
                    assert np.array_equal(tensor.numpy(), array)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="HyperConnection: dims is 0"):
        HyperConnection(0)
    with pytest.raises(TypeError, match=r"variant is 'paper'; needs a mhc_core\.Variant"):
        HyperHead(8, variant="paper")
    with pytest.raises(TypeError, match=r"layer is a builtin.*; needs a torch\.nn\.Module"):
        HyperConnectedBlock(torch.tanh, 8)
    block = HyperConnectedBlock(nn.Identity(), 8)
    with pytest.raises(ValueError, match=r"blocks\[0\] has n=4 and dims=8; needs n=2"):
        HyperConnectedStack([block], 2)
    with pytest.raises(ValueError, match="recompute is True"):
        HyperConnectedStack([block], recompute=True)
    with pytest.raises(ValueError, match="each has 2 entries"):
        HyperConnectedStack([block])(torch.ones(8), each=[{}, {}])
    with pytest.raises(ValueError, match="the single-pass order has no head"):
        HyperConnectedStack([block], single_pass=True, head=HyperHead(8))


# ---- the norm inside ----------------------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Do with the formulas what kernels do; return the norms that are called by themselves."""
    called: list[str] = []

    def recorded(self: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
        called.append(type(self).__name__)
        return forward(self, x)

    forward = nn.RMSNorm.forward
    monkeypatch.setattr(nn.RMSNorm, "forward", recorded)
    monkeypatch.setattr(_norms, "kernels_run", lambda _: True)
    return called


@orders
def test_the_norms_are_applied_inside(
    single_pass: bool, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack, h = made(single_pass, recompute=1), torch.randn(2, 3, DIMS)
    names = list(stack.state_dict())
    x, block = torch.randn(3, 4, DIMS), stack.blocks[1]
    with monkeypatch.context() as patch:
        patch.setattr(_norms, "kernels_run", lambda _: False)
        want, expected = gradients(stack, h), block(x)
    first = {name for name in want if name.startswith("blocks.0.connection")}  # equal streams
    kernels.clear()
    got = gradients(stack, h)
    assert len(kernels) == (2 if single_pass else 0)  # in the pass, and recomputed
    same({k: got[k] for k in set(got) - first}, {k: want[k] for k in set(want) - first}, 1e-5)
    kernels.clear()
    same({"": block(x)}, {"": expected}, 1e-5)
    assert not kernels
    assert list(stack.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_eps_that_is_not_given_is_the_norms_own(dtype: torch.dtype, kernels: list[str]) -> None:
    """Compare on streams so small that the eps decides; float64 has another, and no kernels."""
    block = HyperConnectedBlock(nn.Identity(), DIMS, norm=nn.RMSNorm(DIMS)).to(dtype)
    x = 2**-11 * torch.randn(2, 4, DIMS, dtype=dtype)
    h = block.connection.pre(x)[0]
    want, near = block.norm(h), torch.finfo(dtype).eps
    kernels.clear()
    got = block.connection.pre(x, block.norm)[0]
    assert kernels == (["RMSNorm"] if dtype == torch.float64 else [])
    assert (got - want).abs().max() <= 2 * near * want.abs().max()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # PyTorch's own
def test_norms_that_must_be_called_are(kernels: list[str]) -> None:
    """Check hooks, other classes, no weight, another dtype of the weight, and autocast."""

    class Other(nn.RMSNorm):
        pass

    x = torch.randn(2, 4, DIMS)
    hooked = nn.RMSNorm(DIMS)
    hooked.register_forward_hook(lambda *_: None)
    norms = Other(DIMS), nn.RMSNorm(DIMS, elementwise_affine=False), hooked
    for norm in (*norms, nn.RMSNorm((1, DIMS)).to(x.dtype), nn.RMSNorm(DIMS).double()):
        block = HyperConnectedBlock(nn.Identity(), DIMS, norm=norm)
        given = x[:, None] if norm.normalized_shape == (1, DIMS) else x
        want = norm(block.connection.pre(given)[0])
        kernels.clear()
        assert torch.equal(block.connection.pre(given, norm)[0], want)
        assert len(kernels) == 1, norm
    block = HyperConnectedBlock(nn.Identity(), DIMS, norm=nn.RMSNorm(DIMS)).bfloat16()
    kernels.clear()
    with torch.autocast("cpu", torch.bfloat16):
        block.connection.pre(x.bfloat16(), block.norm)
    assert len(kernels) == 1
    plain = HyperConnectedBlock(nn.Identity(), DIMS, norm=nn.RMSNorm(DIMS))
    seen: list[int] = []
    plain.connection.register_forward_hook(lambda *_: seen.append(1))
    plain(x)
    assert seen == [1]  # a hook on the connection, as of FSDP, sees the block's call


@pytest.mark.parametrize("recompute", [False, 1])
def test_hooks_of_blocks_and_connections_are_called_in_a_stack(recompute: Any) -> None:
    """Check hooks that look, and hooks that make the parameters, as pruning's."""
    stack, h, called = made(recompute=recompute), torch.randn(2, 3, DIMS), list[int]()
    want = gradients(stack, h)
    for module in (stack.blocks[1], stack.blocks[1].connection):
        handle = module.register_forward_hook(lambda *_: called.append(1))
        called.clear()
        same(gradients(stack, h), want, 1e-4)
        assert called  # again in a recomputation, unless it stops early
        handle.remove()
    connection = stack.blocks[1].connection
    prune.l1_unstructured(connection, "fn", 0.5)
    masked = made(recompute=recompute)
    with torch.no_grad():
        connection.fn_orig.mul_(2)
        masked.blocks[1].connection.fn.mul_(2 * connection.fn_mask)
    got, want = gradients(stack, h), gradients(masked, h)
    got["blocks.1.connection.fn"] = got.pop("blocks.1.connection.fn_orig")
    want["blocks.1.connection.fn"] *= connection.fn_mask
    same(got, want, 1e-4)


def test_the_single_pass_order_refuses_hooks_that_it_would_not_call() -> None:
    stack = made(single_pass=True)
    handle = stack.blocks[1].connection.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"blocks\[1\]\.connection has a hook or a forward"):
        stack(torch.randn(2, DIMS))
    handle.remove()
    stack(torch.randn(2, DIMS))


# ---- recomputation ------------------------------------------------------------------------------


@orders
def test_recomputation_changes_no_bit_also_with_dropout(single_pass: bool) -> None:
    h, results = torch.randn(2, DIMS), []
    for recompute in (1, False):
        stack = made(single_pass, recompute=recompute, dropout=0.5)
        torch.manual_seed(7)
        results.append(gradients(stack, h, scale=0.5))
        assert stack.blocks[0].layer.runs == (2 if recompute else 1)
    same(*results)


def test_nothing_is_recomputed_where_it_must_not() -> None:
    stack, h = made(recompute=1), torch.randn(2, DIMS)
    gradients(stack, h, cache=object())
    stack.eval()
    gradients(stack, h)
    stack.train()
    with torch.no_grad():
        stack(h)
    assert stack.blocks[0].layer.runs == 3


# ---- dtypes -------------------------------------------------------------------------------------


def test_the_parameters_stay_float32() -> None:
    stack = made()
    before = {name: p.clone() for name, p in stack.named_parameters()}
    for cast in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to("cpu", torch.bfloat16)):
        cast(stack)
        assert stack.blocks[0].layer.linear.weight.dtype in (torch.float16, torch.bfloat16)
        for name, parameter in stack.named_parameters():
            if "connection" in name or "head" in name:
                assert torch.equal(parameter, before[name])
    assert stack(torch.randn(2, DIMS, dtype=torch.bfloat16)).dtype == torch.bfloat16
    rounded = {name: tensor.bfloat16() for name, tensor in stack.state_dict().items()}
    for assign in (False, True):
        stack.load_state_dict(rounded, assign=assign)
        phi = stack.blocks[1].connection.fn
        assert phi.dtype == torch.float32
        assert torch.equal(phi, before["blocks.1.connection.fn"].bfloat16().float())
    double = HyperConnection(DIMS, 4, QUICK).double()
    assert double(torch.randn(2, 4, DIMS).double(), torch.tanh).dtype == torch.float64


def test_autocast_and_grad_scaler() -> None:
    stack, h = made(), torch.randn(8, DIMS)
    connection, x = stack.blocks[0].connection, torch.randn(8, 4, DIMS)
    want = connection.mappings(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(connection.mappings(x)[2], want[2])
        got = stack(h)
    assert got.dtype == torch.float32
    same({"out": got}, {"out": stack(h)}, 0.05)
    optimizer = torch.optim.SGD(stack.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(stack.state_dict())
    scaler.scale(stack(h).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024
    assert not torch.equal(before["head.fn"], stack.head.fn)


# ---- PyTorch's tools ----------------------------------------------------------------------------


def test_copies_and_files(tmp_path: Path) -> None:
    stack, h = made(), torch.randn(2, DIMS)
    want = gradients(stack, h)
    same(gradients(copy.deepcopy(stack), h), want)
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    same(gradients(torch.load(file, weights_only=False), h), want)
    other = made()
    with torch.device("meta"):
        empty = made()
    empty.to_empty(device="cpu")
    empty.head.reset_parameters()
    assert torch.equal(empty.head.base, HyperHead(DIMS, 4, QUICK).base)
    for target in (other, empty):
        target.load_state_dict(stack.state_dict())
        same(gradients(target, h), want)


def test_two_variants_compile_without_a_graph_break() -> None:
    """The second once failed: its constants became inputs of the graph."""
    h = torch.randn(2, DIMS)
    for variant in (QUICK, replace(QUICK, norm_eps=1e-1)):
        stack = made(single_pass=True, variant=variant, recompute=1, count=2)
        compiled = torch.compile(stack, fullgraph=True)
        if variant is QUICK:
            same({"out": compiled(h)}, {"out": stack(h)}, 1e-5)
    got = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, h).items()}
    same(got, gradients(stack, h), 1e-5)


def test_export() -> None:
    stack, h = made(count=2).eval(), torch.randn(2, DIMS)
    exported = torch.export.export(stack, (h,), dynamic_shapes=({0: torch.export.Dim("T")},))
    again = torch.randn(5, DIMS)
    same({"out": exported.module()(again)}, {"out": stack(again)}, 1e-6)
