"""Second derivatives in MLX: reverse over reverse, against differences of float64 gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_conformance import Subject, oracle
from mhc_conformance.cases import Case, Sizes, cases, data, with_variant
from mhc_core import math

Array = NDArray[Any]
Function = Callable[..., Any]

SIZES = Sizes((3,), 2, 4, "one leading axis, to map over")
VARIANT = replace(
    mhc.LIGER, norm_eps=1e-2, pre_eps=3e-2, post_scale=1.5, sinkhorn_iterations=3, sinkhorn_eps=2e-2
)


def _tuple(arrays: Any) -> tuple[Any, ...]:
    return tuple(arrays) if isinstance(arrays, (tuple, list)) else (arrays,)


def _case(op: str, optional: bool = False) -> Case:
    case = next(c for c in cases(op) if c.optional == optional)
    static = tuple((k, min(v, 3) if k == "iterations" else v) for k, v in case.static)
    if "variant" in case.options:
        static = with_variant(op, VARIANT, h_norm_eps=1e-3, h_raw=True)
    return replace(case, sizes=SIZES, static=static)


CASES = {op: _case(op) for op in math.OPS} | {
    "combine_pre, h_pre given": _case("combine_pre", optional=True),
    "sinkhorn, eps": replace(
        _case("sinkhorn"), static=(("iterations", 3), ("eps", 0.1), ("first", "rows"))
    ),
}


class _Trial:
    """The function <d, gradient of a loss>, whose gradient is the Hessian's product with d.

    The loss is sum c sin(outputs): in a sum of the outputs alone, much would be constant.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        subject = Subject("mlx-compiled")
        self.primals, self.cotangents = data(case, "float32", 0)
        rng = np.random.default_rng(7)
        self.along = [rng.normal(size=p.shape).astype(np.float32) for p in self.primals]
        self.own = subject.take(self.primals)
        self.function = subject.function(case)
        self.all = list(range(len(self.own)))

    def loss(self, function: Function) -> Function:
        given = [mx.array(c) for c in self.cotangents]

        def loss(*primals: mx.array) -> mx.array:
            outputs = _tuple(function(*primals))
            return sum((c * mx.sin(o)).sum() for c, o in zip(given, outputs, strict=True))

        return loss

    def gradient(self, function: Function) -> Function:
        of_loss = mx.grad(self.loss(function), argnums=self.all)
        return lambda *primals: _tuple(of_loss(*primals))  # a list of one argument gives no list

    def product(self, function: Function) -> Function:
        gradient = self.gradient(function)
        along = [mx.array(d) for d in self.along]

        def product(*primals: mx.array) -> mx.array:
            return sum((d * g).sum() for d, g in zip(along, gradient(*primals), strict=True))

        return product

    def gradients(self, primals: Sequence[Array]) -> Sequence[Array]:
        """Return the loss's gradients in float64."""
        outputs = oracle.forward(self.case.op, primals, **self.case.options)
        pairs = zip(self.cotangents, _tuple(outputs), strict=True)
        given = [c.astype(np.float64) * np.cos(o) for c, o in pairs]
        return oracle.gradients(self.case.op, primals, given, **self.case.options)

    def check(self, got: Any) -> None:
        """Compare second derivatives with differences of the oracle's gradients."""
        step = 1e-5
        ends = [
            self.gradients(
                [
                    p.astype(np.float64) + s * d
                    for p, d in zip(self.primals, self.along, strict=True)
                ]
            )
            for s in (step, -step)
        ]
        for one, up, down in zip(_tuple(got), *ends, strict=True):
            want = (up - down) / (2 * step)
            scale = max(np.abs(want).max(), np.abs(ends[0][0]).max() * 1e-3)
            assert np.abs(np.array(one) - want).max() < 2e-4 * scale


def _of_grad(trial: _Trial) -> Any:
    return mx.grad(trial.product(trial.function), argnums=trial.all)(*trial.own)


def _compiled(trial: _Trial) -> Any:
    return mx.compile(mx.grad(trial.product(trial.function), argnums=trial.all))(*trial.own)


def _of_checkpoint(trial: _Trial) -> Any:
    product = trial.product(mx.checkpoint(trial.function))
    return mx.grad(product, argnums=trial.all)(*trial.own)


def _forward_over_reverse(trial: _Trial) -> Any:
    gradient = trial.gradient(trial.function)
    along = [mx.array(d) for d in trial.along]
    return mx.jvp(gradient, list(trial.own), along)[1]


def _vmap(trial: _Trial) -> Any:
    """Map the product over two directions, one of which is d."""
    gradient = trial.gradient(trial.function)

    def one(*along: mx.array) -> Any:
        def product(*primals: mx.array) -> mx.array:
            return sum((d * g).sum() for d, g in zip(along, gradient(*primals), strict=True))

        return _tuple(mx.grad(product, argnums=trial.all)(*trial.own))

    both = [mx.stack([mx.array(-2 * d), mx.array(d)]) for d in trial.along]
    return [g[1] for g in mx.vmap(one)(*both)]


def _vmap_of_jvp(trial: _Trial) -> Any:
    gradient = trial.gradient(trial.function)

    def one(*along: mx.array) -> Any:
        return tuple(mx.jvp(gradient, list(trial.own), list(along))[1])

    both = [mx.stack([mx.array(-2 * d), mx.array(d)]) for d in trial.along]
    return [g[1] for g in mx.vmap(one)(*both)]


WAYS = {
    "grad of grad": _of_grad,
    "compiled": _compiled,
    "through checkpoint": _of_checkpoint,
    "jvp of grad": _forward_over_reverse,
    "vmap of grad of grad": _vmap,
    "vmap of jvp of grad": _vmap_of_jvp,
}


# The other ways depend on what the custom functions are made of, not on the op: three of them
# save nothing, outputs, and other things too, for all tokens or each.
_TRIED = [(case, "grad of grad") for case in CASES] + [
    (case, way)
    for case in ("combine", "combine_pre", "static_layer")
    for way in WAYS
    if way != "grad of grad" and (way, case) != ("compiled", "combine_pre")  # g++ takes a minute
]


@pytest.mark.parametrize(("case", "way"), _TRIED)
def test_second_derivatives(case: str, way: str) -> None:
    trial = _Trial(CASES[case])
    trial.check(WAYS[way](trial))
