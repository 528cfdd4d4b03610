"""Many threads that take gradients on several backends at once, each right, for minutes.

``python tests/soak/threads.py --threads 16 --seconds 300``

Each thread calls `pre` and `combine` and takes their gradients on its own backend, with arrays of
its own, and compares them, to float32's rounding, with what one thread computed before by NumPy's
vjps.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mhc_core as mhc

BACKENDS = ("numpy", "jax", "mlx-compiled")
n, C, T = 4, 32, 6

Gradients = Callable[[], list[np.ndarray[Any, Any]]]


def arrays(seed: int) -> list[np.ndarray[Any, Any]]:
    """Return x, phi, scale, bias of one thread."""
    rng = np.random.default_rng(seed)
    m = n * n + 2 * n
    shapes = ((T, n, C), (m, n * C), (3,), (m,))
    return [rng.normal(0, 0.5, shape).astype(np.float32) for shape in shapes]


def by_numpy(given: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Return gradients of sum(combine(pre)^2) by the vjps."""
    x, *parameters = given
    h, h_post, h_res = mhc.pre(x, *parameters, mhc.DEEPSEEK_V4)
    out = mhc.combine(x, h, h_post, h_res)
    dx, dh, dpost, dres = mhc.vjp("combine", (x, h, h_post, h_res), 2 * out)
    more, *rest = mhc.vjp("pre", tuple(given), (dh, dpost, dres), variant=mhc.DEEPSEEK_V4)
    return [dx + more, *rest]


def loss(x: Any, *parameters: Any) -> Any:
    """Return sum(combine(pre)^2)."""
    h, h_post, h_res = mhc.pre(x, *parameters, mhc.DEEPSEEK_V4)
    return (mhc.combine(x, h, h_post, h_res) ** 2).sum()


def gradients(backend: str, seed: int) -> Gradients:
    """Return a function of nothing that takes a thread's gradients; made in that thread."""
    given = arrays(seed)
    if backend == "numpy":
        return lambda: by_numpy(given)
    if backend == "jax":
        import jax

        graded = jax.grad(loss, argnums=(0, 1, 2, 3))
        return lambda: [np.asarray(g) for g in graded(*map(jax.numpy.asarray, given))]
    import mlx.core as mx

    graded = mx.grad(loss, argnums=(0, 1, 2, 3))
    own = [mx.array(array) for array in given]
    return lambda: [np.array(g) for g in graded(*own)]


def run(threads: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Return how many gradients each backend took, and what went wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    until = time.monotonic() + seconds

    def work(index: int) -> None:
        backend = BACKENDS[index % len(BACKENDS)]
        try:
            take = gradients(backend, index)
            while time.monotonic() < until:
                for got, right in zip(take(), expected[index], strict=True):
                    apart = np.abs(got - right).max() / np.abs(right).max()
                    if not apart < 1e-5:
                        raise AssertionError(f"apart by {apart:.2g} of the largest number")
                counts[backend] += 1
        except Exception as error:  # each is a finding
            wrong.append(f"{backend}: {type(error).__name__}: {error}")

    expected = [by_numpy(arrays(index)) for index in range(threads)]
    started = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return counts, wrong


def main() -> int:
    """Run, print what happened, and return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=300)
    asked = parser.parse_args()
    counts, wrong = run(asked.threads, asked.seconds)
    taken = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{asked.threads} threads, {asked.seconds:g} s: {taken}; wrong {len(wrong)}")
    print("\n".join(sorted(set(wrong))))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
