"""Peak memory of a training step of deep stacks in MLX, against ``mhc_core.planning``.

The depths are those of DeepSeek-V4 Flash and Pro (43 and 61 layers), the channels a 32nd of theirs.
``python tests/soak/recompute.py``; docs/records has what it printed. A layer multiplies by a weight
for each channel, so that it keeps h alone; peaks also hold what a step needs for a moment.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mhc_core as mhc
from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack
from mhc_core.planning import Model, plan, total

TOKENS, SCALE = 512, 32
DEPTHS = {43: 4096 // SCALE, 61: 7168 // SCALE}


class Scale(nn.Module):
    """A layer that multiplies each channel by a weight."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = mx.ones(dims)

    def __call__(self, h: mx.array) -> mx.array:
        """Return h times the weight."""
        return h * self.weight


def peak(layers: int, dims: int, recompute: Any) -> int:
    """Return the bytes that a step takes beyond parameters and input."""
    mx.random.seed(0)
    blocks = [HyperConnectedBlock(Scale(dims), dims, 4, mhc.DEEPSEEK_V4) for _ in range(2 * layers)]
    stack = HyperConnectedStack(blocks, 4, recompute=recompute)
    h = mx.random.normal((TOKENS, dims))
    step = nn.value_and_grad(stack, lambda h: stack(h).square().mean())
    mx.eval(stack.parameters(), h)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(h))
    return mx.get_peak_memory() - before


def main() -> None:
    """Print a line for each depth and segment."""
    parser = argparse.ArgumentParser(description="Peak memory of deep stacks against the plan.")
    parser.add_argument("--layers", type=int, action="append", help="only this depth")
    depths = parser.parse_args().layers or list(DEPTHS)
    print(f"MLX {mx.__version__} on a CPU, {TOKENS} tokens in float32, n=4; MB beyond parameters")
    for layers in depths:
        dims = DEPTHS.get(layers, 64)
        model = Model(layers=layers, channels=dims)
        plans = [plan(model, tokens=TOKENS, itemsize=4, segment=k) for k in (1, 4, 8, 16, 43)]
        gradients = plans[0].parameters[1].size
        print(f"{layers} layers, C={dims}: the optimum is a segment of {plans[0].optimum}")
        whole = (False, total(plans[0].kept))
        for segment, kept in (whole, *((one.segment, total(one.recomputed)) for one in plans)):
            mx.clear_cache()
            measured = peak(layers, dims, segment)
            planned = kept + gradients
            name = f"segments of {segment}" if segment else "no recomputation"
            line = f"  {name:16} planned {planned / 1e6:7.1f} measured {measured / 1e6:7.1f}"
            print(f"{line} ratio {measured / planned:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
