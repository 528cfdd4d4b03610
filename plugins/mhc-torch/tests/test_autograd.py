"""Each op's node in autograd's graph, against plain autograd through the neutral maths."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from calls import (
    CALLS,
    FEWEST_CALLS,
    PROJECTION,
    STREAMS,
    VARIANT,
    C,
    Call,
    N,
    T,
    assert_close,
    gradients,
    several,
)
from torch import Tensor, nn

import mhc_core as mhc
from mhc_core.math import _xp

every_op = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.op)


@every_op
def test_gradients_equal_plain_autograd(call: Call) -> None:
    arrays = call.arrays()
    assert_close(call.function(*arrays), call.neutral(*arrays))
    want = gradients(call.neutral, arrays)
    assert_close(gradients(call.function, arrays), want, rtol=1e-10, atol=1e-12)


@every_op
def test_gradients_equal_finite_differences(call: Call) -> None:
    torch.autograd.gradcheck(call.function, call.arrays())


@pytest.mark.parametrize("call", FEWEST_CALLS, ids=lambda call: call.op)
def test_second_derivatives(call: Call) -> None:
    torch.autograd.gradgradcheck(call.function, call.arrays())


@every_op
def test_an_op_is_one_node(call: Call) -> None:
    arrays = call.arrays()
    for output in several(call.function(*arrays)):
        below = [node for node, _ in output.grad_fn.next_functions if node is not None]
        assert [node.variable.data_ptr() for node in below] == [a.data_ptr() for a in arrays]


@every_op
def test_only_some_inputs_require_a_gradient(call: Call) -> None:
    whole = gradients(call.function, arrays := call.arrays())
    for chosen in range(len(arrays)):
        some = [a.detach().requires_grad_(i == chosen) for i, a in enumerate(arrays)]
        results = several(call.function(*some))
        weights = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype) for r in results]
        parts = [(r * w.reshape(r.shape)).sum() for r, w in zip(results, weights, strict=True)]
        sum(parts).backward()
        assert [a.grad is not None for a in some] == [i == chosen for i in range(len(some))]
        assert_close(some[chosen].grad, whole[chosen])


@every_op
def test_no_graph_where_none_is_wanted(call: Call) -> None:
    with_graph = several(call.function(*call.arrays(grad=False)))
    assert not any(output.requires_grad for output in with_graph)
    with torch.no_grad():
        assert not any(output.requires_grad for output in several(call.function(*call.arrays())))
    with torch.inference_mode():
        assert all(output.is_inference() for output in several(call.function(*call.arrays())))


def test_unused_outputs() -> None:
    arrays = [torch.randn(shape, requires_grad=True) for shape in (STREAMS, *PROJECTION)]
    for index in range(3):
        got = torch.autograd.grad(mhc.pre(*arrays, VARIANT)[index].sum(), arrays)
        plain = [a.detach().requires_grad_() for a in arrays]
        outputs = Call("pre", (), {"variant": VARIANT}).neutral(*plain)
        assert_close(got, torch.autograd.grad(outputs[index].sum(), plain))


@pytest.mark.parametrize("op", ["head", "mappings", "pre", "combine_pre"])
def test_the_backward_reads_what_the_forward_saved(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = (call for call in CALLS if call.op == op)
    projections: list[int] = []
    project = _xp.project

    def counting(*arguments: Any) -> Any:
        projections.append(1)
        return project(*arguments)

    monkeypatch.setattr(_xp, "project", counting)
    gradients(call.function, arrays := call.arrays())
    assert len(projections) == 1
    # a differentiable backward computes them again, for derivatives through the primals
    outputs = several(call.function(*arrays))
    torch.autograd.grad(outputs[0].sum(), arrays[0], create_graph=True)
    assert len(projections) == 3


@every_op
def test_a_graph_dies_with_its_outputs(call: Call) -> None:
    gc.disable()  # so only the last reference frees a graph
    try:
        output = several(call.function(*call.arrays()))[0]
        node = weakref.ref(output.grad_fn)
        del output
        assert node() is None
    finally:
        gc.enable()


@every_op
def test_views_with_gaps_and_repeated_axes(call: Call) -> None:
    plain = call.arrays()
    gaps = [a.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in plain]
    turned = [a.detach().mT.contiguous().mT if a.ndim > 1 else a.detach() for a in plain]
    turned = [a.requires_grad_() for a in turned]
    for strange in (gaps, turned):
        assert_close(call.function(*strange), call.function(*plain))
        assert_close(gradients(call.function, strange), gradients(call.function, plain))


def test_expanded_tensors() -> None:
    one = [torch.randn(shape) for shape in ((1, N, C), (1, C), (1, N), (1, N, N))]
    expanded = [a.expand(T, *a.shape[1:]).requires_grad_() for a in one]
    copied = [a.detach().clone().requires_grad_() for a in expanded]
    assert_close(mhc.combine(*expanded), mhc.combine(*copied))
    assert_close(gradients(mhc.combine, expanded), gradients(mhc.combine, copied))


class _Labelled(Tensor):
    """A tensor subclass, which PyTorch's own operations keep."""


def test_parameters_and_subclasses() -> None:
    x = torch.randn(STREAMS)
    phi, scale, bias = (nn.Parameter(torch.randn(shape)) for shape in PROJECTION)
    want = mhc.pre(x, phi.detach(), scale.detach(), bias.detach(), VARIANT)
    outputs = mhc.pre(x, phi, scale, bias, VARIANT)
    assert_close(tuple(o.detach() for o in outputs), want)
    sum(output.sum() for output in outputs).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in (phi, scale, bias))
    labelled = mhc.pre(x.as_subclass(_Labelled), phi, scale, bias, VARIANT)
    assert_close(tuple(o.detach().as_subclass(Tensor) for o in labelled), want)


class _Sublayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi, self.scale, self.bias = (
            nn.Parameter(torch.randn(shape) / 4) for shape in PROJECTION
        )
        self.layer = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        h, h_post, h_res = mhc.pre(x, self.phi, self.scale, self.bias, VARIANT)
        return mhc.combine(x, self.layer(h), h_post, h_res)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_learns(dtype: torch.dtype) -> None:
    model = nn.Sequential(_Sublayer(), _Sublayer())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, target = torch.randn(8, N, C).to(dtype), torch.randn(8, N, C)
    losses: list[float] = []
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (model(x).float() - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_op
def test_outputs_may_be_written_in_place(call: Call) -> None:
    arrays = call.arrays()
    before = tuple(a.detach().clone() for a in arrays)
    outputs = several(call.function(*arrays))
    for output in outputs:
        output += 1
    if call.op.startswith("combine_pre"):  # its backward reads x', and autograd notices
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs[0].sum().backward()
    else:
        outputs[0].sum().backward()
    assert_close(tuple(a.detach() for a in arrays), before)
