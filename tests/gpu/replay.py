"""Run recorded launches on an NVIDIA GPU: ``python tests/gpu/replay.py before.json after.json``.

It needs CuPy with NVRTC and neither MLX nor this project. Each file of ``record.py`` is one version
of the kernels. A call's launches run in order on the same random arrays in all versions, in CUDA
graphs of COPIES calls, versions in turn. It prints the time of a call and of each of its kernels
alone, whether the versions' results have the same bits, and whether a token's results have the same
bits at every T. ``--registers`` compiles the texts by nvcc and prints what ptxas says, without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

COPIES, ROUNDS = 20, 9
# what MLX writes before a kernel and its parameters
BEFORE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cooperative_groups.h>
struct Shape { int at[10]; __device__ int operator[](int k) const { return at[k]; } };
"""
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16", "int32": "int"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


def main() -> None:
    """Compare the versions that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--registers", action="store_true")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--once", action="store_true", help="run, compare, and time nothing")
    given = parser.parse_args()
    versions = [json.loads(file.read_text(encoding="utf-8")) for file in given.files]
    if given.registers:
        for version in versions:
            print_registers(version, given.arch)
        return
    rows = list(Replay(versions, given.once).rows())
    if given.report:
        given.report.write_text(json.dumps(rows), encoding="utf-8")


def text_of(version: Any, launch: Any) -> str:
    """Return the text of a launch with the function around it, as MLX writes it."""
    source, header = version["texts"][launch["source"]], version["texts"][launch["header"]]
    parameters: list[str] = []
    for array in launch["inputs"]:
        parameters.append(f"const {TYPES[array['dtype']]}* {array['name']}")
        if f"{array['name']}_shape" in source:
            parameters.append(f"const __grid_constant__ Shape {array['name']}_shape")
    parameters += [f"{TYPES[array['dtype']]}* {array['name']}" for array in launch["outputs"]]
    constants = "".join(
        f"constexpr {'bool' if isinstance(value, bool) else 'int'} {word} = {str(value).lower()};\n"
        for word, value in launch["template"]
    )
    signature = f'extern "C" __global__ void kernel({", ".join(parameters)})'
    return f"{BEFORE}{header}{signature} {{\n{constants}\n{source}\n}}\n"


def short_name(launch: Any) -> str:
    """Return a kernel's name without the dtypes of its arrays."""
    words = launch["name"].removeprefix("mhc_").split("_")
    ends = [k for k, word in enumerate(words) if word.rstrip("c") in TYPES or _is_digest(word)]
    return "_".join(words[: ends[0]] if ends else words)


def _is_digest(word: str) -> bool:
    return len(word) >= 6 and all(c in "0123456789abcdef" for c in word)


def print_registers(version: Any, arch: str) -> None:
    """Print what ptxas says about each text."""
    seen: set[str] = set()
    for call in version["calls"]:
        for launch in call["launches"]:
            text = text_of(version, launch)
            if text in seen:
                continue
            seen.add(text)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "kernel.cu")
                file.write_text(f"#include <cstdint>\n{text}", encoding="utf-8")
                command = ["nvcc", f"-arch={arch}", "-std=c++17", "-cubin", "-Xptxas", "-v"]
                made = subprocess.run(
                    [*command, str(file), "-o", str(file.with_suffix(".cubin"))],
                    capture_output=True,
                    text=True,
                    check=False,
                )
            said = [
                line.split(":")[-1].strip()
                for line in made.stderr.splitlines()
                if "registers" in line or "stack" in line or "error" in line
            ]
            print(f"{short_name(launch):26} {call['tag']:36}", *said, sep=" | ", flush=True)


