"""Print the times of PyTorch's implementations of mHC beside this project's, in one run on one GPU.

python tests/gpu/peers.py [--sides ours,liger] [--C 4096,7168] [--T 1,64,4096,16384]
    [--transformer-engine FOLDER] [--json FILE] [--device cuda] [--warm N] [--limit 300]

n = 4, bfloat16 streams, through each project's public functions, in its own layout. Each takes the
same numbers, and takes its turn in every round. A row has, for each side, the microseconds of the
GPU in a CUDA graph of several calls, and those of the wall clock of eager calls issued in a row.
Then the largest difference of H_post and H_res from float64. A side that fails is one line.
TransformerEngine's folder is a checkout, of which two Triton files are read.

``--warm N`` first compiles in N processes side by side, each with one side's forward rows, or its
row with gradients, at one C, and at T = 1 or at the others: Triton compiles an integer argument of
1 as a constant. Each calls its rows once, the smallest T first. The run that measures finds on disk
what they compiled, in ~/.triton/cache (triton/runtime/cache.py) and ~/.tilelang/cache
(tilelang/cache/kernel_cache.py). Neither keeps what a process chose by timing on a shared GPU:
Triton keeps that with TRITON_CACHE_AUTOTUNING=1 alone (triton/runtime/autotuner.py), which is left
out of their environment. One that takes more than ``--limit`` seconds is ended.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

import mhc_core as mhc
from mhc_backends.kernels import nvrtc
from mhc_core.graphs import replayed

N, M = 4, 24
ROUNDS = 7
FORWARD = ("pre", "combine", "combine_pre", "pre + combine")
ROWS = (*FORWARD, "sublayer fwd+bwd")
VARIANT = mhc.DEEPSEEK_V4
EPS, ITERATIONS = VARIANT.sinkhorn_eps, VARIANT.sinkhorn_iterations


@dataclass(frozen=True)
class Side:
    """An implementation, on arrays in its own layout.

    ``pre`` takes the streams and the parameters; it returns h, and what ``combine`` takes after the
    streams and y. ``mappings`` makes H_post and H_res of that.
    """

    name: str
    variant: mhc.Variant
    pre: Callable[..., tuple[Tensor, Any]]
    combine: Callable[..., Tensor]
    mappings: Callable[[Any], tuple[Tensor, Tensor]]
    streams: Callable[[Tensor], Tensor] = lambda x: x
    parameters: Callable[..., Sequence[Tensor]] = lambda *given: given
    combine_pre: Callable[..., Any] | None = None


def ours(_: str) -> Side:
    """Return this project's ops, by the backend that is chosen by itself."""

    def pre(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Any]:
        h, *maps = mhc.pre(x, *parameters, VARIANT)
        return h, maps

    def combine_pre(x: Tensor, y: Tensor, maps: Any, *parameters: Tensor) -> Any:
        return mhc.combine_pre(x, y, *maps, *parameters, VARIANT)

    return Side(
        "ours",
        VARIANT,
        pre,
        lambda x, y, maps: mhc.combine(x, y, *maps),
        lambda maps: tuple(maps),
        combine_pre=combine_pre,
    )


def liger(_: str) -> Side:
    """Return Liger-Kernel's functions."""
    theirs: Any = import_module("liger_kernel.transformers.functional")
    variant = replace(mhc.LIGER, pre_eps=EPS)

    def pre(x: Tensor, phi: Tensor, bias: Tensor, *scale: Tensor) -> tuple[Tensor, Any]:
        h_pre, *maps = theirs.liger_mhc_coeffs(
            x,
            phi,
            bias,
            *scale,
            allow_fp32=True,
            tmax=ITERATIONS,
            rms_eps=variant.norm_eps,
            pre_eps=EPS,
            sinkhorn_eps=EPS,
            post_mult=variant.post_scale,
        )
        return theirs.liger_mhc_pre(x, h_pre), maps

    return Side(
        "liger",
        variant,
        pre,
        lambda x, y, maps: theirs.liger_mhc_post_res(x, y, *maps),
        lambda maps: tuple(maps),
        parameters=lambda phi, scale, bias: (phi.T.contiguous(), bias, *scale.unbind()),
    )


