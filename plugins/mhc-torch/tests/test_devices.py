"""Devices, and arrays to and from NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy
import pytest
import torch
from calls import CALLS, PRE, RES, STREAMS, VARIANT, Call, several

import mhc_core as mhc
from mhc_core import math
from mhc_torch import ops

every_op = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.op)


@every_op
def test_shapes_follow_on_the_meta_device(call: Call) -> None:
    arrays = call.arrays(torch.float32)
    wanted = several(call.function(*arrays))
    elsewhere = [a.detach().to("meta").requires_grad_() for a in arrays]
    outputs = several(call.function(*elsewhere))
    assert [(o.shape, o.dtype, o.device.type) for o in outputs] == [
        (o.shape, o.dtype, "meta") for o in wanted
    ]
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    assert [a.grad.shape for a in elsewhere if a.grad is not None] == [a.shape for a in arrays]


@every_op
def test_an_argument_on_another_device_is_named(call: Call) -> None:
    arrays = call.arrays(torch.float32, grad=False)
    names = list(math.load(call.op).OP.arrays)
    for index in range(1, len(arrays)):
        mixed = [a.to("meta") if i == index else a for i, a in enumerate(arrays)]
        with pytest.raises(
            ValueError, match=rf"^{call.op}: {names[index]} is on meta; needs cpu, "
        ):
            call.function(*mixed)


def test_a_cotangent_on_another_device_is_named() -> None:
    x, h_pre = torch.randn(STREAMS), torch.randn(PRE)
    g = torch.randn(STREAMS[0], STREAMS[2], device="meta")
    with pytest.raises(
        ValueError, match=r"^vjp of aggregate: the cotangent of h is on meta; needs"
    ):
        mhc.vjp("aggregate", (x, h_pre), g)
    with pytest.raises(ValueError, match=r"^vjp of aggregate: h_pre is on meta; needs cpu"):
        mhc.vjp("aggregate", (x, h_pre.to("meta")), g.new_zeros(g.shape, device="cpu"))


def test_another_devices_error_in_compiled_code() -> None:
    x, h_pre = torch.randn(STREAMS), torch.randn(PRE, device="meta")
    with pytest.raises(Exception, match="aggregate: h_pre is on meta; needs cpu"):
        torch.compile(mhc.aggregate, fullgraph=True)(x, h_pre)


DTYPES = [numpy.float32, numpy.float16, numpy.float64, ml_dtypes.bfloat16]


def _host_arrays(dtype: Any) -> list[numpy.ndarray[Any, Any]]:
    plain = numpy.arange(24).reshape(2, 3, 4).astype(dtype)
    frozen = plain.copy()
    frozen.setflags(write=False)
    repeated = numpy.broadcast_to(plain[:1], (5, 3, 4))
    return [
        plain,
        frozen,
        plain[:, ::-1],
        plain.T,
        plain[:0],
        plain[0, 0, 0:1].reshape(()),
        repeated,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numpy.dtype(dtype).name)
def test_host_arrays_go_in_and_out(dtype: Any) -> None:
    for array in _host_arrays(dtype):
        tensor = ops.from_host(array)
        assert str(tensor.dtype) == f"torch.{array.dtype.name}"
        for back in (ops.to_host(tensor), ops.to_host(tensor.requires_grad_())):
            assert back.dtype == array.dtype
            numpy.testing.assert_array_equal(back, array)
    assert not numpy.shares_memory(ops.to_host(ops.from_host(array)), array)


def test_nan_and_infinity_survive() -> None:
    array = numpy.array([numpy.nan, numpy.inf, -numpy.inf, -0.0], ml_dtypes.bfloat16)
    back = ops.to_host(ops.from_host(array))
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: numpy.dtype(dtype).name)
def test_host_arrays_beside_tensors(dtype: Any) -> None:
    x = numpy.random.default_rng(0).normal(size=STREAMS).astype(dtype)
    h_pre = torch.rand(PRE, dtype=torch.float64 if dtype == numpy.float64 else torch.float32)
    for got in (mhc.aggregate(x, h_pre), mhc.aggregate(x, h_pre.numpy(), backend="torch")):
        assert isinstance(got, torch.Tensor)
        assert torch.equal(got, mhc.aggregate(ops.from_host(x), h_pre))


def test_host_arrays_go_to_the_default_device() -> None:
    with torch.device("meta"):
        assert ops.from_host(numpy.ones(3)).device.type == "meta"


def test_a_named_backend_answers_everything() -> None:
    logits = numpy.random.default_rng(0).normal(size=RES)
    with mhc.use_backend("torch"):
        got = mhc.sinkhorn(logits)
    numpy.testing.assert_allclose(ops.to_host(got), mhc.sinkhorn(logits, backend="numpy"))


def test_a_tensor_is_not_taken_by_another_backend() -> None:
    with pytest.raises(TypeError, match=r"x is a torch\.Tensor; backend 'numpy' needs"):
        mhc.contract(torch.zeros(STREAMS), backend="numpy")


def test_no_tokens() -> None:
    x = torch.zeros(0, 3, 5, requires_grad=True)
    parameters = [torch.randn(shape, requires_grad=True) for shape in ((15, 15), (3,), (15,))]
    outputs = mhc.pre(x, *parameters, VARIANT)
    assert [tuple(o.shape) for o in outputs] == [(0, 5), (0, 3), (0, 3, 3)]
    torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
