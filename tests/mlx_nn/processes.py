"""Several processes that compute what one does in MLX, on ``mx.distributed``.

``mlx.launch -n 4 --backend ring tests/mlx_nn/processes.py --all`` prints a line for each layout.
With ``--checkpoint FOLDER`` the processes train instead, and go on from what is there; with
``--fail-at STEP`` one of them dies at that step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_flatten

import mhc_core as mhc
from mhc_backends.mlx_common import checkpoint
from mhc_core.mlx import (
    GatedConnection,
    GatedHead,
    HyperConnectedBlock,
    HyperConnectedStack,
    HyperHead,
    channels_over,
    pipeline_value_and_grad,
    shard_channels,
)

B, S, n, C, LAYERS = 4, 6, 4, 16, 4
Tree = dict[str, mx.array]
summed: list[int] = []  # the bytes of each all_sum that is traced


class Mlp(nn.Module):
    """Two products, with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * C, bias=False), nn.Linear(2 * C, C, bias=False)

    def __call__(self, h: mx.array) -> mx.array:
        """Return the layer's output."""
        return self.down(mx.tanh(self.up(h)))


def made(single_pass: bool = False, start: int = 0, stop: int = LAYERS) -> HyperConnectedStack:
    """Return the same stack in every process, or some of its blocks, as a stage."""
    mx.random.seed(0)
    blocks = [HyperConnectedBlock(Mlp(), C, n, mhc.DEEPSEEK_V4) for _ in range(LAYERS)]
    head = None if single_pass else HyperHead(C, n, mhc.DEEPSEEK_V4)
    for one in (*(block.connection for block in blocks), *([] if head is None else [head])):
        for name in one.names:  # far from the start, where H_res has little gradient
            one[name] = 0.3 * mx.random.normal(one[name].shape)
    last = stop == LAYERS
    stack = HyperConnectedStack(
        blocks[start:stop],
        n,
        single_pass,
        recompute=1,
        head=head if last else None,
        first=start == 0,
        last=last,
    )
    mx.eval(stack.parameters())
    return stack


def hidden() -> mx.array:
    """Return the same input in every process."""
    return mx.random.normal((B, S, C), key=mx.random.key(2))


def loss_of(out: mx.array) -> mx.array:
    """Return a mean over tokens, of equal parts in all layouts."""
    return (mx.sin(out) * out).mean()


def flat(tree: Any) -> Tree:
    """Return arrays by name."""
    return dict(tree_flatten(tree))


def alone(single_pass: bool = False) -> tuple[mx.array, Tree]:
    """Return the loss and the gradients of one process."""
    stack = made(single_pass)
    loss, gradients = nn.value_and_grad(stack, lambda h: loss_of(stack(h)))(hidden())
    return loss, flat(gradients)


def apart(got: mx.array, wanted: mx.array) -> float:
    """Return the largest distance, relative to the largest number."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return (mx.abs(got - wanted).max() / mx.maximum(mx.abs(wanted).max(), 1e-6)).item()


def worst(loss: mx.array, got: Tree, wanted: tuple[mx.array, Tree]) -> float:
    """Return the largest distance of a loss, and of the gradients that there are."""
    return max(apart(loss, wanted[0]), *(apart(got[k], wanted[1][k]) for k in got))


def data(group: Any) -> float:
    """Shard the batch, and average gradients by ``nn.average_gradients``."""
    stack, part = made(), B // group.size()
    own = hidden()[group.rank() * part : (group.rank() + 1) * part]
    loss, gradients = nn.value_and_grad(stack, lambda h: loss_of(stack(h)))(own)
    loss = mx.distributed.all_sum(loss, group=group) / group.size()
    return worst(loss, flat(nn.average_gradients(gradients, group)), alone())


def sharded(group: Any) -> HyperConnectedStack:
    """Return a stack whose channels are sharded, layers included."""
    stack = shard_channels(made(), group)
    for block in stack.blocks:
        mlp: Any = block.layer
        mlp.up = shard_linear(mlp.up, "sharded-to-all", group=group)
        mlp.down = shard_linear(mlp.down, "all-to-sharded", group=group)
    return stack


def own_of(array: mx.array, like: mx.array, group: Any) -> mx.array:
    """Return a process's part of a gradient of one process, by the shape of the part."""
    if array.shape == like.shape:
        return array
    if array.shape[-1] == n * C:  # phi
        array = array.reshape(-1, n, C)
        part = C // group.size()
        own = array[..., group.rank() * part : (group.rank() + 1) * part]
        return own.reshape(like.shape)
    axis = 0 if array.shape[0] != like.shape[0] else 1
    return mx.split(array, group.size(), axis=axis)[group.rank()]


