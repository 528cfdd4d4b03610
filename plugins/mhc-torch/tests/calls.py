"""One small call of every op, in float64 so that gradients can be compared closely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import mhc_core as mhc
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

    def function(self, *arrays: torch.Tensor) -> Any:
        """Call the public op."""
        return getattr(mhc, self.op)(*arrays, **self.static)

    def neutral(self, *arrays: torch.Tensor) -> Any:
        """Call the neutral forward, of which plain autograd sees every operation."""
        return math.load(self.op).forward(*arrays, **self.static)

    def arrays(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[torch.Tensor]:
        """Draw the arrays, leaves of autograd's graph."""
        return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in self.shapes]


KNOPP = Call("sinkhorn_knopp", [RES], {"max_iterations": 5, "epsilon": 0.0, "log_space": True})
CALLS = [
    Call("aggregate", [STREAMS, PRE]),
    Call("combine", [STREAMS, LAYER, PRE, RES]),
    Call("combine_pre", [STREAMS, LAYER, PRE, RES, *PROJECTION], {"variant": VARIANT}),
    Call("contract", [STREAMS], {"how": "mean"}),
    Call("expand", [LAYER], {"n": N}),
    Call("gated_combine", [HIDDEN, HIDDEN, PRE, PRE, RES]),
    Call("head", [STREAMS, (N, N * C), (1,), (N,)], {"variant": VARIANT}),
    Call("mappings", [STREAMS, *PROJECTION], {"variant": LOG}),
    Call("pre", [STREAMS, *PROJECTION], {"variant": VARIANT}),
    Call("pre_scale", [HIDDEN, PRE]),
    Call("residual_add_aggregate", [STREAMS, STREAMS, PRE]),
    Call("rms_norm", [LAYER, (C,)], {"eps": 1e-5}),
    Call("sinkhorn", [RES], {"iterations": 3, "eps": 0.0, "first": "columns"}),
    KNOPP,
    Call("static_layer", [STREAMS, (N,), (N,), (N, N), (C,)], {"eps": 1e-5, "iterations": 3}),
    Call("static_mappings", [(N,), (N,), (N, N)], {"iterations": 3}),
]
assert tuple(call.op for call in CALLS) == math.OPS


def several(outputs: Any) -> tuple[torch.Tensor, ...]:
    """Return one output or many as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


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
