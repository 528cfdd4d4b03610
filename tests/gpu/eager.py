"""Print what the CPU does for an eager call of one token, beside torch.add, in microseconds.

python tests/gpu/eager.py [--C 4096] [--calls 200] [--rounds 15] [--device cuda]

n = 4, bfloat16 streams, the backend that is chosen by itself. Calls are issued in a row, without
and with gradients; of each round's means, the median and the least: until all were issued, and in
brackets until the GPU was done.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import mhc_core as mhc

N, M = 4, 24


def calls(C: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return every call that is timed, by name."""
    torch.manual_seed(0)
    shapes = {"x": (1, N, C), "y": (1, C), "h_post": (1, N), "h_res": (1, N, N)}
    shapes |= {"phi": (M, N * C), "scale": (3,), "bias": (M,)}
    arrays = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    arrays |= {name: arrays[name].bfloat16() for name in ("x", "y")}
    leaves = {name: one.clone().requires_grad_() for name, one in arrays.items()}
    made: dict[str, Callable[[], Any]] = {}
    for words, given in (("", arrays), (", gradients", leaves)):
        y, (x, *rest) = given["y"], [given[name] for name in ("x", "phi", "scale", "bias")]
        several = [given[name] for name in ("x", "y", "h_post", "h_res")]

        def combine(several: Any = several) -> Any:
            return mhc.combine(*several)

        def pre(x: Any = x, rest: Any = rest) -> Any:
            return mhc.pre(x, *rest, mhc.DEEPSEEK_V4)

        def combine_pre(several: Any = several, rest: Any = rest) -> Any:
            return mhc.combine_pre(*several, *rest, mhc.DEEPSEEK_V4)

        made[f"torch.add{words}"] = lambda y=y: torch.add(y, y)
        made |= {f"combine{words}": combine, f"pre{words}": pre}
        made[f"combine_pre{words}"] = combine_pre
    for name in ("torch.add", "combine", "pre"):
        made[f"{name} backward"] = _backward(made[f"{name}, gradients"], name, leaves)
    return made


def _backward(function: Callable[[], Any], name: str, leaves: dict[str, Any]) -> Callable[[], Any]:
    """Return the backward of a call."""
    taken = {"torch.add": ("y",), "combine": ("x", "y", "h_post", "h_res")}
    given = [leaves[one] for one in taken.get(name, ("x", "phi", "scale", "bias"))]
    made = function()
    outputs = list(made) if isinstance(made, tuple) else [made]
    cotangents = [torch.ones_like(one) for one in outputs]
    return lambda: torch.autograd.grad(outputs, given, cotangents, retain_graph=True)


def round_of(call: Callable[[], Any], count: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Return the microseconds of a call: until all were issued, and until all were done."""
    wait()
    began = time.perf_counter()
    for _ in range(count):
        call()
    issued = time.perf_counter()
    wait()
    ended = time.perf_counter()
    return (issued - began) / count * 1e6, (ended - began) / count * 1e6


def main() -> None:
    """Print one line per call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    every = calls(args.C, args.device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in every}
    for call in every.values():
        round_of(call, 20, wait)
    for _ in range(args.rounds):
        for name, call in every.items():
            times[name].append(round_of(call, args.calls, wait))
    print(f"torch {torch.__version__}, {args.device}, C={args.C}")
    for name, found in times.items():
        issued, done = zip(*found, strict=True)
        print(
            f"{name:24} {statistics.median(issued):7.2f}, least {min(issued):7.2f}"
            f" ({statistics.median(done):7.2f})"
        )


if __name__ == "__main__":
    main()
