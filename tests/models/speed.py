"""Print the time of accelerated models over that of the plain ones, on this machine.

python tests/models/speed.py [--families NAMES] [--hidden 1024] [--tokens 1,128] [--seconds 10]
                             [--dtype float32]

Small models with random weights, in one process, called in turn; the ratio of the medians of the
processors' time, which other programs disturb least, or on a GPU of the wall clock's. After it, as
the measure of the noise, the ratio of two plain models. One token is decoded with a cache that
holds 32; more are a prompt. In bfloat16, what a model's package keeps in float32 stays so; MLX's
GatherMM, which chooses experts, takes float32 alone on a CPU. Each length is measured for so many
seconds, and at least six times: ``--seconds 0`` is the shortest run. What fails is one cell.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import small
from mlx.utils import tree_map_with_path

import mhc_core as mhc
from mhc_core.mlx import accelerate

clock = time.perf_counter if mx.default_device() == mx.gpu else time.process_time


def cast(model: Any, dtype: mx.Dtype) -> Any:
    """Cast a model's weights as its package's converter does."""
    casts = getattr(model, "cast_predicate", lambda _: True)

    def of(path: str, value: mx.array) -> mx.array:
        narrow = mx.issubdtype(value.dtype, mx.floating) and casts(path)
        return value.astype(dtype) if narrow else value

    model.update(tree_map_with_path(of, model.parameters()))
    mx.eval(model.parameters())
    return model


def cache_of(model: Any) -> Any:
    """Return a new cache of a model of either package."""
    return getattr(model, "language_model", model).make_cache()


def calls(model: Any, length: int) -> Callable[[], float]:
    """Return a function that times one call with so many tokens."""
    ids, cache = small.tokens(1, length), cache_of(model)
    mx.eval(small.logits(model, small.tokens(1, 32), cache))

    def timed() -> float:
        used = cache if length == 1 else cache_of(model)
        begin = clock()
        mx.eval(small.logits(model, ids, used))
        return clock() - begin

    return timed


def ratio(models: list[Any], length: int, seconds: float) -> str:
    """Return accelerated over plain, plain over plain, and what was measured."""
    timed = [calls(model, length) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for call in (*timed, *timed):
        call()
    end, first = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or first < 6:
        for k in range(len(models)):
            side = (first + k) % len(models)
            times[side].append(timed[side]())
        first += 1
    plain, again, fast = map(statistics.median, times)
    return f"{fast / plain:.2f} (plain {again / plain:.2f}; {1e3 * plain:.1f} ms, {first} times)"


def main() -> None:
    """Print one row per family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default=",".join(small.MAKE))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", default="1,128")
    parser.add_argument("--seconds", type=float, default=10, help="for each number of tokens")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args()
    lengths = [int(length) for length in args.tokens.split(",")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "mlx-vlm"))
    print(f"{packages}, {mx.default_device()}, C = {args.hidden}, {args.dtype}\n")
    print("| family | " + " | ".join(f"{length} tokens" for length in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|", flush=True)
    for name in args.families.split(","):
        print(f"| {name} | {row(name, args, lengths)} |", flush=True)


def row(name: str, args: argparse.Namespace, lengths: list[int]) -> str:
    """Return a family's ratios, or the error that stopped it."""
    try:
        dtype = getattr(mx, args.dtype)
        models = [cast(small.MAKE[name](hidden_size=args.hidden), dtype) for _ in range(3)]
        accelerate(models[-1])
    except Exception as error:  # the other families still run
        return failed(error)
    with mhc.no_grad():
        return " | ".join(cell(models, length, args.seconds) for length in lengths)


def cell(models: list[Any], length: int, seconds: float) -> str:
    """Return the ratio at one length, or the error that stopped it."""
    try:
        return ratio(models, length, seconds)
    except Exception as error:  # the other lengths still run
        return failed(error)


def failed(error: Exception) -> str:
    """Return an error in one line: a compiler's has the whole source."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
