"""Print the time of accelerated models over that of the plain ones, on this machine.

python tests/models/speed.py [--families NAMES] [--hidden 1024] [--tokens 1,128] [--seconds 10]

Small models with random weights, in one process, called in turn; the medians' ratio, of the time
that passed and of the processors' time, which a loaded machine disturbs less. One token is decoded
with a cache that holds 32; more tokens are a prompt.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import small

import mhc_core as mhc
from mhc_core.mlx import accelerate


def cache_of(model: Any) -> Any:
    """Return a new cache of a model of either package."""
    return getattr(model, "language_model", model).make_cache()


def calls(model: Any, length: int) -> Callable[[], tuple[float, float]]:
    """Return a function that times one call with so many tokens."""
    ids, cache = small.tokens(1, length), cache_of(model)
    mx.eval(small.logits(model, small.tokens(1, 32), cache))

    def timed() -> tuple[float, float]:
        used = cache if length == 1 else cache_of(model)
        begin = time.perf_counter(), time.process_time()
        mx.eval(small.logits(model, ids, used))
        return time.perf_counter() - begin[0], time.process_time() - begin[1]

    return timed


def ratio(models: list[Any], length: int, seconds: float) -> str:
    """Return accelerated over plain, of both times, and what was measured."""
    timed = [calls(model, length) for model in models]
    times: list[list[tuple[float, float]]] = [[], []]
    for call in (*timed, *timed):
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for side in order:
            times[side].append(timed[side]())
    plain, fast = ([statistics.median(kind) for kind in zip(*t, strict=True)] for t in times)
    passed, used = (b / a for a, b in zip(plain, fast, strict=True))
    return f"{passed:.2f}, {used:.2f} ({1e3 * plain[0]:.1f} ms, {len(times[0])} pairs)"


def main() -> None:
    """Print one row per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(small.MAKE))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    lengths = [int(length) for length in args.tokens.split(",")]
    print("| family | " + " | ".join(f"{length} tokens" for length in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for name in args.families.split(","):
        models = [small.MAKE[name](hidden_size=args.hidden) for _ in range(2)]
        accelerate(models[1])
        with mhc.no_grad():
            cells = [ratio(models, length, args.seconds) for length in lengths]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
