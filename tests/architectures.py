"""Hold the CUDA kernels against the limits of each GPU, by nvcc and without a GPU.

python tests/architectures.py [--architectures sm_80,sm_90] [--ops pre,combine] [--dtypes bfloat16]
    [--T 1,64,4096] [--n 4] [--C 4096] [--json FILE]

It compiles what plans launch and reads what ptxas says. A kernel's registers must be there for as
many threadgroups as the launch table asks for, and its threadgroup memory must be what a
threadgroup may have. Registers that are spilled to memory are printed: they cost time alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mhc_core as mhc
from mhc_backends.kernels.cuda_function import NAME, PRELUDE, function
from mhc_backends.kernels.nvidia import memory
from mhc_backends.kernels.ops import OPS, has_vjp
from mhc_backends.kernels.plan import Launch, record
from mhc_core import math
from mhc_core.cli.bench._arrays import Sizes, dtype_of, shape_of
from mhc_core.cli.bench._rows import rows_of_ops

__all__ = ["ARCHITECTURES", "Compiled", "compiled", "launches"]

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS = 64 * 1024  # of a multiprocessor: CUDA programming guide, technical specifications
MOST_REGISTERS = 255  # of a thread
AT_ONCE = 8  # registers of a thread are given out in eights
MOST_THREADS = 1024  # of a threadgroup


@dataclass(frozen=True)
class Compiled:
    """A kernel for an architecture, as ptxas describes it, in bytes and registers of a thread."""

    kernel: str
    architecture: str
    threads: int
    resident: int
    registers: int
    spilled: int
    stack: int
    memory: int

    def problems(self) -> Iterator[str]:
        """Yield what does not fit."""
        there = REGISTERS // (self.threads * self.resident) // AT_ONCE * AT_ONCE
        if self.registers > min(there, MOST_REGISTERS):
            yield f"{self.registers} registers; of {self.threads} threads, each may have {there}"
        if self.memory > memory(self.architecture):
            yield f"{self.memory} bytes of memory; there are {memory(self.architecture)}"
        if self.threads > MOST_THREADS:
            yield f"{self.threads} threads; there are {MOST_THREADS}"


def launches(
    ops: Sequence[str],
    sizes: Sequence[Sizes],
    room: int,
    variant: mhc.Variant = mhc.DEEPSEEK_V4,
) -> list[Launch]:
    """Return the launches of ops, forward and back, whose functions differ.

    ``room`` is the memory of a threadgroup, by which some kernels are chosen.
    """
    found: dict[tuple[str, int], Launch] = {}
    for op in ops:
        for size in sizes:
            for step in _steps(op, size, room, variant):
                found.setdefault((function(step).text, step.program.memory), step)
    return list(found.values())


def _steps(op: str, sizes: Sizes, room: int, variant: mhc.Variant) -> Iterator[Launch]:
    declared, row = math.load(op).OP, rows_of_ops()[op]
    static = {name: _default(op, name, variant) for name in declared.static}
    patterns = [declared.arrays[word.partition(".")[2]] for word in row.inputs]
    primals = [(shape_of(one, sizes), dtype_of(one, sizes)) for one in patterns]
    given = static, "cuda", room
    forward = record("forward_with_saved", op, [primals], *given)
    plans = [forward]
    if has_vjp(op):
        more = [
            [(one.shape, one.dtype) for one in values]
            for values in (forward.outputs, forward.saved)
        ]
        plans += [
            record("vjp", op, [primals, *[one for one in given_too if one]], *given)
            for given_too in (more, more[:1])
        ]
    for plan in plans:
        yield from (step for step in plan.steps if isinstance(step, Launch))


def _default(op: str, name: str, variant: mhc.Variant) -> Any:
    import inspect

    return (
        variant
        if name == "variant"
        else inspect.signature(getattr(mhc, op)).parameters[name].default
    )


def compiled(given: Sequence[Launch], architecture: str) -> list[Compiled]:
    """Compile launches for an architecture, as one program."""
    parts: list[str] = []
    for k, step in enumerate(given):
        text = function(step).text.replace(f"void {NAME}(", f"void {NAME}_{k}(")
        parts.append(f"namespace part_{k} {{\n{text}}}\n")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernels.cu")
        before = PRELUDE.replace("typedef long long int64_t;", "#include <cstdint>")
        source.write_text(before + "".join(parts), encoding="utf-8")
        command = ["nvcc", f"-arch={architecture}", "-std=c++17", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"nvcc for {architecture}: {done.stderr[:2000]}")
    said = _said(done.stderr)
    return [_described(step, architecture, said[f"{NAME}_{k}"]) for k, step in enumerate(given)]


def _said(text: str) -> Mapping[str, str]:
    """Return what ptxas says of each function."""
    begins = re.split(r"Compiling entry function '(\w+)' for '\w+'", text)[1:]
    return dict(zip(begins[::2], begins[1::2], strict=True))


def _described(step: Launch, architecture: str, said: str) -> Compiled:
    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, said)))

    threads, resident = step.program.bounds or (step.program.launch.threadgroup[0], 1)
    return Compiled(
        kernel=step.kernel,
        architecture=architecture,
        threads=threads,
        resident=resident,
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill (?:stores|loads)"),
        stack=number(r"(\d+) bytes stack frame"),
        memory=number(r"(\d+) bytes smem") + step.program.memory,
    )


def main() -> None:
    """Print a line per kernel: its registers on each architecture, and what does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--ops", default=",".join(op for op in OPS if op in rows_of_ops()))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--T", default="1,64,4096")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = [
        Sizes(1, T, args.n, args.C, dtype)
        for dtype in args.dtypes.split(",")
        for T in map(int, args.T.split(","))
    ]
    made: list[Compiled] = []
    for architecture in args.architectures.split(","):
        given = launches(args.ops.split(","), sizes, memory(architecture))
        made += compiled(given, architecture)
        spilling = {one.kernel: one.spilled for one in made[-len(given) :] if one.spilled}
        words = ", ".join(f"{kernel} {count}" for kernel, count in spilling.items()) or "nothing"
        print(f"{architecture}: {len(given)} functions; spilled bytes: {words}", flush=True)
    wrong = [(one, problem) for one in made for problem in one.problems()]
    for one, problem in wrong:
        print(f"{one.architecture} {one.kernel}: {problem}")
    if args.json:
        args.json.write_text(json.dumps([asdict(one) for one in made], indent=1) + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
