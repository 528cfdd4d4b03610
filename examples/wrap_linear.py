"""Wrap a trained Linear, or all Linears of a model, in a connection on slices of its input.

python examples/wrap_linear.py
"""

from __future__ import annotations

import argparse

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers

from mhc_core.mlx import AutoPatcher, MHCRewire


def main() -> None:
    """Wrap a layer, quantise it and train it; then patch a model."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dims", type=int, default=512)
    arguments.add_argument("--n", type=int, default=32, help="slices")
    arguments.add_argument("--steps", type=int, default=20)
    options = arguments.parse_args()
    mx.random.seed(0)

    layer = nn.Linear(options.dims, options.dims)
    x = mx.random.normal((64, options.dims))
    wrapped = MHCRewire(layer, options.dims, options.n)
    away = distance(wrapped(x), x + layer(x))
    print(f"wrapped: starts as x + Linear(x), to {away:.0e} of it")

    losses = fit(wrapped, x, mx.roll(x, 1, axis=-1), options.steps)
    print(f"trained: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {options.steps} steps")

    before = wrapped(x)
    nn.quantize(wrapped, bits=8)
    print(f"quantised to 8 bits: {wrapped.inner}, {distance(wrapped(x), before):.0e} away")

    model = nn.Sequential(nn.Linear(options.dims, options.dims), nn.ReLU(), layer)
    print(AutoPatcher.patch(model, n_streams=options.n))


def distance(a: mx.array, b: mx.array) -> float:
    """Return the distance of a from b, relative to the size of b."""
    return float((mx.linalg.norm(a - b) / mx.linalg.norm(b)).item())


def fit(model: nn.Module, x: mx.array, target: mx.array, steps: int) -> list[float]:
    """Train a model to return ``target`` for ``x``; return the losses."""
    optimizer = optimizers.Adam(1e-3)
    step = nn.value_and_grad(model, lambda: (model(x) - target).square().mean())
    losses: list[float] = []
    for _ in range(steps):
        loss, gradients = step()
        optimizer.update(model, gradients)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main()
