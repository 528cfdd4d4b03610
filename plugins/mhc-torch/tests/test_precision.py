"""Full float32, whatever the program allows PyTorch to do with its own matmuls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import CALLS, Call, assert_close, gradients, several
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_torch import _precision

every_op = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.op)


@pytest.fixture
def reduced() -> Iterator[None]:
    """Allow float32 matmuls in TF32 and bfloat16, as training scripts do."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def _results(call: Call, arrays: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    outputs = tuple(output.detach() for output in several(call.function(*arrays)))
    return (*outputs, *gradients(call.function, arrays))


@every_op
def test_autocast_changes_nothing(call: Call) -> None:
    arrays = call.arrays(torch.float32)
    want = _results(call, arrays)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = _results(call, arrays)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_autocast_changes_nothing_in_compiled_code() -> None:
    call = next(call for call in CALLS if call.op == "pre")
    arrays = call.arrays(torch.float32)
    compiled = torch.compile(
        call.function, backend=CompileCounterWithBackend("aot_eager"), fullgraph=True
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = (*compiled(*arrays), *gradients(compiled, arrays))
    assert_close(tuple(t.detach() for t in got), _results(call, arrays))


@every_op
def test_reduced_matmuls_change_nothing(call: Call, request: pytest.FixtureRequest) -> None:
    arrays = call.arrays(torch.float32)
    want = _results(call, arrays)
    request.getfixturevalue("reduced")
    settings = [
        library.matmul.fp32_precision for library in (torch.backends.cuda, torch.backends.mkldnn)
    ]
    got = _results(call, arrays)
    assert_close(got, want, rtol=2e-5, atol=2e-6)
    assert settings == [
        library.matmul.fp32_precision for library in (torch.backends.cuda, torch.backends.mkldnn)
    ]


@pytest.mark.usefixtures("reduced")
def test_settings_are_noticed() -> None:
    assert _precision.reduced_precision("cpu")
    assert _precision.reduced_precision("cuda")
    torch.set_float32_matmul_precision("highest")
    assert not _precision.reduced_precision("cpu")
    assert not _precision.reduced_precision("cuda")


@pytest.mark.usefixtures("reduced")
def test_no_float32_matmul_reaches_pytorch() -> None:
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    for call in CALLS:
        with Watch():
            _results(call, call.arrays(torch.float32))
    assert set(seen) == {torch.float64}  # on a CPU; a GPU takes halves


@pytest.mark.usefixtures("reduced")
@every_op
def test_other_gradients_hold_too(call: Call) -> None:
    if call.op == "sinkhorn_knopp":
        return
    arrays = call.arrays(torch.float64)
    torch.autograd.gradcheck(call.function, arrays)
    single = [a.detach().float() for a in arrays]
    argnums = tuple(range(len(single)))

    def loss(*arrays: torch.Tensor) -> torch.Tensor:
        return torch.stack([o.square().sum() for o in several(call.function(*arrays))]).sum()

    def squared(*arrays: torch.Tensor) -> torch.Tensor:
        each = torch.func.grad(loss, argnums=argnums)(*arrays)
        return torch.stack([g.square().sum() for g in each]).sum()

    got = torch.func.grad(squared, argnums=argnums)(*single)
    want = torch.func.grad(squared, argnums=argnums)(*[a.detach() for a in arrays])
    for one, other in zip(got, want, strict=True):
        assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def _in_tf32(a: torch.Tensor) -> torch.Tensor:
    """Round as the hardware may: 11 significant bits, the rest cut off."""
    return (a.view(torch.int32) & -0x2000).view(torch.float32)


def test_halves_survive_a_tf32_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    exact = a.double() @ b.double()
    matmul = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: matmul(_in_tf32(a), _in_tf32(b)))
    size = (a.abs() @ b.abs()).double()
    assert ((torch.matmul(a, b) - exact).abs() / size).max() > 1e-5  # what TF32 costs
    assert ((_precision.matmul_by_halves(a, b) - exact).abs() / size).max() < 3e-7


@pytest.mark.usefixtures("reduced")
@pytest.mark.parametrize("how", ["matmul_in_float64", "matmul_by_halves"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 2), (0, 0)])
def test_full_matmuls_under_vmap(
    how: str, axes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_precision, "matmul_in_float64", getattr(_precision, how))
    shapes = [(5, 2, 3, 4), (4, 6)], [(3, 4), (5, 2, 4, 6)], [(3, 4), (2, 4, 6)]
    for shape_a, shape_b in shapes:
        a, b = torch.randn(shape_a), torch.randn(shape_b)
        wide = [
            t if axis is None else torch.stack([t, 2 * t, -t], axis)
            for t, axis in zip((a, b), axes, strict=True)
        ]
        expected = torch.vmap(torch.matmul, in_dims=axes)(*wide)
        got = torch.vmap(_precision._full_matmul, in_dims=axes)(*wide)
        assert_close(got, expected, rtol=1e-5, atol=1e-5)
        grad = torch.func.grad(lambda a, b: _precision._full_matmul(a, b).square().sum())
        plain = torch.func.grad(lambda a, b: torch.matmul(a, b).square().sum())
        got = torch.vmap(grad, in_dims=axes)(*wide)
        assert_close(got, torch.vmap(plain, in_dims=axes)(*wide), rtol=1e-4, atol=1e-4)
