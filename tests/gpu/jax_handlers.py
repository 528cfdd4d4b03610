"""Time one kernel in JAX through two handlers of XLA's FFI: this project's, and jax-tvm-ffi's.

python tests/gpu/jax_handlers.py [--T 1,4096] [--C 4096] [--calls 86] [--rounds 21]

The kernel is combine's, with n = 4 and bfloat16 streams: the same machine code, launched over the
same grid. jax-tvm-ffi 0.1.3 calls a function that tvm_ffi.cpp.load_inline builds, and that launches
by TVM's CubinKernel; it is registered twice, with ``allow_cuda_graph`` and without. Each row has
the microseconds by the wall clock, medians of rounds that take turns: of a call alone, until its
result is there; of a call in a row of as many; and of a call in a chain of as many in one jit. It
fails where the results are not the same bits. CUDA_HOME is the toolkit, for TVM's headers.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mhc_core as mhc
from mhc_backends.jax_cuda.library import architecture
from mhc_backends.kernels import nvrtc
from mhc_backends.kernels.cuda_function import NAME, function
from mhc_backends.kernels.nvidia import memory
from mhc_backends.kernels.plan import ITEMSIZE, Launch, record

N = 4
LOAD = "void load_{name}(tvm::ffi::Bytes code) {{\n  kernel_{name}(&code);\n}}\n"
KERNEL = """
#include <tvm/ffi/extra/cuda/cubin_launcher.h>
#include <tvm/ffi/string.h>

static tvm::ffi::CubinKernel& kernel_{name}(const tvm::ffi::Bytes* code) {{
  static tvm::ffi::Bytes kept = *code;
  static tvm::ffi::CubinModule module(kept);
  static tvm::ffi::CubinKernel kernel = module.GetKernel{how};
  return kernel;
}}
"""
RUN = """
void {name}({views}) {{
{values}
  void* arguments[] = {{{addresses}}};
  DLDevice device = array0.device();
  auto stream = static_cast<tvm::ffi::cuda_api::StreamHandle>(
      TVMFFIEnvGetStream(device.device_type, device.device_id));
  TVM_FFI_CHECK_CUBIN_LAUNCHER_CUDA_ERROR(kernel_{name}(nullptr).Launch(
      arguments, tvm::ffi::dim3({grid}), tvm::ffi::dim3({threads}), stream, {memory}));
}}
"""


def arrays_of(T: int, C: int) -> tuple[jax.Array, ...]:
    """Return x, y, H_post and a doubly stochastic H_res: a chain of them neither grows nor ends."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((T, N, C), (T, C)))
    post = jnp.asarray(rng.uniform(0, 0.1, size=(T, N)), jnp.float32)
    return x, y, post, jnp.full((T, N, N), 1 / N, jnp.float32)


def launch(given: Sequence[jax.Array], room: int) -> Launch:
    """Return the one launch of combine's plan."""
    kinds = [(one.shape, one.dtype) for one in given]
    plan = record("forward", "combine", [kinds], {}, "cuda", room)
    (step,) = plan.steps
    if not isinstance(step, Launch) or plan.outputs[0] not in step.outputs.values():
        raise RuntimeError(f"combine is not one launch: {plan.steps}")
    return step


def text_of(name: str, step: Launch) -> str:
    """Return a C++ function that launches a step, its inputs by their place, then its output."""
    arrays = {**step.inputs, **step.outputs}
    values: list[str] = []
    for k, (array, axis) in enumerate(function(step).arguments):
        value = arrays[array]
        if axis is None:
            place = f"static_cast<char*>(array{value.buffer}.data_ptr())"
            start = f"array{value.buffer}.byte_offset() + {value.offset * ITEMSIZE[value.dtype]}"
            values.append(f"  void* argument{k} = {place} + {start};")
        else:
            values.append(f"  int64_t argument{k} = {int(value.shape[axis])};")
    shape, room = step.program.launch, step.program.memory
    threads = shape.threadgroup[0]
    how = f'WithMaxDynamicSharedMemory("{NAME}", {room})' if room else f'("{NAME}")'
    words: Mapping[str, Any] = {
        "name": name,
        "how": how,
        "views": ", ".join(f"tvm::ffi::TensorView array{k}" for k in range(5)),
        "values": "\n".join(values),
        "addresses": ", ".join(f"&argument{k}" for k in range(len(values))),
        "grid": f"{shape.grid[0] // threads}, {shape.grid[1]}",
        "threads": threads,
        "memory": room,
    }
    return "".join(part.format_map(words) for part in (KERNEL, LOAD, RUN))


