"""One small call of every op, from the kit's cases; in float64, to compare gradients closely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import mhc_core as mhc
from mhc_conformance.cases import Sizes, data
from mhc_conformance.telling import SECOND
from mhc_core import math

N, C, T = 3, 5, 2
M = N * N + 2 * N
VARIANT = mhc.Variant(norm_eps=1e-6, pre_eps=1e-6, sinkhorn_iterations=3, sinkhorn_eps=1e-6)
LOG = mhc.Variant(sinkhorn_iterations=3, res_transposed=True)

STREAMS, LAYER, HIDDEN = (T, N, C), (T, C), (T, N * C)
PRE, RES = (T, N), (T, N, N)
PROJECTION = ((M, N * C), (3,), (M,))


@dataclass(frozen=True)
class Call:
    """An op, the shapes of its arrays, and its static arguments."""

    op: str
    shapes: Sequence[tuple[int, ...]]
    static: dict[str, Any] = field(default_factory=dict)
    absent: tuple[int, ...] = ()  # the places of arrays that are None

    def function(self, *arrays: torch.Tensor) -> Any:
        """Call the public op."""
        return getattr(mhc, self.op)(*arrays, **self.static)

    def placed(self, arrays: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Return arrays as the op takes them, with None for those that are absent."""
        every: list[torch.Tensor | None] = list(arrays)
        for place in self.absent:
            every.insert(place, None)
        return tuple(every)

    def neutral(self, *arrays: torch.Tensor) -> Any:
        """Call the neutral forward, of which plain autograd sees every operation."""
        return math.load(self.op).forward(*arrays, **self.static)

    def arrays(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[torch.Tensor]:
        """Draw the arrays, leaves of autograd's graph."""
        return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in self.shapes]


SMALL = Sizes((T,), N, C, "small, as gradients are compared with differences")
FEWEST = Sizes((2,), 2, 3, "smaller yet, as second derivatives are: one for each pair of numbers")
OTHER = {"mappings": {"variant": LOG}}  # beside the variant of the others


def _call(op: str, sizes: Sizes = SMALL) -> Call:
    """Return the call of an op that the kit takes second derivatives of, in these sizes."""
    case = next(case for case in SECOND if case.op == op)
    n = {"n": sizes.n} if "n" in case.options else {}
    static = {**case.options, **n, **OTHER.get(op, {})}
    case = replace(case, sizes=sizes, shared=False, static=tuple(static.items()))
    return Call(op, [array.shape for array in data(case, "float64", 0).primals], static)


CALLS = [_call(op) for op in math.OPS]
FEWEST_CALLS = [_call(op, FEWEST) for op in math.OPS]
(KNOPP,) = (call for call in CALLS if call.op == "sinkhorn_knopp")


def several(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return one output or many as a tuple, without those that are None."""
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(output for output in every if output is not None)


def loss(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Return a scalar function that depends on every entry of every output in its own way."""

    def weighted(*arrays: torch.Tensor) -> torch.Tensor:
        parts = []
        for output in several(function(*arrays)):
            weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype)
            parts.append((output * weights.reshape(output.shape)).sum())
        return torch.stack(parts).sum()

    return weighted


def gradients(function: Callable[..., Any], arrays: Sequence[torch.Tensor]) -> Any:
    """Differentiate that scalar by autograd."""
    return torch.autograd.grad(loss(function)(*arrays), arrays)


def assert_close(got: Any, want: Any, **tolerances: float) -> None:
    """Compare tensors, or tuples of them, shapes and dtypes too."""
    torch.testing.assert_close(several(got), several(want), **tolerances)
