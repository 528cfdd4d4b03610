"""Measure on an NVIDIA GPU what MLX itself costs around the kernels.

``python tests/gpu/mlx_costs.py`` runs:

- decode: a chain of 86 combine_pre of one token in one ``mx.compile``, as it is, with an array for
  every output, and both of empty kernels with the same inputs and outputs, which is the cost of
  launching them; the chain again with MLX's limits of operations and bytes in a CUDA graph
- train: a sublayer forward and backward, compiled and not
- cold: the first call of a new process, and what of it is compiling, twice
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

N, C, LAYERS, ROUNDS = 4, 4096, 86, 15
LIMITS = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")


def main() -> None:
    """Run the parts, each in a process of its own."""
    if len(sys.argv) > 1:
        globals()[sys.argv[1]](*sys.argv[2:])
        return
    for which in ("kernels", "apart", "empty", "empty_apart"):
        run("decode", which)
    for limit, values in zip(LIMITS, ((5, 50, 500), (10, 100, 1000)), strict=True):
        for value in values:
            run("decode", "kernels", **{limit: str(value)})
    for T in (64, 4096):
        run("train", str(T))
    for _ in range(2):
        run("cold")


def run(*words: str, **environment: str) -> None:
    """Run a part of this script and print what it prints, with its environment."""
    done = subprocess.run(
        [sys.executable, __file__, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    told = done.stdout.strip() or done.stderr.strip()[-400:]
    print(*words, *(f"{k}={v}" for k, v in environment.items()), "|", told, flush=True)


def drawn(T: int) -> tuple[Any, ...]:
    """Return streams, a layer's output, its mappings and the parameters of the next."""
    import mlx.core as mx

    mx.random.seed(1)
    x, y = mx.random.normal((T, N, C)), mx.random.normal((T, C))
    h_post, h_res = mx.random.normal((T, N)), mx.random.uniform(shape=(T, N, N)) / N
    phi = mx.random.normal((N * N + 2 * N, N * C)) / 100
    made = x.astype(mx.bfloat16), y.astype(mx.bfloat16), h_post, h_res, phi
    arrays = (*made, mx.ones(3), mx.zeros(N * N + 2 * N))
    mx.eval(arrays)
    return arrays


def decode(which: str) -> None:
    """Print the time of a sublayer in a chain, in microseconds."""
    import mlx.core as mx

    import mhc_core as mhc
    from mhc_backends.kernels.functions import Ops
    from mhc_backends.kernels.mlx import Kernels
    from mhc_backends.mlx_cuda.compiled import finish
    from mhc_backends.mlx_cuda.launcher import cuda_kernel
    from mhc_backends.mlx_cuda.packed import Packed

    def empty(**texts: Any) -> Any:
        return cuda_kernel(**{**texts, "source": "", "header": ""})

    launcher = empty if which.startswith("empty") else cuda_kernel
    memory, x = 227 * 1024, drawn(1)
    kernels = Kernels(launcher, "cuda", memory, finish)
    apart = Ops(kernels, mx.compile)
    own = apart if which.endswith("apart") else Ops(kernels, mx.compile, Packed(kernels))
    given, parameters = x[:4], x[4:]

    def chain_of(ops: Ops) -> Callable[..., Any]:
        def chain(x: Any, y: Any, h_post: Any, h_res: Any) -> Any:
            for _ in range(LAYERS):
                x, y, _, h_post, h_res = ops.combine_pre(
                    x, y, h_post, h_res, *parameters, variant=mhc.DEEPSEEK_V4
                )
            return x, y, h_post, h_res

        return mx.compile(chain)

    with mhc.no_grad():
        compiled = chain_of(own)
        times = timed(lambda: compiled(*given), 4)
        pairs = zip(compiled(*given), chain_of(apart)(*given), strict=True)
        same = all(mx.array_equal(one, other, equal_nan=True).item() for one, other in pairs)
    print(f"{times / LAYERS:.2f} us a sublayer; the same bits as apart: {same}")


def train(T: str) -> None:
    """Print the times of a sublayer's forward and backward, compiled and not."""
    import mlx.core as mx

    import mhc_core as mhc

    x, _, _, _, phi, scale, bias = drawn(int(T))
    g = mx.random.normal(x.shape).astype(x.dtype)

    def loss(x: Any, phi: Any, scale: Any, bias: Any) -> Any:
        h, h_post, h_res, same = mhc.pre_residual(
            x, phi, scale, bias, mhc.DEEPSEEK_V4, backend="mlx-cuda"
        )
        new = mhc.combine(same, mx.tanh(h), h_post, h_res, backend="mlx-cuda")
        return (new * g).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    compiled = mx.compile(gradient)
    count = 20 if int(T) > 1000 else 60
    plain = timed(lambda: gradient(x, phi, scale, bias), count)
    fused = timed(lambda: compiled(x, phi, scale, bias), count)
    print(f"compiled {fused:.0f} us, not compiled {plain:.0f} us, ratio {plain / fused:.2f}")


def timed(call: Callable[[], Any], count: int) -> float:
    """Return the median time of a call among ``count`` in a row, in microseconds."""
    import mlx.core as mx

    mx.eval(call())
    times: list[float] = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        mx.eval([call() for _ in range(count)])
        mx.synchronize()
        times.append((time.perf_counter() - begin) / count * 1e6)
    return statistics.median(times)


def cold() -> None:
    """Print the seconds until the first results of a new process, and of a second call."""
    begin = time.perf_counter()
    import mlx.core as mx

    import mhc_core as mhc

    words = [f"import {time.perf_counter() - begin:.1f} s"]
    for T in (64, 1):
        x, y, h_post, h_res, *parameters = drawn(T)
        for turn in ("first", "second"):
            begin = time.perf_counter()
            with mhc.no_grad():
                made = mhc.pre(x, *parameters, mhc.DEEPSEEK_V4, backend="mlx-cuda")
                mx.eval(made)
                made = mhc.combine_pre(
                    x, y, h_post, h_res, *parameters, mhc.DEEPSEEK_V4, backend="mlx-cuda"
                )
                mx.eval(made)
            words.append(f"T={T} {turn} {time.perf_counter() - begin:.2f} s")
    print(*words, sep=", ")


if __name__ == "__main__":
    main()
