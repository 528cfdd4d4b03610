"""Record the launches of the CUDA kernels, without a GPU and without MLX's CUDA build.

``python tests/gpu/record.py launches.json --op pre --T 1,64`` runs the ops with a launcher that
records: each launch with its text, its template arguments and its shapes, and for each input the
launch and output that it comes from. ``replay.py`` runs the file on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

import mhc_core as mhc
from mhc_backends.kernels.functions import Ops
from mhc_backends.kernels.mlx import Kernels

MEMORY = 227 * 1024  # bytes of shared memory that a block of an H200 may have
MARKS = 256  # bfloat16 has all integers up to here


def main() -> None:
    """Record what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--op", default="pre,combine_pre,combine")
    parser.add_argument("--T", default="1,64,4096")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vjp", action="store_true", help="record the vjps, not the forwards")
    given = parser.parse_args()
    recorder = Recorder()
    for op in given.op.split(","):
        for T in map(int, given.T.split(",")):
            recorder.run(op, T, given.n, given.C, given.dtype, given.vjp)
    content = {"texts": recorder.texts, "calls": recorder.calls}
    given.file.write_text(json.dumps(content), encoding="utf-8")
    count = sum(len(call["launches"]) for call in recorder.calls)
    print(f"{len(recorder.calls)} calls, {count} launches, {len(recorder.texts)} texts")


class Recorder:
    """A launcher of kernels that records.

    Its outputs, and the arrays that it is given, hold a number each that names them. It survives
    reshapes and casts, so an input of a later launch shows where it comes from.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.calls: list[dict[str, Any]] = []
        self._mark = 0
        self._ops = Ops(Kernels(self.launcher, "cuda", MEMORY))

    def run(self, op: str, T: int, n: int, C: int, dtype: str, vjp: bool) -> None:
        """Record one call of an op."""
        arrays, static = _arguments(op, T, n, C, getattr(mx, dtype))
        tag = f"{op}{' vjp' if vjp else ''} {dtype} T={T} n={n} C={C}"
        self.calls.append({"tag": tag, "launches": []})
        self._mark = 0
        primals = [self._marked(shape, kind) for shape, kind in arrays]
        if not vjp:
            with mhc.no_grad():
                made = getattr(self._ops, op)(*primals, **static)
            mx.eval(made)
            return
        outputs = getattr(self._ops, op)(*primals, **static)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # of their own: an output may be a primal, whose second reading is from the cache
        cotangents = [self._marked(one.shape, one.dtype) for one in outputs]
        mx.eval(self._ops.vjp(op, primals, cotangents, **static))

    def _marked(self, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        self._mark += 1
        assert self._mark < MARKS
        return mx.full(shape, self._mark, dtype)

    def _text(self, text: str) -> str:
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.texts[key] = text
        return key

    def launcher(
        self,
        *,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str,
        shared_memory: int = 0,
    ) -> Callable[..., list[mx.array]]:
        """Return a function that records a launch; the signature is ``mx.fast.cuda_kernel``'s."""

        def launch(
            *,
            inputs: Sequence[mx.array],
            template: Sequence[tuple[str, int]],
            grid: Sequence[int],
            threadgroup: Sequence[int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            made = [
                self._marked(shape, dtype)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            self.calls[-1]["launches"].append(
                {
                    "name": name,
                    "inputs": list(map(_described, input_names, inputs)),
                    "outputs": list(map(_described, output_names, made)),
                    "template": [[word, value] for word, value in template],
                    "grid": list(grid),
                    "threadgroup": list(threadgroup),
                    "memory": shared_memory,
                    "source": self._text(source),
                    "header": self._text(header),
                }
            )
            return made

        return launch


def _described(name: str, array: mx.array) -> dict[str, Any]:
    first = array.reshape(-1)[0].astype(mx.float32).item() if array.size else 0
    dtype = str(array.dtype).removeprefix("mlx.core.")
    return {"name": name, "dtype": dtype, "shape": list(array.shape), "mark": first}


def _arguments(
    op: str, T: int, n: int, C: int, dtype: mx.Dtype
) -> tuple[list[tuple[tuple[int, ...], mx.Dtype]], dict[str, Any]]:
    """Return the shapes and dtypes of an op's arrays, and its static arguments."""
    M, plain = n * n + 2 * n, mx.float32
    x, y = ((T, n, C), dtype), ((T, C), dtype)
    h_pre, h_res = ((T, n), plain), ((T, n, n), plain)
    projection = [((M, n * C), plain), ((3,), plain), ((M,), plain)]
    variant = {"variant": mhc.DEEPSEEK_V4}
    norm, normed = ((C,), dtype), {**variant, "h_norm_eps": 1e-6, "h_raw": False}
    arguments: dict[str, tuple[list[tuple[tuple[int, ...], mx.Dtype]], dict[str, Any]]] = {
        "aggregate": ([x, h_pre], {}),
        "combine": ([x, y, h_pre, h_res], {}),
        "combine_pre": ([x, y, h_pre, h_res, *projection], variant),
        "combine_pre_norm": ([x, y, h_pre, h_res, *projection, norm], normed),
        "head": ([x, ((n, n * C), plain), ((1,), plain), ((n,), plain)], variant),
        "mappings": ([x, *projection], variant),
        "pre": ([x, *projection], variant),
        "pre_norm": ([x, *projection, norm], normed),
        "pre_residual": ([x, *projection], variant),
        "pre_scale": ([x, h_pre], {}),
        "residual_add_aggregate": ([x, x, h_pre], {}),
        "rms_norm": ([y, ((C,), plain)], {"eps": 1e-5}),
        "sinkhorn": ([h_res], {"iterations": 20, "eps": 1e-6, "first": "columns"}),
        "static_layer": (
            [x, ((n,), plain), ((n,), plain), ((n, n), plain), ((C,), plain)],
            {"eps": 1e-5, "iterations": 20},
        ),
    }
    return arguments[op]


if __name__ == "__main__":
    main()
