"""The command ``mhc-mlx-bench``: mhc-mlx's benchmark of the static layer, by its options.

Each row is a line of JSON with mhc-mlx's names, added to the file as soon as it is measured, so an
interrupted run keeps what it has. ``*_ref`` rows are the formulas on ``mlx-compiled``, ``*_metal``
rows the selected backend. ``mhc bench`` measures more and compares with others.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

import mhc_core as mhc
from mhc_mlx.reference import activate_pre_post, mhc_forward_fused_reference

__all__ = ["main"]

MODES = ("throughput", "latency")
DTYPES = {  # with the names that mhc-mlx knows
    "float16": mx.float16,
    "fp16": mx.float16,
    "half": mx.float16,
    "bfloat16": mx.bfloat16,
    "bf16": mx.bfloat16,
    "float32": mx.float32,
    "fp32": mx.float32,
}
# Settings of mhc-mlx's own kernels: accepted and recorded, without effect, as in MHCLayer.
NUMBERS = {
    "threads-per-group": None,
    "hybrid-min-C": 8192,
    "latency-avoid-fused-n32-max-C": 2048,
    "latency-avoid-fused-B1-min-n": 16,
    "throughput-allow-fused-n32-min-B": 8,
    "throughput-allow-fused-n32-min-C": 4096,
    "throughput-allow-fused-n32-small-C": 512,
}
CHOICES = {
    "metal-dispatch": ("auto", "force"),
    "dispatch-policy": ("auto", "throughput", "latency"),
    "mix-kernel": ("auto", "1d", "2d"),
}
SWITCHES = ("hybrid-latency", "fused-backward")

Array = mx.array
Function = Callable[..., Any]


class Row(NamedTuple):
    """The measurement of one line: a function of arrays on one backend (None: the selection's)."""

    name: str
    backend: str | None
    function: Function
    arrays: tuple[Array, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the static layer and its parts, and add a line of JSON for each row."""
    asked = _parser().parse_args(arguments)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with asked.out.open(
        "a", encoding="utf-8"
    ):  # find out before a run whether the file can be written
        pass
    for mode in [asked.mode] if asked.mode else asked.modes:
        cases = itertools.product(asked.B, asked.n, asked.C, asked.dtypes)
        for number, (B, n, C, dtype) in enumerate(cases, start=1):
            case = {"B": B, "n": n, "C": C, "dtype": dtype, "seed": asked.seed + number}
            common = _common(asked, mode) | case
            for record in _records(asked, mode, case):
                _append(asked.out, common | record)
            print(f"[{mode}] case {number}: B={B} n={n} C={C} dtype={dtype}", flush=True)
    print(f"Done. Results written to {asked.out}")


def _append(file: Path, record: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, sort_keys=True) + "\n")


# ---- options -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhc-mlx-bench",
        description="mhc-mlx's benchmark of the static layer, by its options. mhc bench measures "
        "more and compares with others.",
    )
    several = "; several, separated by commas"
    option = parser.add_argument
    option("--B", type=_counts, default="1,8,32", help=f"batches{several}")
    option("--n", type=_counts, default="4,8,16,32", help=f"streams{several}")
    option("--C", type=_counts, default="256,512,1024,2048,4096", help=f"channels{several}")
    dtypes = "bfloat16,float16,float32"
    option("--dtypes", type=_dtypes, default=dtypes, help=f"of the streams{several}")
    option("--iters", type=_count, default=200, help="calls in a turn")
    option("--warmup", type=_natural, default=10, help="calls before the first turn")
    option("--repeats", type=_count, default=3, help="turns")
    option("--sinkhorn-iters", type=_count, default=20, help="Sinkhorn's iterations")
    option("--eps", type=float, default=1e-5, help="of the norm")
    option("--output-dtype", type=_output_dtype, default=None, help="of the outputs, or none")
    option("--queue-guard", type=_natural, default=50, help="most calls in flight; 0: no limit")
    option("--modes", type=_modes, default=",".join(MODES), help=f"{' or '.join(MODES)}{several}")
    option("--mode", choices=MODES, help="one mode, instead of --modes")
    option("--compiled", action=argparse.BooleanOptionalAction, default=True, help="mx.compile")
    option("--no-correctness", action="store_true", help="do not compare the two sides first")
    option("--with-backward", action="store_true", help="rows with gradients as well")
    option("--seed", type=int, default=0, help="of the random arrays")
    option("--out", type=Path, default=Path("results.jsonl"), help="the file to add lines to")
    unused = "recorded; it chose among mhc-mlx's kernels"
    for name, default in NUMBERS.items():
        option(f"--{name}", type=int, default=default, help=unused)
    for name, choices in CHOICES.items():
        option(f"--{name}", choices=choices, default="auto", help=unused)
    for name in SWITCHES:
        option(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=unused)
    return parser


def _natural(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of at least 0")
    return int(word)


def _count(word: str) -> int:
    if _natural(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of at least 1")
    return int(word)


def _words(text: str) -> list[str]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} is empty; needs words separated by commas")
    return words


def _counts(text: str) -> list[int]:
    return [_count(word) for word in _words(text)]


def _dtypes(text: str) -> list[str]:
    for word in _words(text):
        if word not in DTYPES:
            known = ", ".join(DTYPES)
            raise argparse.ArgumentTypeError(f"{word!r} is no dtype; needs some of {known}")
    return [_name(DTYPES[word]) for word in _words(text)]


def _output_dtype(text: str) -> str | None:
    if text.strip().lower() in ("", "none", "null"):
        return None
    (*more, dtype) = _dtypes(text)
    if more:
        raise argparse.ArgumentTypeError(f"{text!r} is several dtypes; needs one, or none")
    return dtype


def _modes(text: str) -> list[str]:
    for word in _words(text):
        if word not in MODES:
            raise argparse.ArgumentTypeError(f"{word!r} is no mode; needs {' or '.join(MODES)}")
    return _words(text)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _common(asked: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Return the fields that every line of a run has, by mhc-mlx's names."""
    recorded = (*NUMBERS, *CHOICES, *SWITCHES, "compiled", "with-backward", "sinkhorn-iters")
    words = {name.replace("-", "_") for name in (*recorded, "iters", "warmup", "repeats")}
    return {
        **{word: getattr(asked, word) for word in (*words, "queue_guard")},
        "mode": mode,
        "output_dtype": asked.output_dtype or "none",
        "device": str(mx.default_device()),
        "machine": platform.machine() or "unknown",
        "chip": platform.processor() or platform.machine() or "unknown",
        "macos_version": platform.mac_ver()[0] or platform.platform(),
        "mlx_version": version("mlx"),
        "mhc_core_version": version("mhc-core"),
    }


# ---- rows ----------------------------------------------------------------------------------------


def _records(
    asked: argparse.Namespace, mode: str, case: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the record of each row, measured one after another."""
    rows = list(_rows(asked, case))
    if not asked.no_correctness:
        layers = [row for row in rows if row.name.startswith("layer_")][:2]
        reference, result = (_called(row)(*row.arrays) for row in layers)
        yield _correctness(reference, result, case["dtype"])
    for row in rows:
        turns = _turns(asked, mode, row)
        low, middle, high = np.percentile(turns, [10, 50, 90])
        yield {
            "benchmark": row.name,
            "backend": row.backend or "selected",
            "time_s_p10": float(low),
            "time_s_median": float(middle),
            "time_s_p90": float(high),
        }


def _rows(asked: argparse.Namespace, case: Mapping[str, Any]) -> Iterator[Row]:
    mx.random.seed(case["seed"])
    B, n, C = (case[size] for size in ("B", "n", "C"))
    x = mx.random.normal((B, n, C)).astype(DTYPES[case["dtype"]])
    raw = (mx.random.normal((n,)), mx.random.normal((n,)), mx.random.normal((n, n)))
    weight = mx.random.uniform(0.5, 1.5, (C,))
    out = DTYPES[asked.output_dtype] if asked.output_dtype else None

    def matrix(logits: Array) -> Array:
        return mhc.sinkhorn(logits, asked.sinkhorn_iters, first="rows")

    def given(result: Array) -> Array:
        return result if out is None else result.astype(out)

    def layer(*arrays: Array) -> Array:
        return given(mhc.static_layer(*arrays, eps=asked.eps, iterations=asked.sinkhorn_iters))

    def fused(x: Array, M: Array, H_pre: Array, H_post: Array, weight: Array) -> Array:
        return given(mhc_forward_fused_reference(x, M, H_pre, H_post, weight, asked.eps))

    def loss(*arrays: Array) -> Array:
        return mx.sum(layer(*arrays))

    mapped = (x, matrix(raw[2]), *activate_pre_post(*raw[:2]), weight)
    whole = (x, *raw, weight)
    gradients = cast("Function", mx.value_and_grad(loss, argnums=list(range(len(whole)))))
    measured: list[tuple[str, Function, tuple[Array, ...]]] = [
        ("sinkhorn", matrix, (raw[2],)),
        ("fused", fused, mapped),
        ("layer", layer, whole),
    ]
    if asked.with_backward:
        measured.append(("layer_backward", gradients, whole))
    mx.eval(*whole, *mapped)
    for name, function, arrays in measured:
        yield Row(f"{name}_ref", "mlx-compiled", function, arrays)
        yield Row(f"{name}_metal", None, function, arrays)


def _called(row: Row) -> Function:
    """Return the row's function on its backend."""

    def call(*arrays: Array) -> Any:
        if row.backend is None:
            return row.function(*arrays)
        with mhc.use_backend(row.backend):
            return row.function(*arrays)

    return call


def _correctness(reference: Array, result: Array, dtype: str) -> dict[str, Any]:
    wide, other = reference.astype(mx.float32), result.astype(mx.float32)
    apart = _largest(wide - other)
    return {
        "benchmark": "correctness",
        "input_dtype": dtype,
        "accum_dtype": "float32",
        "compare_dtype": "float32",
        "max_abs_error": apart,
        "rel_error": apart / max(_largest(wide), 1e-8),
    }


def _largest(array: Array) -> float:
    return cast("float", mx.max(mx.abs(array)).item())


# ---- timing --------------------------------------------------------------------------------------


def _turns(asked: argparse.Namespace, mode: str, row: Row) -> list[float]:
    """Return the seconds per call of each repetition."""
    function = mx.compile(_called(row)) if asked.compiled else _called(row)
    for _ in range(asked.warmup):
        mx.eval(function(*row.arrays))
    mx.synchronize()
    return [_turn(asked, mode, function, row.arrays) for _ in range(asked.repeats)]


def _turn(
    asked: argparse.Namespace, mode: str, function: Function, arrays: tuple[Array, ...]
) -> float:
    started = time.perf_counter()
    for number in range(1, asked.iters + 1):
        result = function(*arrays)
        if mode == "latency":
            mx.eval(result)
            continue
        mx.async_eval(result)
        if asked.queue_guard and number % asked.queue_guard == 0:
            mx.synchronize()
    mx.synchronize()
    return (time.perf_counter() - started) / asked.iters


if __name__ == "__main__":
    main()
