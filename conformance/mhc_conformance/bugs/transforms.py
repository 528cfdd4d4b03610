"""Bugs of transforms, put into the MLX backend, since NumPy has no transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from mhc_conformance.bugs.declaration import bug, right, right_vjp
from mhc_core.math import load


@bug(
    "weight-without-grad",
    "a norm weight ignored under no-grad",
    op="rms_norm",
    fails=("forward", "checkpoint"),
    says="y of",
    library="mlx-compiled",
)
def weightless_unless_traced(x: Any, weight: Any, *, eps: float) -> Any:
    """Run a fast path without the weight, unless MLX is tracing."""
    import mlx.core as mx

    try:
        mx.async_eval(x)  # not eval, which mx.grad allows
    except ValueError:  # MLX's word for a value that is being traced
        return right("rms_norm")(x, weight, eps=eps)
    return right("rms_norm")(x, mx.ones_like(weight), eps=eps)


@bug(
    "float-inside-compile",
    "float() on arrays inside compile",
    op="sinkhorn_knopp",
    fails=("compile", "vmap"),
    says="raised ValueError",
    library="mlx-compiled",
)
def looking_at_values(matrix: Any, *, max_iterations: int, epsilon: float, log_space: bool) -> Any:
    """Look at values with float(), which MLX's compiler cannot trace."""
    import mlx.core as mx

    options: dict[str, Any] = {"epsilon": epsilon, "log_space": log_space}
    if matrix.size and float(mx.max(matrix)) == -math.inf:
        raise ValueError("sinkhorn_knopp: a matrix of -inf has no doubly stochastic one")
    return right("sinkhorn_knopp")(matrix, max_iterations=max_iterations, **options)


@bug(
    "captured-arrays",
    "gradients dropped for captured arrays",
    op="rms_norm",
    fails=("grad", "compile", "checkpoint", "second"),
    says="d weight of",
    library="mlx-compiled",
)
def capturing(x: Any, weight: Any, *, eps: float) -> Any:
    """Capture the weight in an MLX custom function, so that its gradient is silently zero."""
    import mlx.core as mx

    def norm(x: Any) -> Any:
        return right("rms_norm")(x, weight, eps=eps)

    def back(x: Any, g: Any, _: Any) -> Any:
        return right_vjp("rms_norm", (x, weight), (g,), eps=eps)[0]

    captured = mx.custom_function(norm)
    captured.vjp(back)
    return captured(x)


@bug(
    "nan-through-where",
    "NaN gradients from where(s > eps, 1/s, ...) at s = 0",
    op="rms_norm",
    half="vjp",
    says="d x of a token of zeros",
    library="mlx-compiled",
)
def through_where(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    """Differentiate MLX's where; its other branch is 0 times inf at s = 0."""
    import mlx.core as mx

    def guarded(*arrays: Any) -> list[Any]:
        return [_guarded_norm(mx, *arrays, **static)]

    return tuple(mx.vjp(guarded, list(primals), list(cotangents))[1])


@bug(
    "saved-cotangents-dropped",
    "the cotangents of saved outputs dropped: second derivatives wrong",
    op="pre",
    fails=("second",),
    says="d phi of second derivatives",
    library="mlx-compiled",
    shipped=False,
)
def dropping_saved(*arrays: Any, variant: Any) -> Any:
    """Save what the vjp needs as outputs of an MLX custom function, and drop their cotangents.

    First gradients are right. Second derivatives lose the cotangents of u, r and h_pre.
    """
    import mlx.core as mx

    def forward(*primals: Any) -> Any:
        outputs, saved = load("pre").forward_with_saved(*primals, variant=variant)
        return (*outputs, *saved)

    def back(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return load("pre").vjp(primals, cotangents[:3], outputs[3:], variant=variant)

    function = mx.custom_function(forward)
    function.vjp(back)
    return tuple(cast("Sequence[Any]", function(*arrays))[:3])


def _guarded_norm(mx: Any, x: Any, weight: Any, *, eps: float) -> Any:
    """Compute 1 / (s + eps) as 1 / s, and as 1 / eps where s is 0: right in the forward."""
    s = mx.mean(x * x, axis=-1, keepdims=True)
    inverse = mx.where(s > 0, (1 / s) / (1 + eps / s), 1 / (eps or 1))
    return x * mx.sqrt(inverse) * weight
