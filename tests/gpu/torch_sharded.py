"""Run a sublayer of mhc-torch on one GPU and on all of the host: python tests/gpu/torch_sharded.py

Needs two NVIDIA GPUs or more; ``--device cpu --processes 2`` tries it by gloo. Prints, for sharded
tokens and for sharded channels, the all-reduces of a step with their bytes, the largest distance of
its gradients from those of one GPU, and the time of a step on one GPU and on all. Tokens are
measured twice: all devices share one GPU's tokens, and each has as many.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from mhc_torch.distributed import channels_over
from torch import Tensor

import mhc_core as mhc

N = 4
CHANNELS = "channels, shared"
LAYOUTS = {"tokens, shared": 1, "tokens, as many on each": 0, CHANNELS: 1}  # 0: all devices' times


def arrays_of(T: int, C: int, device: str) -> list[Tensor]:
    """Return streams [T, n, C] in bfloat16, phi [m, n, C], scale and bias."""
    generator = torch.Generator().manual_seed(0)
    m = mhc.DEEPSEEK_V4.columns(N)
    x = torch.randn(T, N, C, generator=generator)
    phi = torch.randn(m, N, C, generator=generator) / 64
    made = [x.bfloat16(), phi, torch.ones(3), torch.zeros(m)]
    return [one.to(device) for one in made]


def sublayer(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Run pre and combine, around a layer without parameters; return a sum of the result."""
    ops: Any = mhc
    h, h_post, h_res = ops.pre(x, phi.flatten(1), scale, bias, mhc.DEEPSEEK_V4)
    out = ops.combine(x, torch.tanh(h), h_post, h_res).float()
    return (out.sin() * out).sum()


def step_of(given: list[Tensor], group: Any, summed: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a step: its gradients, those of ``summed`` added up over all devices."""

    def step() -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            if group is not None:
                stack.enter_context(channels_over(group))
            gradients = torch.autograd.grad(sublayer(*given), given)
        for one, gradient in zip(given, gradients, strict=True):
            if any(one is other for other in summed):
                dist.all_reduce(gradient)
        return list(gradients)

    return step


def milliseconds(step: Callable[[], Any], wait: Callable[[], None], rounds: int = 9) -> float:
    """Return the median time of a step, with some under way."""
    calls = 10
    step()
    wait()
    found: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        wait()
        found.append((time.perf_counter() - begin) / calls * 1e3)
    return statistics.median(found)


def part_of(array: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return a device's part of an array."""
    return array.chunk(size, dim)[rank].contiguous()


def run(rank: int, size: int, folder: str, asked: argparse.Namespace) -> None:
    """Run as one of the devices; the first prints."""
    cuda = asked.device == "cuda"
    device = f"cuda:{rank}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", f"file://{folder}/store", rank=rank, world_size=size
    )
    wait = torch.cuda.synchronize if cuda else lambda: None
    plain: Any = dist.all_reduce
    sums: list[int] = []

    def counted(array: Tensor, **options: Any) -> Any:
        sums.append(array.nbytes)
        return plain(array, **options)

    dist.all_reduce = counted
    alone = [one.requires_grad_() for one in arrays_of(asked.T, asked.C, device)]
    own = milliseconds(step_of(alone, None, []), wait)
    if rank == 0:
        name = torch.cuda.get_device_name() if cuda else "CPU"
        print(f"torch {torch.__version__}, {size} x {name}, T={asked.T}, n={N}, C={asked.C}")
        print(f"one device: {own:.3f} ms", flush=True)
    for layout, times in LAYOUTS.items():
        times = times or size
        arrays = [one.requires_grad_() for one in arrays_of(asked.T * times, asked.C, device)]
        wanted = torch.autograd.grad(sublayer(*arrays), arrays)
        by_channels = layout == CHANNELS
        dims = (2, 2, None, None) if by_channels else (0, None, None, None)
        given = [
            (one if dim is None else part_of(one.detach(), dim, rank, size)).requires_grad_()
            for one, dim in zip(arrays, dims, strict=True)
        ]
        group = dist.group.WORLD if by_channels else None
        step = step_of(given, group, [] if by_channels else given[1:])
        sums.clear()
        got, exchanged = step(), list(sums)
        errors = [
            float((a - (b if dim is None else part_of(b, dim, rank, size))).abs().max())
            / float(b.abs().max())
            for a, b, dim in zip(got, wanted, dims, strict=True)
        ]
        took = milliseconds(step, wait)
        if rank == 0:
            print(
                f"{layout}: {took:.3f} ms, efficiency {own * times / size / took:.2f}, distance "
                f"{max(errors):.1e}, all-reduces {exchanged}",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as in plugins/mhc-torch/tests/sharded.py


def main() -> None:
    """Start a process for each device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, default=4096)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--processes", type=int)
    asked = parser.parse_args()
    size = asked.processes or torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        spawn = torch.multiprocessing.get_context("spawn").Process
        others = [spawn(target=run, args=(rank, size, folder, asked)) for rank in range(size)]
        for other in others:
            other.start()
        for other in others:
            other.join()
    assert all(other.exitcode == 0 for other in others)


if __name__ == "__main__":
    main()