def tile_kernels(_: str) -> Side:
    """Return TileKernels' functions, which choose other kernels where no gradient is taken.

    TileLang ends the process ("libnvrtc symbols not found globally") unless NVRTC's functions are
    those of the whole process, as PyTorch's are not.
    """
    ctypes.CDLL(nvrtc._library()._name, ctypes.RTLD_GLOBAL)
    theirs: Any = import_module("tile_kernels.modeling.mhc.functional")
    post: Any = import_module("tile_kernels.modeling.mhc.ops.post").mhc_post

    def pre(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Any]:
        return theirs.mhc_pre(
            x,
            *parameters,
            norm_eps=VARIANT.norm_eps,
            post_mult_value=VARIANT.post_scale,
            pre_eps=EPS,
            sinkhorn_eps=EPS,
            sinkhorn_repeat=ITERATIONS,
        )

    return Side(
        "tile_kernels",
        VARIANT,
        pre,
        lambda x, y, maps: post(y, x, *maps),
        lambda maps: (maps[0].squeeze(-1), maps[1].mT),
    )


def transformer_engine(folder: str, repeatable: bool = False) -> Side:
    """Return TransformerEngine's functions, whose streams are [T, 1, C, n]."""
    if not folder:
        raise ValueError("--transformer-engine is missing; needs the folder of a checkout")
    os.environ["MHC_PEERS_CHECKOUT"] = folder
    theirs: Any = import_module("mhc_peers.adapters.transformer_engine").functions()

    def pre(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Any]:
        h, *maps = theirs.mhc_generate_mix_and_aggregate(
            x, *parameters, use_tf32=True, use_split_k=not repeatable
        )
        return h, maps

    return Side(
        "te_repeatable" if repeatable else "te",
        replace(mhc.PAPER, norm_eps=2.0**-23, res_transposed=True),
        pre,
        lambda x, y, maps: theirs.mhc_fused_expand_combine(y, None, maps[0], x, maps[1], N),
        lambda maps: (maps[0].transpose(0, 1), maps[1].mT.transpose(0, 1)),
        streams=lambda x: x.permute(1, 0, 3, 2).contiguous(),
        parameters=lambda phi, scale, bias: (
            phi.unflatten(-1, (N, -1)).mT.flatten(-2).contiguous(),
            scale,
            bias[None],
        ),
    )


def te_repeatable(folder: str) -> Side:
    """Return TransformerEngine's functions without sums in the order in which threads end."""
    return transformer_engine(folder, repeatable=True)


SIDES: dict[str, Callable[[str], Side]] = {
    "ours": ours,
    "liger": liger,
    "tile_kernels": tile_kernels,
    "te": transformer_engine,
    "te_repeatable": te_repeatable,
}


# ---- work ----------------------------------------------------------------------------------------


def drawn(T: int, C: int, device: str) -> list[Tensor]:
    """Draw streams and parameters, the same at each call."""
    torch.manual_seed(0)
    x = torch.randn(1, T, N, C, device=device).bfloat16()
    phi = torch.randn(M, N * C, device=device) * (N * C) ** -0.5
    return [x, phi, torch.rand(3, device=device) + 0.5, torch.randn(M, device=device)]


