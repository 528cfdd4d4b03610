"""torch-cuda through the public API on a CPU: plans, arguments and aliases, without a GPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import (
    CALLS,
    PROJECTION,
    RES,
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
from on_cpu import DEVICE, NAME, SPEC, needs_gcc, prepare
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mhc_core as mhc
from mhc_core import math
from mhc_core.selection import registered
from mhc_torch.plans import kernels as kernels_module

pytestmark = needs_gcc
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

WIDE = Call("gated_combine", ((T, 40), (T, 40), (5,), (T, 5), (5, 5)))  # of many streams
SHARED = Call("combine", ((3, 2, N, C), (3, 2, C), (N,), (N, N)))  # one mapping for all tokens
GIVEN = Call(
    "combine_pre", ((T, N, C), (T, C), (T, N), RES, *PROJECTION, (N,)), {"variant": VARIANT}
)
UNMIXED = {"variant": replace(VARIANT, mixer="identity", post_eps=0.25)}
# whole slabs of channels: narrow streams get dx and dphi in one pass
SLAB = Call(
    "combine_pre",
    ((T, 4, 64), (T, 64), (T, 4), (T, 4, 4), (24, 256), (3,), (24,)),
    {"variant": VARIANT},
)
ALONE = ((2 * N, N * C), (2,), (2 * N,))
UNMIXING = [  # neither take an H_res nor make one
    Call("mappings", ((T, N, C), *ALONE), UNMIXED),
    Call("pre", ((T, N, C), *ALONE), UNMIXED),
    Call("combine", ((T, N, C), (T, C), (T, N)), absent=(3,)),
    Call("combine_pre", ((T, N, C), (T, C), (T, N), *ALONE), UNMIXED, absent=(3,)),
]
EVERY = [*(call for call in CALLS if call.op in SPEC.ops), WIDE, SHARED, GIVEN, *UNMIXING]
BY_OP = {call.op: call for call in CALLS}
every_op = pytest.mark.parametrize(
    "call",
    EVERY,
    ids=lambda call: f"{call.op}-{len(call.shapes[0])}" + "-unmixed" * (call in UNMIXING),
)


@pytest.fixture(autouse=True, scope="module")
def _backend() -> Iterator[None]:
    """Register the backend, with the functions of all calls in one program."""
    single = [(call, call.arrays(torch.float32)) for call in EVERY]
    narrow = [(call, _narrow(call)) for call in (BY_OP["pre"], SLAB)]
    prepare([*single, *narrow])
    with registered(SPEC):
        yield


def _narrow(call: Call) -> list[Tensor]:
    """Draw bfloat16 for everything, parameters too."""
    return call.arrays(torch.bfloat16)


def _kernels(call: Call, backend: str = NAME) -> Callable[..., Any]:
    names = list(math.load(call.op).OP.arrays)  # here: a compiler cannot follow an import

    def function(*arrays: Tensor) -> Any:
        named = dict(zip(names, call.placed(arrays), strict=False))
        return getattr(mhc, call.op)(**named, **call.static, backend=backend)

    return function


def _torch(call: Call) -> Callable[..., Any]:
    return _kernels(call, "torch")


@every_op
def test_outputs_and_gradients(call: Call) -> None:
    arrays, before = call.arrays(torch.float32), DEVICE.launched
    got, want = _kernels(call)(*arrays), _torch(call)(*arrays)
    assert_close(got, want, **CLOSE)
    assert_close(gradients(_kernels(call), arrays), gradients(_torch(call), arrays), **CLOSE)
    assert DEVICE.launched > before
    with torch.no_grad():
        plain = _kernels(call)(*arrays)
    assert all(torch.equal(a, b) for a, b in zip(several(plain), several(got), strict=True))
    every = got if isinstance(got, tuple) else (got,)
    cotangents = tuple(None if one is None else torch.randn_like(one) for one in every)
    detached = call.placed([one.detach() for one in arrays])
    assert_close(
        several(mhc.vjp(call.op, detached, cotangents, **call.static, backend=NAME)),
        several(mhc.vjp(call.op, detached, cotangents, **call.static, backend="torch")),
        **CLOSE,
    )


@pytest.mark.parametrize("op", ["combine", "pre", "residual_add_aggregate", "sinkhorn"])
def test_second_derivatives(op: str) -> None:
    call = BY_OP[op]

    def second(function: Callable[..., Any]) -> Any:
        arrays = call.arrays(torch.float32)
        arrays = [
            torch.linspace(-1, 1, a.numel()).reshape(a.shape).requires_grad_() for a in arrays
        ]
        outputs = several(function(*arrays))
        loss = sum(output.square().sum() for output in outputs)
        first = torch.autograd.grad(loss, arrays, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), arrays)

    assert_close(second(_kernels(call)), second(_torch(call)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", [BY_OP["pre"], SLAB], ids=["pre", "slabs"])
def test_narrow_parameters_get_narrow_gradients(call: Call) -> None:
    arrays = _narrow(call)
    got = gradients(_kernels(call), arrays)
    assert {one.dtype for one in got} == {torch.bfloat16}
    assert_close(got, gradients(_torch(call), arrays), rtol=2e-2, atol=2e-2)


@every_op
def test_an_op_is_one_node(call: Call) -> None:
    arrays = call.arrays(torch.float32)
    for output in several(_kernels(call)(*arrays)):
        below = [node for node, _ in output.grad_fn.next_functions if node is not None]
        assert [node.variable.data_ptr() for node in below] == [a.data_ptr() for a in arrays]


@pytest.mark.parametrize("call", [BY_OP["combine"], UNMIXING[2]], ids=["mixed", "unmixed"])
def test_a_call_seen_before_is_recognised(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    function, arrays = _kernels(call), call.arrays(torch.float32)
    wider = [a.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in arrays]
    given = [[a.detach() for a in arrays], arrays, wider]
    want = [several(function(*one)) for one in given]
    slopes = gradients(function, arrays)
    with monkeypatch.context() as patch:
        patch.setattr("mhc_core.dispatch.signature", None)  # nothing is looked up
        again = [
            [a.detach().clone().requires_grad_(a.requires_grad) for a in given[k]] for k in (0, 1)
        ]
        for one, outputs in zip([*again, wider], want, strict=True):
            assert_close(function(*one), outputs, rtol=0, atol=0)
        for _ in range(2):  # the second time, the cotangents are recognised too
            assert_close(gradients(function, again[1]), slopes, rtol=0, atol=0)
        with torch.no_grad():  # a leaf's gradient does not matter here, so this is the first kind
            assert not any(one.requires_grad for one in several(function(*arrays)))
        with mhc.no_grad():
            assert not any(one.requires_grad for one in several(function(*arrays)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert all(isinstance(one, FakeTensor) for one in several(function(*given[0])))
    torch.func.vjp(function, *given[0])  # transforms take their own way
    x, y, *rest = given[0]
    with pytest.raises(ValueError, match="combine: y has shape"):
        function(x, y[:1], *rest)
    with pytest.raises(TypeError, match="combine: y has dtype int64"):
        function(x, y.long(), *rest)
    same = torch.randn(T, N, C)
    op = functools.partial(mhc.residual_add_aggregate, same, same, torch.randn(N), backend=NAME)
    assert_close(op(), op(), rtol=0, atol=0)  # one tensor for two arguments


def test_strided_tensors_are_copied_once() -> None:
    call = BY_OP["combine"]
    plain = call.arrays(torch.float32)
    gaps = [a.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for a in plain]
    assert not gaps[0].is_contiguous()
    assert_close(_kernels(call)(*gaps), _kernels(call)(*plain), rtol=0, atol=0)
    assert_close(gradients(_kernels(call), gaps), gradients(_kernels(call), plain), rtol=0, atol=0)


def test_results_share_no_memory() -> None:
    call = BY_OP["residual_add_aggregate"]  # whose gradients of x and res are equal
    primals = tuple(one.detach() for one in call.arrays(torch.float32))
    cotangents = tuple(torch.randn_like(one) for one in several(_kernels(call)(*primals)))
    dx, dres, _ = mhc.vjp(call.op, primals, cotangents, backend=NAME)
    assert torch.equal(dx, dres)
    dx.zero_()
    assert dres.any()


def test_no_tokens_of_whole_slabs() -> None:
    arrays = [a[:0] if len(a) == T else a for a in _narrow(SLAB)]
    arrays = [a.detach().requires_grad_() for a in arrays]
    got = gradients(_kernels(SLAB), arrays)
    assert [one.shape for one in got] == [a.shape for a in arrays]
    assert not any(one.any() for one in got)


def test_no_tokens() -> None:
    x = torch.zeros(0, N, C, requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in PROJECTION]
    outputs = mhc.pre(x, *parameters, VARIANT, backend=NAME)
    assert [tuple(one.shape) for one in outputs] == [(0, C), (0, N), (0, N, N)]
    torch.autograd.backward(outputs, [torch.zeros_like(one) for one in outputs])
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


# ---- compilers, transforms and modes -------------------------------------------------------------

COMPILED = [BY_OP[op] for op in ("combine", "pre", "combine_pre", "residual_add_aggregate")]
COMPILED.append(UNMIXING[-1])


@pytest.mark.parametrize("call", COMPILED, ids=lambda call: call.op)
def test_one_graph_for_any_number_of_tokens(call: Call) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_kernels(call), backend=counter, fullgraph=True)
    for count, graphs in ((T, 1), (5, 2), (7, 2), (9, 2)):
        shapes = [(count, *s[1:]) if s[0] == T and len(s) > 1 else s for s in call.shapes]
        arrays = replace(call, shapes=shapes).arrays(torch.float32)
        for array in arrays:
            if array.shape[0] == count and array.ndim > 1:
                torch._dynamo.maybe_mark_dynamic(array, 0)
        assert_close(compiled(*arrays), _kernels(call)(*arrays), rtol=0, atol=0)
        got, want = gradients(compiled, arrays), gradients(_kernels(call), arrays)
        assert_close(got, want, rtol=0, atol=0)
        assert counter.frame_count <= graphs


@pytest.mark.parametrize("op", ["pre", "residual_add_aggregate"])
def test_the_operators_pass_opcheck(op: str) -> None:
    call = BY_OP[op]
    arrays, static = call.arrays(torch.float32), kernels_module._written(call.static)
    torch.library.opcheck(torch.ops.mhc_torch.kernels, (NAME, op, static, arrays))
    outputs = several(_kernels(call)(*arrays))
    given = [torch.randn_like(one) for one in outputs]
    torch.library.opcheck(torch.ops.mhc_torch.kernels_vjp, (NAME, op, static, arrays, given, []))


@pytest.mark.parametrize("op", ["combine", "pre"])
def test_transforms(op: str) -> None:
    call = BY_OP[op]
    arrays = call.arrays(torch.float32)
    want = gradients(_kernels(call), arrays)
    plain = [a.detach() for a in arrays]
    numbers = tuple(range(len(arrays)))
    got = torch.func.grad(lambda *a: loss(_kernels(call))(*a), argnums=numbers)(*plain)
    assert_close(got, want, rtol=0, atol=0)
    for reentrant in (False, True):
        again = [a.detach().requires_grad_() for a in arrays]
        again_computed = functools.partial(checkpoint, _kernels(call), use_reentrant=reentrant)
        result = loss(again_computed)(*again)
        result.backward()
        assert_close(tuple(a.grad for a in again), want, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(gradients(_kernels(call), arrays), want, rtol=0, atol=0)


class _Sublayer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = [torch.nn.Parameter(torch.randn(shape)) for shape in PROJECTION]
        self.phi, self.scale, self.bias = parts

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.phi, self.scale, self.bias
        h, h_post, h_res = mhc.pre(x, *parameters, VARIANT, backend=NAME)
        return mhc.combine(x, h, h_post, h_res, backend=NAME)


def test_a_module_is_copied_and_exported() -> None:
    module, x = copy.deepcopy(_Sublayer()), torch.randn(T, N, C)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("T")},))
    for count in (T, 6):
        x = torch.randn(count, N, C)
        assert_close(exported.module()(x), module(x), rtol=0, atol=0)