def channels(group: Any) -> float:
    """Shard streams and phi along C, and the layers by their inputs and outputs."""
    stack = sharded(group)
    own = mx.split(hidden(), group.size(), axis=-1)[group.rank()]

    def loss_here(h: mx.array) -> mx.array:
        return loss_of(stack(h)) / group.size()

    summed.clear()
    with channels_over(group):
        value, gradients = nn.value_and_grad(stack, loss_here)(own)
    loss = mx.distributed.all_sum(value, group=group)
    total, wanted = alone()
    got = flat(gradients)
    return worst(loss, got, (total, {k: own_of(wanted[k], got[k], group) for k in got}))


def gated(group: Any) -> float:
    """Shard the channels of a gated residual and of its head."""

    def made() -> nn.Module:
        mx.random.seed(3)
        both = nn.Module()
        both.connection, both.head = GatedConnection(C, n, 3), GatedHead(C, n, 3)
        both.apply(lambda one: 0.3 * mx.random.normal(one.shape))
        mx.eval(both.parameters())
        return both

    def loss_here(both: Any, x: mx.array) -> mx.array:
        return loss_of(both.head(both.connection(x, mx.tanh)))

    x, whole = mx.random.normal((B, S, n, C), key=mx.random.key(4)), made()
    total, wanted = nn.value_and_grad(whole, lambda x: loss_here(whole, x))(x)
    part = shard_channels(made(), group)
    own = mx.split(x, group.size(), axis=-1)[group.rank()]
    with channels_over(group):
        one = nn.value_and_grad(part, lambda x: loss_here(part, x) / group.size())
        value, gradients = one(own)
    loss = mx.distributed.all_sum(value, group=group)

    def mine(array: mx.array) -> mx.array:
        axis = array.shape.index(n * C)
        by_stream = mx.unflatten(array, axis, (n, C))
        kept = mx.split(by_stream, group.size(), axis=axis + 1)[group.rank()]
        return mx.flatten(kept, axis, axis + 1)

    return worst(loss, flat(gradients), (total, {k: mine(one) for k, one in flat(wanted).items()}))


def pipeline(group: Any, single_pass: bool = False) -> float:
    """Split the sublayers over processes; streams, and in the single pass H_pre, cross over."""
    each = LAYERS // group.size()
    start = group.rank() * each
    stage = made(single_pass, start, start + each)
    loss, gradients = pipeline_value_and_grad(stage, loss_of, group)(hidden())
    names: Tree = {}
    for name, one in flat(gradients).items():
        words = name.split(".")
        if words[0] == "blocks":
            words[1] = str(int(words[1]) + start)
        names[".".join(words)] = one
    return worst(loss, names, alone(single_pass))


def traffic(group: Any) -> dict[str, list[int]]:
    """Return the bytes of each sum of a pre and of its vjp, with channels sharded."""
    mx.random.seed(1)
    part = C // group.size()
    x, phi = mx.random.normal((B, S, n, part)), mx.random.normal((24, n * part))

    def run(x: mx.array, phi: mx.array) -> mx.array:
        h, h_post, h_res = mhc.pre(x, phi, mx.ones(3), mx.zeros(24), mhc.DEEPSEEK_V4)
        return mhc.combine(x, mx.tanh(h), h_post, h_res).sum()

    summed.clear()
    with channels_over(group):
        mx.eval(run(x, phi))
        forward = list(summed)
        summed.clear()
        mx.eval(mx.grad(run, (0, 1))(x, phi))
    return {"forward": forward, "with gradients": list(summed)}