def work(side: Side, given: Sequence[Tensor]) -> dict[str, Callable[[], Any]]:
    """Return a function for every row."""
    x = side.streams(given[0]).detach()
    parameters = [one.detach().contiguous() for one in side.parameters(*given[1:])]
    with torch.no_grad():
        h, maps = side.pre(x, *parameters)
        g = torch.randn_like(side.combine(x, h, maps))
    leaves = [one.clone().requires_grad_() for one in (x, *parameters)]

    def quiet(function: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return function(*arrays)

        return run

    def step() -> Any:
        """Run a sublayer, in which F is the identity, and its gradients."""
        h, maps = side.pre(*leaves)
        return torch.autograd.grad(side.combine(leaves[0], h, maps), leaves, g)

    def one_more() -> Any:
        """Decode a token: pre, then combine."""
        h, maps = side.pre(x, *parameters)
        return side.combine(x, h, maps)

    rows = {
        "pre": quiet(side.pre, x, *parameters),
        "combine": quiet(side.combine, x, h, maps),
        "pre + combine": quiet(one_more),
        "sublayer fwd+bwd": step,
    }
    if side.combine_pre is not None:
        rows["combine_pre"] = quiet(side.combine_pre, x, h, maps, *parameters)
    return rows


def apart(side: Side, given: Sequence[Tensor]) -> str:
    """Return the largest differences of H_post and H_res from float64, or what went wrong."""
    x = side.streams(given[0])
    try:
        with torch.no_grad():
            found = side.mappings(side.pre(x, *side.parameters(*given[1:]))[1])
            wide = [one.double() for one in given]
            want = mhc.mappings(*wide, side.variant, backend="torch")[1:]
        numbers = [(a.double() - b).abs().max().item() for a, b in zip(found, want, strict=True)]
    except Exception as error:  # the other sides are still measured
        return f"{type(error).__name__}: {error}"
    return f"apart by {', '.join(f'{one:.1e}' for one in numbers)}"


# ---- time ----------------------------------------------------------------------------------------


def waited(device: str) -> float:
    """Return the time when all that was launched is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def by_the_wall(run: Callable[[], Any], device: str, calls: int) -> float:
    """Return the microseconds of an eager call, of several in a row."""
    began = waited(device)
    for _ in range(calls):
        run()
    return (waited(device) - began) / calls * 1e6


def recorded(run: Callable[[], Any], copies: int) -> Callable[[], float]:
    """Return a function that times a graph of several calls, in microseconds of one."""

    def several() -> None:
        for _ in range(copies):
            run()

    replay = replayed(torch, several)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        replay()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / copies

    return timed


def measured(sides: Sequence[Side], T: int, C: int, device: str) -> list[dict[str, Any]]:
    """Time all rows of all sides at one size, in turns."""
    given = drawn(T, C, device)
    every: dict[str, dict[str, Callable[[], Any]]] = {}
    for side in sides:
        try:
            every[side.name] = work(side, given)
        except Exception as error:
            report(side.name, error)
    if T <= 4096:
        for side in sides:
            if side.name in every:
                print(f"C={C} T={T} {side.name}: H_post, H_res {apart(side, given)}", flush=True)
    made: list[dict[str, Any]] = []
    for row in ROWS:
        words: list[str] = []
        runs = {name: rows[row] for name, rows in every.items() if row in rows}
        for name, (graph, wall) in times(runs, T, device).items():
            numbers = {"graph": None if math.isnan(graph) else graph, "wall": wall}
            made.append({"row": row, "C": C, "T": T, "side": name, **numbers})
            words.append(f"{name} {graph:.1f} / {wall:.1f}")
        if words:
            print(f"C={C} T={T:<6}{row:18}", "  ".join(words), flush=True)
    return made


def times(
    runs: dict[str, Callable[[], Any]], T: int, device: str
) -> dict[str, tuple[float, float]]:
    """Return the median microseconds of each side: in a graph, and by the wall clock."""
    copies, calls = (20, 50) if T <= 64 else (4, 10)
    graphs: dict[str, Callable[[], float]] = {}
    names: list[str] = []
    for name, run in runs.items():
        graphs[name] = lambda: math.nan
        try:
            for _ in range(3):
                run()
            waited(device)
            names.append(name)
            if device == "cuda":
                graphs[name] = recorded(run, copies)
        except Exception as error:
            report(name, error)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(ROUNDS if names else 0):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            found[name][0].append(graphs[name]())
            found[name][1].append(by_the_wall(runs[name], device, calls))
    return {
        name: (statistics.median(graph), statistics.median(wall))
        for name, (graph, wall) in found.items()
    }


# ---- compiling side by side ----------------------------------------------------------------------


def called_once(sides: Sequence[Side], T: int, C: int, device: str, rows: Iterable[str]) -> bool:
    """Call these rows of the sides once; return whether all could be called."""
    given, good = drawn(T, C, device), True
    for side in sides:
        try:
            functions = work(side, given)
            for row in rows:
                functions.get(row, lambda: None)()  # combine_pre is ours alone
            waited(device)
        except Exception as error:
            report(f"{side.name} C={C} T={T}", error)
            good = False
        if device == "cuda":
            torch.cuda.empty_cache()  # other processes have the same memory
    return good


def ended(command: Sequence[str], limit: float, output: Any) -> int | None:
    """Return a command's exit status, or None if it was ended after so many seconds.

    What it started, a compiler for one, is in its session, and ends with it.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_AUTOTUNING"}
    with subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment,
    ) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return None


