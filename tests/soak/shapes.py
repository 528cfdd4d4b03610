"""Many calls over many shapes: memory must stay flat once every shape has been seen.

``python tests/soak/shapes.py --calls 20000 --shapes 500 --backend mlx-compiled --op combine``

``pre`` has more code to keep for a shape, and takes compilers seconds for each; ``combine`` has
little of both.

Memory is the process's resident set after each tenth of the calls. It may grow in the first pass
over the shapes: a backend caches what it makes for a shape, JAX 8.7 MiB for each.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
from pathlib import Path

import numpy as np

import mhc_core as mhc

MEBI = 2**20


def resident() -> float:
    """Return the process's resident memory in MiB (Linux)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBI


def shapes(count: int, seed: int) -> list[tuple[int, int, int]]:
    """Return different sizes T, n, C."""
    rng = random.Random(seed)
    found: dict[tuple[int, int, int], None] = {}
    while len(found) < count:
        found[rng.randint(0, 40), rng.randint(1, 8), rng.randint(1, 96)] = None
    return list(found)


def call(backend: str, op: str, T: int, n: int, C: int, rng: np.random.Generator) -> None:
    """Compute one op and its gradients."""
    m = n * n + 2 * n
    sizes, static = {
        "pre": (((T, n, C), (m, n * C), (3,), (m,)), {"variant": mhc.DEEPSEEK_V4}),
        "combine": (((T, n, C), (T, C), (T, n), (T, n, n)), {}),
    }[op]
    arrays = tuple(rng.normal(0, 0.5, size).astype(np.float32) for size in sizes)
    with mhc.use_backend(backend):
        outputs = getattr(mhc, op)(*arrays, **static)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ones = tuple(np.ones(out.shape, np.float32) for out in outputs)
        taken = mhc.vjp(op, arrays, ones, **static)
    for array in (*outputs, *taken):
        if not np.isfinite(np.asarray(array)).all():
            raise AssertionError(f"{backend}: {op} is not finite at T={T}, n={n}, C={C}")


def main() -> int:
    """Run, print memory along the way, and return 1 if it grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--shapes", type=int, default=500)
    parser.add_argument("--backend", default="mlx-compiled")
    parser.add_argument("--op", default="pre", choices=("pre", "combine"))
    parser.add_argument("--allowed", type=float, default=32, help="MiB after every shape was seen")
    asked = parser.parse_args()
    every, rng = shapes(asked.shapes, 0), np.random.default_rng(0)
    for sizes in every:
        call(asked.backend, asked.op, *sizes, rng)
    seen = [resident()]
    for number in range(asked.shapes, asked.calls):
        call(asked.backend, asked.op, *every[number % len(every)], rng)
        if number % (asked.calls // 10) == 0:
            seen.append(resident())
    seen.append(resident())
    grown = seen[-1] - seen[0]
    along = " ".join(f"{value:.0f}" for value in seen)
    ran = f"{asked.calls} calls, {asked.shapes} shapes"
    print(f"{asked.backend}, {asked.op}: {ran}, MiB {along}: {grown:+.1f}")
    return grown > asked.allowed


if __name__ == "__main__":
    sys.exit(main())
