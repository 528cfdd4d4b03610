"""Hold the CUDA kernels against the limits of each GPU, by nvcc and without a GPU.

python tests/architectures.py [--architectures sm_80,sm_90] [--ops pre,combine] [--dtypes bfloat16]
    [--T 1,64,256,4096] [--n 4] [--C 4096] [--json FILE]

It compiles what plans launch and reads what ptxas says. A kernel's registers must be there for as
many threadgroups as the launch table asks for, and its threadgroup memory must be what a
threadgroup may have. Registers that are spilled to memory are printed: they cost time alone.
"""

from __future__ import annotations

import argparse
import inspect
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
from mhc_backends.kernels.ops import OPS
from mhc_backends.kernels.plan import Launch, Plan, record
from mhc_core import math
from mhc_core.cli.bench._arrays import Sizes, dtype_of
from mhc_core.signature import UNMIXED

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


def launches(ops: Sequence[str], sizes: Sequence[Sizes], room: int) -> list[Launch]:
    """Return the launches of ops, forward and back, whose functions differ.

    ``room`` is the memory of a threadgroup, by which some kernels are chosen.
    """
    found: dict[tuple[str, int], Launch] = {}
    for op in ops:
        for size in sizes:
            for step in _steps(op, size, room):
                found.setdefault((function(step).text, step.program.memory), step)
    return list(found.values())


def _steps(op: str, sizes: Sizes, room: int) -> Iterator[Launch]:
    declared = math.load(op).OP
    variants = [mhc.DEEPSEEK_V4]
    if declared.projects or UNMIXED in declared.optional:
        variants.append(mhc.HY_V4)  # whose streams are not mixed
    for variant in variants:
        left_out = {*declared.optional} - ({UNMIXED} if variant.mixes else set())
        names = [name for name in declared.arrays if name not in left_out]
        absent = [k for k, one in enumerate(declared.arrays) if one == UNMIXED and one in left_out]
        static = {name: _static(op, name, sizes.n, variant) for name in declared.static}
        known = {**sizes.by_word, **declared.sizes(sizes.n, sizes.C, static)}
        patterns = [declared.arrays[name] for name in names]
        primals = [(_shape(one, sizes, known), dtype_of(one, sizes)) for one in patterns]
        for plan in _plans(op, primals, (static, "cuda", room, absent)):
            yield from (step for step in plan.steps if isinstance(step, Launch))


def _plans(op: str, primals: Sequence[Any], given: tuple[Any, ...]) -> Iterator[Plan]:
    """Yield an op's plans: forward, and back with what was saved and without."""
    forward = record("forward_with_saved", op, [primals], *given)
    yield forward
    outputs, saved = (
        [(one.shape, one.dtype) for one in values] for values in (forward.outputs, forward.saved)
    )
    yield record("vjp", op, [primals, outputs], *given)
    if saved:
        yield record("vjp", op, [primals, outputs, saved], *given)


def _shape(pattern: str, sizes: Sizes, known: Mapping[str, int]) -> tuple[int, ...]:
    words = pattern.split("|")[0].split()
    ahead = (sizes.B, sizes.T) if words[0] == "..." else ()
    return (
        *ahead,
        *[known[word] if word in known else int(word) for word in words if word != "..."],
    )


def _static(op: str, name: str, n: int, variant: mhc.Variant) -> Any:
    """Return a static argument: the variant's, or as the public function has it."""
    given = {"variant": variant, "n": n}
    return (
        given[name]
        if name in given
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


HEADING = """\
| architecture | KiB there | functions | KiB at most | registers at most | spilled bytes |
|---|---|---|---|---|---|"""


def row(architecture: str, made: Sequence[Compiled]) -> str:
    """Return a row of the table: the most that any function takes."""
    most, registers = max(one.memory for one in made), max(one.registers for one in made)
    spilled: dict[str, int] = {}
    for one in made:
        if one.spilled:
            spilled[one.kernel] = max(spilled.get(one.kernel, 0), one.spilled)
    words = ", ".join(f"`{name}` {count}" for name, count in sorted(spilled.items())) or "none"
    numbers = f"{memory(architecture) >> 10} | {len(made)} | {most / 1024:.0f} | {registers}"
    return f"| {architecture} | {numbers} | {words} |"


def main() -> None:
    """Print a row per architecture, and what does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--T", default="1,64,256,4096")
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
    print(HEADING)
    for architecture in args.architectures.split(","):
        given = launches(args.ops.split(","), sizes, memory(architecture))
        made += compiled(given, architecture)
        print(row(architecture, made[-len(given) :]), flush=True)
    wrong = [(one, problem) for one in made for problem in one.problems()]
    for one, problem in wrong:
        print(f"{one.architecture} {one.kernel}: {problem}")
    if args.json:
        lines = ",\n".join(json.dumps(asdict(one)) for one in made)
        args.json.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
