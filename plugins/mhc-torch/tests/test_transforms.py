"""torch.compile, torch.func and torch.utils.checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from calls import (
    CALLS,
    KNOPP,
    PROJECTION,
    RES,
    STREAMS,
    VARIANT,
    C,
    Call,
    N,
    T,
    assert_close,
    gradients,
    loss,
    several,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import mhc_core as mhc
from mhc_core import diagnostics

every_op = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.op)


def traced(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """Compile without code generation; count the graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True), counter


# --- torch.compile ----------------------------------------------------------------------------


@every_op
def test_one_graph_forward_and_backward(call: Call) -> None:
    counters.clear()
    compiled, counter = traced(call.function)
    arrays = call.arrays()
    assert_close(compiled(*arrays), call.function(*arrays))
    assert_close(gradients(compiled, arrays), gradients(call.function, arrays))
    assert counter.frame_count == 1
    assert not counters["graph_break"]


@every_op
def test_a_public_op_compiled_by_itself(call: Call) -> None:
    compiled, counter = traced(getattr(mhc, call.op))
    arrays = call.arrays(grad=False)
    assert_close(compiled(*arrays, **call.static), call.function(*arrays))
    assert counter.frame_count == 1


@every_op
def test_nothing_breaks_among_other_code(call: Call) -> None:
    def function(*arrays: Tensor) -> Tensor:
        return loss(call.function)(*[2 * a for a in arrays])

    explained = torch._dynamo.explain(function)(*call.arrays())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


def test_gradients_inside_compiled_code() -> None:
    call = next(call for call in CALLS if call.op == "pre")
    argnums = tuple(range(len(call.shapes)))
    compiled, counter = traced(torch.func.grad(loss(call.function), argnums=argnums))
    arrays = call.arrays()
    assert_close(compiled(*arrays), gradients(call.function, arrays))
    assert counter.frame_count == 1


@every_op
def test_vjp_inside_compiled_code(call: Call) -> None:
    arrays = tuple(call.arrays(grad=False))
    cotangents = tuple(torch.randn_like(o) for o in several(call.function(*arrays)))

    def pulled(arrays: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]) -> Any:
        return mhc.vjp(call.op, arrays, cotangents, **call.static)

    compiled, counter = traced(pulled)
    assert_close(compiled(arrays, cotangents), pulled(arrays, cotangents))
    assert counter.frame_count == 1