def warm(args: argparse.Namespace, sides: Sequence[str]) -> None:
    """Compile what the rows need, in processes side by side; print a line for each."""

    def compiled(share: tuple[str, str, Sequence[str], Sequence[str]]) -> None:
        side, C, Ts, rows = share
        options = {"sides": side, "C": C, "T": ",".join(Ts), "device": args.device}
        options |= {"transformer-engine": args.transformer_engine, "once": ",".join(rows)}
        options |= {"limit": args.limit}
        command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in options.items())]
        begin = time.perf_counter()
        with TemporaryFile("w+") as output:
            status = ended(command, args.limit, output)
            took = time.perf_counter() - begin
            output.seek(0)
            said = [line.strip() for line in output if "Error" in line]
        failed = f"failed ({status}) {said[-1][:300] if said else ''}"
        word = {0: "compiled", None: "ended"}.get(status, failed)
        print(f"{side} C={C} T={','.join(Ts)} {rows[-1]}: {word}, {took:.0f} s", flush=True)

    begin = time.perf_counter()
    sizes = sorted(args.T.split(","), key=int)
    shares = [
        (side, C, Ts, rows)
        for rows in (ROWS[-1:], FORWARD)  # the longest first
        for C in args.C.split(",")
        for side in sides
        for Ts in ([T for T in sizes if int(T) != 1], [T for T in sizes if int(T) == 1])
        if Ts
    ]
    with ThreadPoolExecutor(args.warm) as pool:
        list(pool.map(compiled, shares))
    print(f"compiled side by side in {time.perf_counter() - begin:.0f} s", flush=True)


def report(name: str, error: Exception) -> None:
    """Print what went wrong."""
    text = (str(error).strip().splitlines() or [""])[0]
    print(f"{name}: {type(error).__name__}: {text[:300]}", flush=True)


def versions() -> str:
    """Return what is installed, of what matters here."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "liger-kernel", "tile-kernels", "tilelang"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--C", default="4096,7168")
    parser.add_argument("--T", default="1,64,4096,16384")
    parser.add_argument("--transformer-engine", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warm", type=int, default=0, help="processes that compile first")
    parser.add_argument("--limit", type=float, default=300, help="seconds of each of them")
    parser.add_argument("--once", default="", help="rows to call once, as --warm does; no times")
    args = parser.parse_args()
    unknown = set(filter(None, args.once.split(","))) - {*ROWS}
    if args.warm < 0 or args.limit <= 0:
        parser.error(f"--warm is {args.warm}, --limit {args.limit}; need 0 or more, and over 0")
    if unknown:
        parser.error(f"--once has {sorted(unknown)}; needs rows of {list(ROWS)}")
    if args.once:
        signal.alarm(math.ceil(args.limit))  # it ends even where what started it is gone
    device = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    print(versions() + device, "(microseconds: graph / wall)", sep=" ", flush=True)
    sides: list[Side] = []
    for name in args.sides.split(","):
        try:
            sides.append(SIDES[name](args.transformer_engine))
        except (ImportError, ValueError) as error:
            report(name, error)
    sizes = [(int(T), int(C)) for C in args.C.split(",") for T in args.T.split(",")]
    if args.once:
        rows = args.once.split(",")
        called = [called_once(sides, T, C, args.device, rows) for T, C in sizes]
        sys.exit(not (sides and all(called)))
    if args.warm and sides:
        warm(args, [side.name for side in sides])
    made: list[dict[str, Any]] = []
    for T, C in sizes:
        made += measured(sides, T, C, args.device)
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if args.json:
            args.json.write_text(json.dumps({"versions": versions(), "rows": made}, indent=1))
    if not sides:
        sys.exit(1)


if __name__ == "__main__":
    main()
