"""Streams of more than 2^31 numbers on a GPU: offsets must be 64-bit, in every kernel.

``python tests/soak/beyond_int32.py`` (an NVIDIA GPU with 100 GB, MLX's CUDA build)

combine, pre, combine_pre and their vjps in bfloat16 with T n C just above 2^31. A token's results
depend on no other token, so those of sampled tokens at both ends and in the middle must be bit for
bit those of a call with these tokens alone (gradients of shared parameters, which are sums over
all tokens, must be finite).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

import mhc_core as mhc

n = 4
V4 = mhc.DEEPSEEK_V4


def draw(T: int, C: int) -> dict[str, Any]:
    """Return arrays for T tokens; the streams are drawn a part at a time."""
    m, part = n * n + 2 * n, 1 << 14

    def tokens(*shape: int, dtype: Any = mx.float32) -> Any:
        parts = []
        for first in range(0, T, part):
            count = min(part, T - first)
            parts.append(mx.random.normal((count, *shape)).astype(dtype))
            mx.eval(parts[-1])
        whole = mx.concatenate(parts)
        mx.eval(whole)
        return whole

    return {
        "x": tokens(n, C, dtype=mx.bfloat16),
        "y": tokens(C, dtype=mx.bfloat16),
        "h_post": mx.sigmoid(tokens(n)),
        "h_res": mx.softmax(tokens(n, n), axis=-1),
        "phi": mx.random.normal((m, n * C)) / math.sqrt(n * C),
        "scale": mx.random.normal((3,)),
        "bias": mx.random.normal((m,)),
    }


OPS: dict[str, tuple[str, ...]] = {
    "combine": ("x", "y", "h_post", "h_res"),
    "pre": ("x", "phi", "scale", "bias"),
    "combine_pre": ("x", "y", "h_post", "h_res", "phi", "scale", "bias"),
}
PER_TOKEN = {"x", "y", "h_post", "h_res"}


def call(op: str, arrays: Sequence[Any], back: bool) -> list[Any]:
    """Return an op's outputs, or the gradients of its first output's sum with itself."""
    static = {} if op == "combine" else {"variant": V4}
    outputs = getattr(mhc, op)(*arrays, **static)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not back:
        return outputs
    return list(mhc.vjp(op, tuple(arrays), tuple(outputs), **static))


def check(op: str, arrays: dict[str, Any], sample: Any, back: bool) -> str:
    """Return "right", or what is wrong."""
    names = OPS[op]
    whole = call(op, [arrays[name] for name in names], back)
    mx.eval(whole)
    alone = call(op, [arrays[k][sample] if k in PER_TOKEN else arrays[k] for k in names], back)
    mx.eval(alone)
    for k, (large, small) in enumerate(zip(whole, alone, strict=True)):
        if back and names[k] not in PER_TOKEN:
            if not mx.isfinite(large).all().item():
                return f"gradient of {names[k]} is not finite"
        elif not mx.array_equal(large[sample], small).item():
            apart = mx.abs(large[sample].astype(mx.float32) - small.astype(mx.float32)).max()
            return f"result {k} is {apart.item():.2g} from that of its token alone"
    return "right"


def main() -> int:
    """Run every op and return 1 if any was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--tokens", type=int, help="just above 2^31 / (n C) if left out")
    parser.add_argument("--backend", default="mlx-cuda")
    asked = parser.parse_args()
    T = asked.tokens or 2**31 // (n * asked.C) + 1031
    mx.random.seed(0)
    arrays = draw(T, asked.C)
    ends = [0, 1, 2, T // 2, T - 1032, T - 1031, T - 1030, T - 2, T - 1]
    sample = mx.array([k for k in ends if 0 <= k < T])
    results: dict[str, str] = {}
    with mhc.use_backend(asked.backend):
        for op in OPS:
            for back in (False, True):
                label = f"vjp of {op}" if back else op
                results[label] = check(op, arrays, sample, back)
                print(f"T={T}, T n C = 2^31 + {T * n * asked.C - 2**31}: {label}: {results[label]}")
                sys.stdout.flush()
                mx.clear_cache()
    return any(result != "right" for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