def test_diagnostics_are_one_graph_and_a_penalty() -> None:
    def watched(h_res: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        forward, backward = diagnostics.gain(h_res=h_res)
        summary = diagnostics.summary([h_res[0], h_res[1]], x)
        return forward.mean(), backward.mean(), *summary.values()

    arrays = [torch.rand(2, T, N, N, requires_grad=True), torch.randn(T, N, C, requires_grad=True)]
    compiled, counter = traced(watched)
    assert_close(compiled(*arrays), watched(*arrays))
    assert_close(gradients(compiled, arrays), gradients(watched, arrays))
    assert counter.frame_count == 1


def test_tokens_may_vary_in_number() -> None:
    counters.clear()
    compiled, counter = traced(lambda *arrays: mhc.pre(*arrays, VARIANT))
    parameters = [torch.randn(shape, requires_grad=True) for shape in PROJECTION]
    for tokens in (3, 5, 8, 13, 21):
        x = torch.randn(tokens, N, C, requires_grad=True)
        assert_close(compiled(x, *parameters), mhc.pre(x, *parameters, VARIANT))
    assert counter.frame_count == 2  # one for 3 tokens, one for any number
    assert not counters["graph_break"]


def test_streams_may_vary_in_number() -> None:
    compiled, counter = traced(lambda logits: mhc.sinkhorn(logits))
    for n in (4, 3, 2, 5):
        logits = torch.randn(6, n, n)
        assert_close(compiled(logits), mhc.sinkhorn(logits))
    assert counter.frame_count == 4


def test_vjp_takes_the_op_itself_in_compiled_code() -> None:
    x = torch.randn(RES)
    compiled, _ = traced(lambda x: mhc.vjp(mhc.sinkhorn, (x,), x))
    assert_close(compiled(x), mhc.vjp("sinkhorn", (x,), x))


COLD = """
import os, torch, torch._dynamo, mhc_core as mhc
x = torch.zeros(2, 2)
for function, value in (
    (mhc.sinkhorn, 0.5),
    (lambda x: mhc.sinkhorn(x, backend="torch"), 0.5),
    (lambda x: mhc.vjp("sinkhorn", (x,), x)[0], 0.0),
):
    if child := os.fork():  # a process that has imported all, and called nothing
        assert os.waitpid(child, 0)[1] == 0
    else:
        f = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(f(x), x + value)
        os._exit(0)
"""


def test_the_first_call_of_a_process_may_be_compiled() -> None:
    subprocess.run([sys.executable, "-c", COLD], check=True)


def test_a_whole_model_is_one_graph() -> None:
    def model(x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        h, h_post, h_res = mhc.pre(x, *parameters, VARIANT)
        for _ in range(2):
            x, h, _, h_post, h_res = mhc.combine_pre(x, h + y, h_post, h_res, *parameters, VARIANT)
        return mhc.contract(x, how="mean")

    shapes = (STREAMS, (T, C), *PROJECTION)
    arrays = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    compiled, counter = traced(model)
    assert_close(gradients(compiled, arrays), gradients(model, arrays))
    assert counter.frame_count == 1


@pytest.mark.inductor
@pytest.mark.parametrize("op", ["combine", "rms_norm", "head", "pre", "sinkhorn_knopp"])
def test_generated_code(op: str) -> None:
    (call,) = (call for call in CALLS if call.op == op)
    arrays = call.arrays(torch.float32)
    compiled = torch.compile(call.function, fullgraph=True)
    assert_close(compiled(*arrays), call.function(*arrays), rtol=1e-5, atol=1e-6)
    want = gradients(call.function, arrays)
    assert_close(gradients(compiled, arrays), want, rtol=1e-4, atol=1e-5)


@pytest.mark.inductor
def test_generated_code_rounds_where_the_maths_rounds() -> None:
    # combine_pre's mappings read the streams as rounded to bfloat16; code that kept them wider
    # would be off by far more than float32's rounding
    shapes = ((64, N, C), (64, C), (64, N), (64, N, N), *PROJECTION)
    x, y, *others = (torch.randn(shape) for shape in shapes)
    arrays = (x.bfloat16(), y.bfloat16(), *others)
    one = mhc.Variant(norm_eps=1e-6, sinkhorn_iterations=1)
    compiled = torch.compile(lambda *a: mhc.combine_pre(*a, one), fullgraph=True)
    want = mhc.combine_pre(*arrays, one)
    assert_close(compiled(*arrays)[2:], want[2:], rtol=1e-5, atol=1e-6)


# --- torch.func -------------------------------------------------------------------------------


@every_op
def test_vmap_maps_every_array(call: Call) -> None:
    arrays = [torch.randn(4, *shape, dtype=torch.float64) for shape in call.shapes]
    one_by_one = [several(call.function(*each)) for each in zip(*arrays, strict=True)]
    want = tuple(torch.stack(column) for column in zip(*one_by_one, strict=True))
    assert_close(torch.vmap(call.function)(*arrays), want)


@pytest.mark.parametrize("call", [c for c in CALLS if len(c.shapes) > 1], ids=lambda call: call.op)
def test_vmap_of_grad_with_one_array_for_all(call: Call) -> None:
    *mapped, shared = call.arrays(grad=False)
    mapped = [torch.stack([a, -a, 2 * a], dim=-1) for a in mapped]
    argnums = tuple(range(len(call.shapes)))
    each = torch.func.grad(loss(call.function), argnums=argnums)
    got = torch.vmap(each, in_dims=(*[-1] * len(mapped), None))(*mapped, shared)
    one_by_one = [each(*[a[..., i] for a in mapped], shared) for i in range(3)]
    assert_close(got, tuple(torch.stack(column) for column in zip(*one_by_one, strict=True)))


def test_grad_of_a_mapped_op() -> None:
    x = torch.randn(4, N, N, dtype=torch.float64)
    for call in (KNOPP, next(call for call in CALLS if call.op == "sinkhorn")):
        mapped = torch.vmap(call.function)
        assert_close(torch.func.grad(loss(mapped))(x), torch.func.grad(loss(call.function))(x))


def test_second_derivatives_by_torch_func() -> None:
    call = next(call for call in CALLS if call.op == "head")
    x, *parameters = call.arrays(grad=False)

    def second(function: Callable[..., Any]) -> Any:
        inner = loss(lambda x: function(x, *parameters))
        return torch.func.jacrev(torch.func.jacrev(inner))(x)

    assert_close(second(call.function), second(call.neutral))


def test_forward_mode_is_refused_and_plain_autograd_has_it() -> None:
    call = next(call for call in CALLS if call.op == "sinkhorn")
    (x,) = call.arrays(grad=False)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(call.function, (x,), (x,))
    torch.func.jvp(call.neutral, (x,), (x,))


# --- torch.utils.checkpoint -------------------------------------------------------------------


@every_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(call: Call, use_reentrant: bool) -> None:
    runs: list[int] = []

    def counted(*arrays: Tensor) -> Any:
        runs.append(1)
        return call.function(*arrays)

    def kept_small(*arrays: Tensor) -> Any:
        return checkpoint(counted, *arrays, use_reentrant=use_reentrant)

    arrays = call.arrays()
    assert_close(gradients_by_backward(kept_small, arrays), gradients(call.function, arrays))
    assert len(runs) == 2


def gradients_by_backward(function: Callable[..., Any], arrays: Sequence[Tensor]) -> Any:
    """Differentiate by backward(), the only way through a reentrant checkpoint."""
    loss(function)(*arrays).backward()
    return tuple(a.grad for a in arrays)


# --- the loop that ends when the values say so ------------------------------------------------


def test_sinkhorn_knopp_stops_early_in_mapped_and_compiled_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mhc_core.math import sinkhorn_knopp

    steps: list[int] = []
    step = sinkhorn_knopp._step

    def counting(*arguments: Any) -> Any:
        steps.append(1)
        return step(*arguments)

    monkeypatch.setattr(sinkhorn_knopp, "_step", counting)
    x = torch.randn(4, N, N) / 10
    want = mhc.sinkhorn_knopp(x)
    needed = len(steps)
    assert needed < 20  # of 100 that it may take
    compiled, _ = traced(lambda x: mhc.sinkhorn_knopp(x))
    for function in (torch.vmap(lambda x: mhc.sinkhorn_knopp(x)), compiled):
        steps.clear()
        assert torch.equal(function(x), want)
        assert len(steps) == needed
