"""Compare kernels on a GPU with what the released families of models compute.

python tests/gpu/families.py [--backends mlx-cuda,torch-cuda,jax-cuda] [--seconds 25] [--jobs N]

The cases of tests/test_golden_families.py (``MHC_GOLDEN_FAMILIES=DIR`` names another set), outputs
and gradients in float32, by each library's own autodiff: one line for each backend and variant,
then what differs. The smallest case of each variant comes first; a backend that has had its seconds
says how many cases are left. The exit status is 1 if anything differs or is left.

``--jobs N`` gives each backend N processes, which compile side by side: each has every N-th case,
by size. The report is the same. One that dies is what differs in its cases.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

# the toy layer's product, before MLX is imported; the ops do not depend on it
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from golden import Golden, JaxOps, MlxOps, NativeOps, problems, run
from test_golden_families import CASES, FORMS


class TorchOps(NativeOps):
    """``torch.autograd`` through our ops."""

    def __init__(self, backend: str) -> None:
        import torch

        self.backend = backend
        self.xp = torch
        self.device = "cuda" if backend.endswith("cuda") else "cpu"

    def from_numpy(self, array: Any, dtype: Any = None) -> Any:
        return self.xp.from_numpy(array.copy()).to(self.device, dtype)

    def concatenate(self, parts: Sequence[Any], axis: int = 0) -> Any:
        return self.xp.cat(list(parts), dim=axis)

    def total(self, a: Any, axis: int) -> Any:
        return a.sum(dim=axis, keepdim=True)

    def cast(self, a: Any, like: Any) -> Any:
        return a.to(like.dtype)

    def differentiate(
        self,
        function: Callable[..., list[Any]],
        primals: list[Any],
        cotangents: Callable[[list[Any]], list[Any]],
    ) -> tuple[list[Any], Sequence[Any]]:
        varied = [one.detach().requires_grad_() for one in primals]
        outputs = function(*varied)
        gradients = self.xp.autograd.grad(outputs, varied, cotangents(outputs))
        return [one.detach().cpu() for one in outputs], [one.cpu() for one in gradients]


OPS: dict[str, type[Any]] = {"mlx": MlxOps, "torch": TorchOps, "jax": JaxOps}
THREADS = 8


def size(case: Golden) -> int:
    """Return how many numbers a case has."""
    return sum(one.size for one in case.arrays.values())


def ordered() -> list[Golden]:
    """Return the cases that float32 can tell, the smallest one of each variant first."""
    cases = sorted((case for case in CASES if not case.ill_conditioned_f32), key=size)
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Golden]] = []
    for case in cases:
        turns.append((seen[case.variant], case))
        seen[case.variant] += 1
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def shares(jobs: int) -> list[list[int]]:
    """Return the numbers of each process's cases, in order; each has small and large ones."""
    cases = ordered()
    by_size = sorted(range(len(cases)), key=lambda number: size(cases[number]))
    return [sorted(by_size[first::jobs]) for first in range(min(jobs, len(cases)))]


def differences(ops: NativeOps, case: Golden) -> list[str]:
    """Return what of a case differs, or the error that stopped it."""
    try:
        return problems(case, run(ops, case, FORMS[case.variant], "f32"), "f32")
    except Exception as error:  # the other cases still run
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]


def reports(
    backend: str, seconds: float, numbers: Sequence[int], threads: int
) -> list[list[str] | None]:
    """Return what differs in each of these cases, or None for those that are left."""
    library = backend.split("-")[0]
    if library == "jax":  # whose product with the toy layer's weight is in TF32 otherwise
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    begin = time.perf_counter()
    ops, cases = OPS[library](backend), ordered()

    def report(number: int) -> list[str] | None:
        late = time.perf_counter() - begin > seconds
        return None if late else differences(ops, cases[number])

    with ThreadPoolExecutor(threads) as pool:  # JAX compiles each case, without Python's lock
        return list((pool.map if library == "jax" else map)(report, numbers))


def side_by_side(backend: str, seconds: float, jobs: int) -> list[list[str] | None]:
    """Return what differs in every case, of processes with a share each."""
    found: list[list[str] | None] = [None] * len(ordered())
    with ExitStack() as stack:
        spawn, running = get_context("spawn"), []
        for numbers in shares(jobs):  # a pool each: one process that dies ends a whole pool
            pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
            given = (backend, seconds, numbers, max(2, THREADS // jobs))
            running.append((numbers, pool.submit(reports, *given)))
        for numbers, future in running:
            try:
                made = future.result()
            except Exception as error:
                made = [[f"{type(error).__name__}: {error}"]] * len(numbers)
            for number, one in zip(numbers, made, strict=True):
                found[number] = one
    return found


def checked(backend: str, seconds: float, jobs: int) -> bool:
    """Run the cases on a backend; return whether all agree."""
    begin, cases = time.perf_counter(), ordered()
    if jobs > 1:
        found = side_by_side(backend, seconds, jobs)
    else:
        found = reports(backend, seconds, range(len(cases)), THREADS)
    agreed = Counter(c.variant for c, one in zip(cases, found, strict=True) if one == [])
    for variant in FORMS:
        of = sum(case.variant == variant for case in cases)
        print(f"{backend} {variant}: {agreed[variant]} of {of} agree")
    for case, one in zip(cases, found, strict=True):
        if one:
            print(f"{backend} {case} differs: {'; '.join(one)}")
    left, took = found.count(None), time.perf_counter() - begin
    print(
        f"{backend}: {agreed.total()} of {len(cases)} agree, {left} left, {took:.0f} s", flush=True
    )
    return agreed.total() == len(cases)


def main() -> None:
    """Check each backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="mlx-cuda,torch-cuda,jax-cuda")
    parser.add_argument("--seconds", type=float, default=25, help="for each backend")
    parser.add_argument("--jobs", type=int, default=1, help="processes for each backend")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; needs at least 1")
    if args.jobs > 1:  # JAX takes three quarters of a GPU's memory otherwise, in each process
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    agree = [checked(backend, args.seconds, args.jobs) for backend in args.backends.split(",")]
    sys.exit(not all(agree))


if __name__ == "__main__":
    main()
