"""Small stacks, and their gradients by every parameter, for these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn, utils

import mhc_core as mhc
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, HyperHead

DIMS, COUNT = 8, 6

orders = pytest.mark.parametrize("single_pass", [False, True], ids=["two passes", "single pass"])


class Layer(nn.Module):
    """An MLP that counts how often it runs."""

    def __init__(self, dims: int = DIMS) -> None:
        super().__init__()
        self.weight = mx.random.normal((dims, dims)) / dims**0.5
        self.shift = 0.1 * mx.random.normal((dims,))
        self.runs = 0

    def __call__(self, h: mx.array, mask: mx.array | None = None, scale: float = 1.0) -> mx.array:
        self.runs += 1
        y = scale * mx.tanh(h @ self.weight + self.shift)
        return y if mask is None else y * mask


def made(
    single_pass: bool = False,
    recompute: Any = "auto",
    head: bool = False,
    variant: mhc.Variant = mhc.DEEPSEEK_V4,
    layer: Callable[[], nn.Module] = Layer,
    norm: Callable[[int], nn.Module] = nn.RMSNorm,
) -> HyperConnectedStack:
    """Return the same stack for the same arguments, its parameters far from the start."""
    mx.random.seed(3)
    blocks = [HyperConnectedBlock(layer(), DIMS, 4, variant, norm(DIMS)) for _ in range(COUNT)]
    last = HyperHead(DIMS, 4, variant) if head else None
    stack = HyperConnectedStack(blocks, 4, single_pass, recompute, last)
    stack.apply(lambda p: p + 0.3 * mx.random.normal(p.shape))
    mx.eval(stack.parameters())
    return stack


def hidden(*leading: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((*leading, DIMS), key=mx.random.key(5)).astype(dtype)


def flat(tree: Any) -> dict[str, mx.array]:
    return dict(utils.tree_flatten(tree))


def gradients(
    stack: HyperConnectedStack,
    *arrays: mx.array,
    call: Callable[..., mx.array] | None = None,
    compiled: bool = False,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss, and its gradients by every parameter and by the arrays (by index)."""
    call = call or stack
    own = stack.trainable_parameters()

    def loss(parameters: Any, *arrays: mx.array) -> mx.array:
        stack.update(parameters)
        out = call(*arrays)
        return (out * mx.cos(mx.arange(out.size)).reshape(out.shape)).astype(mx.float32).sum()

    derived = mx.value_and_grad(loss, argnums=list(range(len(arrays) + 1)))
    value, (of_parameters, *of_arrays) = (mx.compile(derived) if compiled else derived)(
        own, *arrays
    )
    stack.update(own)
    result = flat(of_parameters) | {str(k): g for k, g in enumerate(of_arrays)}
    mx.eval(value, result)
    return value, result


def same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    """Check equality, bit for bit without a tolerance, and that no array is zero everywhere."""
    assert set(one[1]) == set(other[1])
    for name, gradient in {"loss": one[0], **one[1]}.items():
        want = {"loss": other[0], **other[1]}[name]
        assert gradient.dtype == want.dtype
        assert mx.abs(gradient - want).max() <= tolerance * mx.abs(want).max(), name
        if not name.startswith("blocks.0.connection"):
            assert mx.abs(gradient).max() > 0, name


def close(got: mx.array, want: mx.array) -> None:
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-5), mx.abs(got - want).max()
