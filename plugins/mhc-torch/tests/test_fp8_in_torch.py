"""mhc_core.fp8 on tensors: PyTorch's own conversion, and gradients."""

from __future__ import annotations

import torch

from mhc_core import fp8


def quantised(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = fp8.quantised(h, 32)
    return *found, fp8.dequantised(*found, 32)


def test_elements_are_those_of_pytorch() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        h = (torch.randn(9, 72) * 2.0 ** torch.randint(-9, 30, (9, 1))).to(dtype)
        blocks = torch.nn.functional.pad(h.float(), (0, 24)).reshape(9, 3, 32)
        scales = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(1e-4) / 448)))
        want = (blocks / scales[..., None]).to(torch.float8_e4m3fn)
        elements, exponents, again = quantised(h)
        assert torch.equal(elements, want.view(torch.uint8).reshape(9, -1)[:, :72])
        assert torch.equal(torch.exp2(exponents.float() - 127), scales)
        assert torch.equal(again, (want.float() * scales[..., None]).reshape(9, -1)[:, :72])
        assert (again - h).abs().max() <= 2**-4 * h.abs().max()


def test_what_is_not_finite_is_nan() -> None:
    h = torch.ones(3, 40)
    h[0, 1], h[1, 2], h[2, 3] = torch.inf, -torch.inf, torch.nan
    assert torch.equal(quantised(h)[-1].isnan(), ~h.isfinite())


def test_the_rounding_is_a_constant_of_the_gradient() -> None:
    h = torch.randn(3, 40, requires_grad=True)
    rounded = quantised(h)[-1]
    assert not rounded.requires_grad
    ((h + (rounded - h).detach()).square().sum() / 2).backward()
    assert torch.allclose(h.grad, rounded, rtol=1e-6)
