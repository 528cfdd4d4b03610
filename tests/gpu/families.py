"""Compare kernels on a GPU with what the released families of models compute.

python tests/gpu/families.py [--backends mlx-cuda,torch-cuda,jax-cuda] [--seconds 25]

The cases of tests/test_golden_families.py (``MHC_GOLDEN_FAMILIES=DIR`` names another set), outputs
and gradients in float32, by each library's own autodiff: one line for each backend and variant,
then what differs. The smallest case of each variant comes first; a backend that has had its seconds
says how many cases are left. The exit status is 1 if anything differs or is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

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


def ordered() -> list[Golden]:
    """Return the cases that float32 can tell, the smallest one of each variant first."""
    told = [case for case in CASES if not case.ill_conditioned_f32]
    cases = sorted(told, key=lambda case: sum(one.size for one in case.arrays.values()))
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Golden]] = []
    for case in cases:
        turns.append((seen[case.variant], case))
        seen[case.variant] += 1
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def differences(ops: NativeOps, case: Golden) -> list[str]:
    """Return what of a case differs, or the error that stopped it."""
    try:
        return problems(case, run(ops, case, FORMS[case.variant], "f32"), "f32")
    except Exception as error:  # the other cases still run
        return [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]


def checked(backend: str, seconds: float) -> bool:
    """Run the cases on a backend; return whether all agree."""
    begin, library = time.perf_counter(), backend.split("-")[0]
    ops, cases = OPS[library](backend), ordered()

    def report(case: Golden) -> list[str] | None:
        return None if time.perf_counter() - begin > seconds else differences(ops, case)

    with ThreadPoolExecutor(THREADS) as pool:  # JAX compiles each case, without Python's lock
        reports = list((pool.map if library == "jax" else map)(report, cases))
    agreed = Counter(c.variant for c, one in zip(cases, reports, strict=True) if one == [])
    for variant in FORMS:
        of = sum(case.variant == variant for case in cases)
        print(f"{backend} {variant}: {agreed[variant]} of {of} agree")
    for case, one in zip(cases, reports, strict=True):
        if one:
            print(f"{backend} {case} differs: {'; '.join(one)}")
    left, took = reports.count(None), time.perf_counter() - begin
    print(
        f"{backend}: {agreed.total()} of {len(cases)} agree, {left} left, {took:.0f} s", flush=True
    )
    return agreed.total() == len(cases)


def main() -> None:
    """Check each backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", default="mlx-cuda,torch-cuda,jax-cuda")
    parser.add_argument("--seconds", type=float, default=25, help="for each backend")
    args = parser.parse_args()
    if "jax" in args.backends:  # whose product with the toy layer's weight is in TF32 otherwise
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
    agree = [checked(backend, args.seconds) for backend in args.backends.split(",")]
    sys.exit(not all(agree))


if __name__ == "__main__":
    main()
