"""Compute on a CPU what TF32 in the toy layer's product does to the golden cases of families.

MHC_GOLDEN_FAMILIES=FOLDER python tests/gpu/tf32_layer.py docs/records/families-2026-12-01-h200.txt

It reads what ``families.py`` printed for mlx-cuda, runs each case that differed by mlx-compiled
with the operands of that product rounded to TF32 (10 bits after the leading one, to nearest), and
prints each array's distance from the golden one beside the GPU's, and the range of their ratios.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
from golden import MlxOps, problems, run
from test_golden_families import CASES, FORMS

TIMES = re.compile(r"(\S+): ([\d.]+) times")


def rounded(a: Any) -> Any:
    """Round float32 to TF32, as tensor cores read it from MLX."""
    return ((a.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


@mx.custom_function
def product(x: Any, W: Any) -> Any:
    """Return x @ W."""
    return rounded(x) @ rounded(W)


@product.vjp
def pulled(primals: Any, g: Any, _: Any) -> Any:
    """Pull g back by two products of the same kind."""
    x, W = map(rounded, primals)
    g = rounded(g)
    return g @ W.T, x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])


class Ops(MlxOps):
    """MLX's ops with TF32 in the toy layer."""

    def layer(self, h: Any, W: Any) -> Any:
        wide = self.cast(h, W)
        return self.cast(self.unary("tanh", product(wide, W) if W.ndim == 2 else wide * W), h)


def main() -> None:
    """Compare with the file that the command line names."""
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    told = [re.match(r"mlx-cuda (\S+) differs: (.*)", line) for line in lines]
    seen = {found[1]: TIMES.findall(found[2]) for found in told if found}
    ratios: list[float] = []
    for case in CASES:
        if str(case) in seen:
            made = problems(case, run(Ops("mlx-compiled"), case, FORMS[case.variant], "f32"), "f32")
            here = dict(TIMES.findall("; ".join(made)))
            pairs = [(name, there, here.get(name, "0")) for name, there in seen[str(case)]]
            ratios += [float(ours) / float(there) for _, there, ours in pairs]
            print(case, "; ".join(f"{name} {there} {ours}" for name, there, ours in pairs))
    print(f"{len(ratios)} arrays: ratios from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
