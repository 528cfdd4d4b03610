"""Train a transformer with n residual streams on text: the sources of Python's own library.

python examples/train_text.py --steps 200
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx import optimizers, utils

from mhc_core.mlx import HyperConnectedBlock, HyperConnectedStack, HyperHead

BYTES = 256


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rope = nn.RoPE(dims // heads)
        self.qkv = nn.Linear(dims, 3 * dims, bias=False)
        self.out = nn.Linear(dims, dims, bias=False)

    def __call__(self, h: mx.array) -> mx.array:
        """Map ``[batch, tokens, dims]`` to the same shape."""
        parts = self.qkv(h).reshape(*h.shape[:2], 3, self.heads, -1)
        q, k, v = (parts[:, :, i].swapaxes(1, 2) for i in range(3))
        y = mx.fast.scaled_dot_product_attention(
            self.rope(q), self.rope(k), v, scale=q.shape[-1] ** -0.5, mask="causal"
        )
        return self.out(y.swapaxes(1, 2).reshape(h.shape))


class Transformer(nn.Module):
    """A model from bytes to logits: attention and MLP alternate on n streams."""

    def __init__(self, dims: int, heads: int, layers: int, n: int, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, dims)
        blocks: list[HyperConnectedBlock] = []
        for _ in range(layers):
            mlp = nn.Sequential(nn.Linear(dims, 4 * dims), nn.GELU(), nn.Linear(4 * dims, dims))
            for layer in (Attention(dims, heads), mlp):
                blocks.append(HyperConnectedBlock(layer, dims, n, norm=nn.RMSNorm(dims)))
        self.stack = HyperConnectedStack(
            blocks, n, recompute="auto" if recompute else False, head=HyperHead(dims, n)
        )
        self.norm = nn.RMSNorm(dims)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Map ``[batch, tokens]`` to ``[batch, tokens, 256]``."""
        return self.embedding.as_linear(self.norm(self.stack(self.embedding(tokens))))


def read_text(size: int) -> mx.array:
    """Return the first bytes of the standard library's sources."""
    text = b""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += file.read_bytes()
        if len(text) > size:
            break
    return mx.array(list(text[:size]), mx.uint8).astype(mx.int32)


def batch(text: mx.array, count: int, context: int) -> mx.array:
    """Return random pieces of a text, each of ``context`` bytes and the next one."""
    starts = mx.random.randint(0, text.size - context, (count, 1))
    return text[starts + mx.arange(context + 1)]


def main() -> None:
    """Train, and print how the loss goes down."""
    arguments = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "steps": 200,
        "dims": 128,
        "heads": 4,
        "layers": 4,
        "streams": 4,
        "batch": 8,
        "context": 128,
        "bytes": 1_000_000,
    }.items():
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--lr", type=float, default=3e-3)
    arguments.add_argument("--recompute", action="store_true", help="less memory, more work")
    arguments.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = arguments.parse_args()

    mx.random.seed(0)
    text = read_text(options.bytes)
    model = Transformer(
        options.dims, options.heads, options.layers, options.streams, options.recompute
    )
    mx.eval(model.parameters())
    count = sum(parameter.size for _, parameter in utils.tree_flatten(model.parameters()))
    print(f"{count} parameters, {options.streams} streams, {text.size} bytes of text")

    schedule = optimizers.join_schedules(
        [
            optimizers.linear_schedule(0, options.lr, 20),
            optimizers.cosine_decay(options.lr, options.steps),
        ],
        [20],
    )
    optimizer = optimizers.AdamW(schedule)
    state = [model.state, optimizer.state, mx.random.state]

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    def step(tokens: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(tokens)
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        return value

    if options.compile:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    start, losses = time.perf_counter(), []
    for k in range(options.steps):
        losses.append(step(batch(text, options.batch, options.context)))
        mx.eval(state, losses[-1])
        if k % 10 == 9 or k + 1 == options.steps:
            recent = sum(value.item() for value in losses[-10:]) / len(losses[-10:])
            each = (time.perf_counter() - start) / (k + 1)
            peak = mx.get_peak_memory() / 1e6
            print(f"step {k + 1}: loss {recent:.3f}, {each:.2f} s a step, {peak:.0f} MB at most")


if __name__ == "__main__":
    main()