class Replay:
    """The versions on the GPU."""

    def __init__(self, versions: list[Any], once: bool = False) -> None:
        import cupy
        import numpy

        self.cp, self.np, self.versions, self.once = cupy, numpy, versions, once
        self._kernels: dict[str, Any] = {}
        self._drawn: dict[Any, Any] = {}
        self._tokens: dict[Any, Any] = {}
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Print and return a row for each call, and one for each of its kernels."""
        self._compile()
        print(f"an empty kernel: {self._empty():.2f} us")
        for k, call in enumerate(self.versions[0]["calls"]):
            calls = [version["calls"][k] for version in self.versions]
            assert all(other["tag"] == call["tag"] for other in calls)
            made = [
                self._call(version, one) for version, one in zip(self.versions, calls, strict=True)
            ]
            results = [self._results(*one) for one in made]
            same = all(self._equal(results[0], other) for other in results)
            alike = [self._as_before(v, call["tag"], one) for v, one in enumerate(results)]
            times = self._times([runs for runs, _ in made])
            row = {"call": call["tag"], "us": times, "same": same, "batch": alike}
            shown = "  ".join(f"{time:8.2f}" for time in times)
            print(f"{call['tag']:44} {shown}  same bits {same}, at every T {alike}", flush=True)
            row["kernels"] = []
            for v, (runs, _) in enumerate(made):
                for name, run in runs:
                    alone = self._times([[(name, run)]])[0]
                    row["kernels"].append([v, name, alone])
                    print(f"    version {v} {name:32} {alone:8.2f}", flush=True)
            yield row

    def _compile(self) -> None:
        """Compile all texts side by side."""
        texts = {
            text_of(version, launch)
            for version in self.versions
            for call in version["calls"]
            for launch in call["launches"]
        }

        def function(text: str) -> Any:
            self.cp.cuda.Device(0).use()
            options = ("-std=c++17", "-I/usr/local/cuda/include", "-default-device")
            return self.cp.RawModule(code=text, options=options).get_function("kernel")

        with ThreadPoolExecutor(16) as pool:
            self._kernels = dict(zip(texts, pool.map(function, texts), strict=True))

    def _kernel(self, version: Any, launch: Any) -> Any:
        kernel = self._kernels[text_of(version, launch)]
        if launch["memory"]:
            kernel.max_dynamic_shared_size_bytes = launch["memory"]
        return kernel

    def _call(self, version: Any, call: Any) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
        """Return a call's launches and its arrays."""
        arrays: dict[int, Any] = {}
        outputs: dict[str, Any] = {}
        runs: list[tuple[str, Any]] = []
        for launch in call["launches"]:
            source = version["texts"][launch["source"]]
            values: list[Any] = []
            for array in launch["inputs"]:
                if array["mark"] not in arrays:
                    arrays[array["mark"]] = self._draw(array)
                values.append(arrays[array["mark"]])
                if f"{array['name']}_shape" in source:
                    lengths = self.np.zeros(10, self.np.int32)
                    lengths[: len(array["shape"])] = array["shape"]
                    values.append(self.np.void(lengths.tobytes()))
            for array in launch["outputs"]:
                made = self._array(array)
                arrays[array["mark"]] = outputs[array["name"]] = made
                values.append(made)
            sizes = zip(launch["grid"], launch["threadgroup"], strict=True)
            groups = tuple(-(-whole // each) for whole, each in sizes)
            run = (
                self._kernel(version, launch),
                groups,
                tuple(launch["threadgroup"]),
                tuple(values),
                launch["memory"],
            )
            runs.append((short_name(launch), run))
        return runs, outputs

    def _array(self, array: Any) -> Any:
        """Return an array of NaNs, so that what is not written shows."""
        kind = {2: self.cp.uint16, 4: self.cp.uint32}[BYTES[array["dtype"]]]
        made = self.cp.empty(array["shape"], kind)
        made.fill(0xFFFF if made.itemsize == 2 else 0xFFFFFFFF)
        return made

    def _draw(self, array: Any) -> Any:
        """Draw random numbers; those of a token do not depend on how many tokens there are."""
        name, shape = array["name"], tuple(array["shape"]) or (1,)
        key = (name, array["dtype"], shape[1:])
        if key not in self._drawn or len(self._drawn[key]) < shape[0]:
            rows = []
            for begin in range(0, shape[0], 4096):  # a seed for each block of rows
                random = self.cp.random.RandomState(zlib.crc32(f"{name} {begin}".encode()))
                size = (min(4096, shape[0] - begin) if begin else 4096, *shape[1:])
                size = size if shape[0] > 1 or len(shape) > 1 else shape
                rows.append(self._narrowed(random.standard_normal(size) * 0.5, array["dtype"]))
            self._drawn[key] = self.cp.concatenate(rows)
        return self._drawn[key][: shape[0]]

    def _narrowed(self, numbers: Any, dtype: str) -> Any:
        numbers = numbers.astype(self.cp.float32)
        if dtype == "bfloat16":
            return (numbers.view(self.cp.uint32) >> 16).astype(self.cp.uint16)
        return numbers.view(self.cp.uint32) if dtype == "float32" else numbers.astype("float16")

    def _run(self, run: Any) -> None:
        kernel, groups, threads, values, memory = run
        kernel(groups, threads, values, shared_mem=memory)

    def _results(self, runs: list[tuple[str, Any]], outputs: dict[str, Any]) -> dict[str, Any]:
        for _, run in runs:
            self._run(run)
        self.cp.cuda.Device().synchronize()
        sums = ("partials", "blocks")
        return {name: array.get() for name, array in outputs.items() if name not in sums}

    def _equal(self, a: dict[str, Any], b: dict[str, Any]) -> bool:
        shared = [name for name in a if name in b and a[name].shape == b[name].shape]
        different = [name for name in shared if (a[name] != b[name]).any()]
        for name in different:
            one, other = a[name], b[name]
            share = float((one != other).mean())
            if one.itemsize == 4:
                one, other = one.view("float32"), other.view("float32")
                print(f"    {name} differs in {share:.3g}, by {abs(one - other).max():.3g} at most")
            else:
                print(f"    {name} differs in {share:.3g}")
        return not different

    def _as_before(self, version: int, tag: str, results: dict[str, Any]) -> bool:
        """Return whether the first tokens have the same bits as with other numbers of tokens."""
        T = int(tag.split("T=")[1].split()[0])
        key = (version, tag.replace(f"T={T} ", ""))
        known = self._tokens.setdefault(key, {})
        fine = True
        for name, array in results.items():
            rows = array.reshape(T, -1)[:64] if array.size % T == 0 else array[:0]
            before = known.setdefault(name, rows)
            count = min(len(before), len(rows))
            if before.shape[1:] != rows.shape[1:] or (before[:count] != rows[:count]).any():
                print("   depends on T:", name)
                fine = False
            if len(rows) > len(before):
                known[name] = rows
        return fine

    def _times(self, versions: list[list[tuple[str, Any]]]) -> list[float]:
        """Return the median time of each version's call, in microseconds."""
        if self.once:
            return [0.0] * len(versions)
        cuda, stream = self.cp.cuda, self._stream
        graphs = []
        for runs in versions:
            with stream:
                stream.begin_capture()
                for _ in range(COPIES):
                    for _, run in runs:
                        self._run(run)
                graphs.append(stream.end_capture())
        times: list[list[float]] = [[] for _ in versions]
        begin, end = cuda.Event(), cuda.Event()
        for _ in range(ROUNDS):
            for graph, own in zip(graphs, times, strict=True):
                graph.launch(stream)
                begin.record(stream)
                graph.launch(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                own.append(cuda.get_elapsed_time(begin, end) * 1000 / (2 * COPIES))
        return [sorted(own)[ROUNDS // 2] for own in times]

    def _empty(self) -> float:
        module = self.cp.RawModule(code='extern "C" __global__ void kernel(float* x) {}')
        run = (module.get_function("kernel"), (128,), (256,), (self.cp.zeros(1, "float32"),), 0)
        return self._times([[("empty", run)]])[0]


if __name__ == "__main__":
    main()