def kernels(group: Any) -> dict[str, Any] | None:
    """Compare a sublayer by simulated kernels, on parts of the channels, with one process's."""
    simulator = mhc.backends().get("mlx-metal-simulator")
    if simulator is None or not simulator.available:
        return None
    mx.random.seed(5)
    arrays = [mx.random.normal(shape) for shape in ((3, n, C), (24, n, C), (3,), (24,))]

    def run(x: mx.array, phi: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
        projection = phi.reshape(24, -1), scale, bias, mhc.DEEPSEEK_V4
        h, h_post, h_res = mhc.pre(x, *projection)
        x, h, _, h_post, h_res = mhc.combine_pre(x, mx.tanh(h), h_post, h_res, *projection)
        out = mhc.combine(x, mx.tanh(h), h_post, h_res)
        return (mx.sin(out) * out).sum()

    every = (0, 1, 2, 3)
    total, wanted = mx.value_and_grad(run, every)(*arrays)
    own = [mx.split(one, group.size(), axis=-1)[group.rank()] for one in arrays[:2]]
    summed.clear()
    with channels_over(group), mhc.use_backend("mlx-metal-simulator"):
        value, pulled = mx.value_and_grad(run, every)(*own, *arrays[2:])
    seen = list(summed)
    error = apart(mx.distributed.all_sum(value, group=group), total)
    for k, (got, whole) in enumerate(zip(pulled, wanted, strict=True)):
        part = mx.split(whole, group.size(), axis=-1)[group.rank()] if k < 2 else whole
        error = max(error, apart(got, part))
    return {"error": error, "sums": seen}


def recomputed(group: Any) -> float:
    """Recompute a stack, and a sublayer, where the block is open in the loss alone."""
    stack = sharded(group)
    own = mx.split(hidden(), group.size(), axis=-1)[group.rank()]

    def of_stack(h: mx.array) -> mx.array:
        with channels_over(group):
            return loss_of(stack(h)) / group.size()

    _, gradients = nn.value_and_grad(stack, of_stack)(own)
    _, wanted = alone()
    got = flat(gradients)
    error = max(apart(got[k], own_of(wanted[k], got[k], group)) for k in got)

    mx.random.seed(6)
    arrays = [mx.random.normal(shape) for shape in ((3, n, C), (24, n, C), (3,), (24,))]

    def run(x: mx.array, phi: mx.array, *rest: mx.array) -> mx.array:
        h, h_post, h_res = mhc.pre(x, phi.reshape(24, -1), *rest, mhc.DEEPSEEK_V4)
        return mhc.combine(x, mx.tanh(h), h_post, h_res)

    def inside(*arrays: mx.array) -> mx.array:
        with channels_over(group):
            return checkpoint(run)(*arrays).square().sum()

    pulled = mx.grad(lambda *a: run(*a).square().sum(), (0, 1, 2, 3))(*arrays)
    parts = [mx.split(one, group.size(), axis=-1)[group.rank()] for one in arrays[:2]]
    for k, one in enumerate(mx.grad(inside, (0, 1, 2, 3))(*parts, *arrays[2:])):
        whole = pulled[k]
        part = mx.split(whole, group.size(), axis=-1)[group.rank()] if k < 2 else whole
        error = max(error, apart(one, part))
    return error


def refusals(group: Any) -> dict[str, str]:
    """Return the errors of calls that do not fit."""
    x, weights = mx.ones((2, n, C)), mx.ones((2, n))

    def said(function: Callable[[], Any]) -> str:
        try:
            with channels_over(group):
                mx.eval(function())
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error)
        return "not refused"

    def twice() -> Any:
        def norm(x: mx.array) -> mx.array:
            return (mx.grad(lambda a: mhc.aggregate(a, weights).square().sum())(x) ** 2).sum()

        return mx.grad(norm)(x)

    def through_vjp() -> Any:
        def norm(x: mx.array) -> mx.array:
            pulled = mhc.vjp("aggregate", (x, weights), (mx.ones((2, C)),))
            return (pulled[1] ** 2).sum()

        return mx.grad(norm)(x)

    def through_vjp_of_kernels() -> Any:
        with mhc.use_backend("mlx-metal-simulator"):
            return through_vjp()

    def quantised() -> nn.Module:
        head = GatedHead(64, n, 64)
        nn.quantize(head)
        return head

    return {
        "op": said(lambda: mhc.pre_scale(mx.ones((2, n * C)), weights)),
        "twice": said(twice),
        "twice, vjp": said(through_vjp),
        "twice, vjp of kernels": said(through_vjp_of_kernels),
        "stage": said(lambda: pipeline_value_and_grad(made(), loss_of, group)),
        "odd": said(lambda: shard_channels(HyperHead(C + 1), group)),
        "quantised": said(lambda: shard_channels(quantised(), group)),
    }