def through_tvm(given: Sequence[jax.Array], name: str) -> dict[str, Callable[..., jax.Array]]:
    """Return combine through jax-tvm-ffi, registered with CUDA graphs allowed and without."""
    import jax_tvm_ffi
    import tvm_ffi.cpp

    found = architecture(jax.devices()[0])
    if found is None:
        raise RuntimeError("the first device is no NVIDIA GPU; this script needs one")
    step = launch(given, memory(found))
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    lib = next(one for one in (home / "lib64", home / "lib") if one.is_dir())
    for runtime in sorted(lib.glob("libcudart.so.*"))[:1]:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)  # which the module is linked with
    module: Any = tvm_ffi.cpp.load_inline(
        name,
        cpp_sources=text_of(name, step),
        functions=[name, f"load_{name}"],
        extra_include_paths=[str(home / "include")],
        extra_ldflags=[f"-L{lib}", "-lcudart"],
    )
    getattr(module, f"load_{name}")(nvrtc.compiled(function(step).text, found))
    made: dict[str, Callable[..., jax.Array]] = {}
    for words, allowed in (("tvm-ffi", True), ("tvm-ffi, no graph", False)):
        target = f"{name}_{int(allowed)}"
        jax_tvm_ffi.register_ffi_target(
            target, getattr(module, name), platform="gpu", allow_cuda_graph=allowed
        )
        kind = jax.ShapeDtypeStruct(given[0].shape, given[0].dtype)
        made[words] = jax.ffi.ffi_call(target, kind)
    return made


# ---- time ----------------------------------------------------------------------------------------


def chained(run: Callable[..., jax.Array], calls: int) -> Callable[..., jax.Array]:
    """Return a function of so many calls, each of the streams of the one before."""

    def chain(x: jax.Array, *rest: jax.Array) -> jax.Array:
        for _ in range(calls):
            x = run(x, *rest)
        return x

    return jax.jit(chain)


def alone(run: Callable[..., jax.Array], given: Sequence[jax.Array], calls: int) -> float:
    """Return the microseconds of a call until its result is there."""
    begin = time.perf_counter()
    for _ in range(calls):
        run(*given).block_until_ready()
    return (time.perf_counter() - begin) / calls * 1e6


def in_a_row(run: Callable[..., jax.Array], given: Sequence[jax.Array], calls: int) -> float:
    """Return the microseconds of a call where the next does not wait for it."""
    begin = time.perf_counter()
    for _ in range(calls):
        made = run(*given)
    made.block_until_ready()
    return (time.perf_counter() - begin) / calls * 1e6


def measured(
    sides: Mapping[str, Callable[..., jax.Array]],
    given: Sequence[jax.Array],
    calls: int,
    rounds: int,
) -> dict[str, tuple[float, float, float]]:
    """Return each side's three medians; raise RuntimeError where results differ."""
    single = {name: jax.jit(run) for name, run in sides.items()}
    chains = {name: chained(run, calls) for name, run in sides.items()}
    for functions in (single, chains):
        made = {name: np.asarray(run(*given)).view(np.uint16) for name, run in functions.items()}
        first, *others = made
        for other in others:
            if not np.array_equal(made[first], made[other]):
                raise RuntimeError(f"{other} and {first} differ")
    names, times = list(sides), {name: ([], [], []) for name in sides}
    for turn in range(rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            times[name][0].append(alone(single[name], given, calls))
            times[name][1].append(in_a_row(single[name], given, calls))
            times[name][2].append(alone(chains[name], given, 5) / calls)
    return {name: tuple(map(statistics.median, found)) for name, found in times.items()}


def main() -> None:
    """Print a row for each side and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", default="1,4096")
    parser.add_argument("--C", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=86, help="in a row, and in a chain")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    packages = ("jax", "jax-tvm-ffi", "apache-tvm-ffi")
    print(", ".join(f"{name} {version(name)}" for name in packages), end=", ")
    print(f"{jax.devices()[0].device_kind}, combine, n = {N}, C = {args.C}, microseconds")
    print(f"| T | handler | alone | in a row of {args.calls} | in a chain of {args.calls} |")
    print("|---|---|---|---|---|", flush=True)

    def ours(*arrays: jax.Array) -> jax.Array:
        return mhc.combine(*arrays, backend="jax-cuda")

    for T in map(int, args.T.split(",")):
        given = arrays_of(T, args.C)
        sides = {"mhc-core": ours, **through_tvm(given, f"mhc_combine_{T}")}
        for name, found in measured(sides, given, args.calls, args.rounds).items():
            print(f"| {T} | {name} | {' | '.join(f'{one:.1f}' for one in found)} |", flush=True)


if __name__ == "__main__":
    main()