# ---- real models ---------------------------------------------------------------------------------


def models(group: Any) -> dict[str, float]:
    """Shard and pipeline small models of mlx-lm and mlx-vlm, accelerated and not."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from sharded_models import compared

    return compared(group)


# ---- training, with checkpoints ------------------------------------------------------------------


def train(group: Any, folder: Path, steps: int, fail_at: int | None) -> None:
    """Train with a sharded batch, from the checkpoint that is there, and keep one every 2 steps."""
    from mlx.optimizers import Adam
    from mlx.utils import tree_unflatten

    stack, optimizer, file = made(), Adam(1e-3), folder / "checkpoint.safetensors"
    done = 0
    folder.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        arrays, said = mx.load(str(file), return_metadata=True)
        done = int(said["step"])
        state = tree_unflatten(list(arrays.items()))
        stack.update(state["model"])
        optimizer.state = state["optimizer"]
    part = B // group.size()
    own = hidden()[group.rank() * part : (group.rank() + 1) * part]
    step = nn.value_and_grad(stack, lambda h: loss_of(stack(h)))
    for k in range(done + 1, steps + 1):
        if k == fail_at and group.rank() == group.size() - 1:
            print(f"rank {group.rank()} dies at {time.time():.1f}", flush=True)
            os._exit(7)
        loss, gradients = step(own)
        optimizer.update(stack, nn.average_gradients(gradients, group))
        loss = mx.distributed.all_sum(loss, group=group) / group.size()
        mx.eval(stack.parameters(), optimizer.state, loss)
        if group.rank() == 0:
            print(f"step {k} loss {loss.item():.6f}", flush=True)
            if k % 2 == 0:
                arrays = flat({"model": stack.parameters(), "optimizer": optimizer.state})
                new = file.with_name("new.safetensors")
                mx.save_safetensors(str(new), arrays, {"step": str(k)})
                new.replace(file)


def _counted() -> None:
    """Keep the bytes of each all_sum of the ops, as it is traced."""
    from mhc_core import sharding

    plain: Any = sharding.Group

    def counting(library: str, key: Any, size: int, total: Any) -> Any:
        def counted(part: mx.array) -> mx.array:
            summed.append(part.nbytes)
            return total(part)

        return plain(library, key, size, counted)

    sharding.Group = counting  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    """Print what was found, from the first process."""
    parser = argparse.ArgumentParser(description="Layouts over several processes, in MLX.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--fail-at", type=int)
    asked = parser.parse_args()
    group = mx.distributed.init(strict=True)
    if asked.checkpoint:
        train(group, asked.checkpoint, asked.steps, asked.fail_at)
        return
    _counted()
    found: dict[str, Any] = {
        "processes": group.size(),
        "data": data(group),
        "channels": channels(group),
        "channels, gated": gated(group),
        "channels, recomputed": recomputed(group),
        "pipeline": pipeline(group),
        "pipeline, single pass": pipeline(group, single_pass=True),
        "sums": traffic(group),
        "kernels": kernels(group),
        "refused": refusals(group),
    }
    if asked.all:
        found |= models(group)
    if group.rank() == 0:
        if asked.json:
            print(json.dumps(found), flush=True)
            return
        print(f"MLX {mx.__version__}, {group.size()} processes, ring, [{B}, {S}, {n}, {C}] float32")
        found.pop("refused")
        for name, one in found.items():
            print(f"{name:40} {f'error {one:.0e}' if isinstance(one, float) else one}")


if __name__ == "__main__":
    main()
