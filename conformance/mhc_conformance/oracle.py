"""Every op of mHC in float64, written from the formulas, with gradients from the tape.

Shapes: streams x ``[..., n, C]``, layer outputs y ``[..., C]``, H_pre and H_post ``[..., n]``,
H_res ``[..., n, n]`` with ``x'_i = sum_j H_res[i, j] x_j``. H_pre, H_post and H_res are per
token, or shared by all tokens (``[n]`` and ``[n, n]``).

An op takes and returns values of the tape. ``forward`` and ``gradients`` call one by name on
arrays of any float dtype, which are raised to float64 exactly.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from mhc_conformance.autodiff import (
    Array,
    Value,
    broadcast_to,
    clip,
    exp,
    inverse,
    largest,
    logsumexp,
    maximum,
    pull_back,
    real_part,
    sigmoid,
    straight_through,
    total,
    value,
    where,
)

__all__ = ["OPS", "Variant", "forward", "gradients", "op"]


class Variant(Protocol):
    """The fields that the oracle reads from a variant."""

    @property
    def norm_eps(self) -> float: ...
    @property
    def pre_eps(self) -> float: ...
    @property
    def post_scale(self) -> float: ...
    @property
    def post_eps(self) -> float: ...
    @property
    def sinkhorn_iterations(self) -> int: ...
    @property
    def sinkhorn_eps(self) -> float: ...
    @property
    def sinkhorn_first(self) -> str: ...
    @property
    def sinkhorn_start(self) -> str: ...
    @property
    def sinkhorn_clamp(self) -> tuple[float, float] | None: ...
    @property
    def res_transposed(self) -> bool: ...
    @property
    def norm_root_eps(self) -> float: ...
    @property
    def mixer(self) -> str: ...
    @property
    def mixer_options(self) -> Mapping[str, Any] | tuple[tuple[str, Any], ...]: ...


Result: TypeAlias = "Value | tuple[Value | None, ...]"
Function = TypeVar("Function", bound=Callable[..., Result])

OPS: dict[str, Callable[..., Result]] = {}
"""Every op by its name."""

MIXERS: dict[str, Callable[..., Value]] = {}
"""Every mixer but Sinkhorn's, by its name: H_res of logits [..., L], of n, and of its options."""


def op(function: Function) -> Function:
    """Register an op of the oracle, under its function's name."""
    OPS[function.__name__] = function
    return function


# --- Sinkhorn ---------------------------------------------------------------------------------


@op
def sinkhorn(
    logits: Value, iterations: int = 20, eps: float = 0.0, first: str = "columns"
) -> Value:
    """Normalise the lines of ``exp(logits)`` in turn, columns or rows first.

    The log domain of eps=0 is the division form without its overflow: ``L -= log(sum exp L)``
    divides by the sum.
    """
    a, b = _lines(first)
    if eps == 0:
        for _ in range(iterations):
            logits = logits - logsumexp(logits, a)
            logits = logits - logsumexp(logits, b)
        return exp(logits)
    matrix = exp(logits - logsumexp(logits, a)) + eps
    matrix = matrix / (total(matrix, b) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (total(matrix, a) + eps)
        matrix = matrix / (total(matrix, b) + eps)
    return matrix


def _lines(first: str) -> tuple[int, int]:
    """Return the axes to sum over, first and second: a column is summed over its rows, axis -2."""
    if first not in ("columns", "rows"):
        raise ValueError(f"sinkhorn: first is {first!r}; needs 'columns' or 'rows'")
    return (-2, -1) if first == "columns" else (-1, -2)


@op
def sinkhorn_knopp(
    matrix: Value, max_iterations: int = 100, epsilon: float = 1e-6, log_space: bool = True
) -> Value:
    """Normalise rows, then columns, until every line of a matrix sums to 1 within epsilon.

    Each matrix of a batch stops by itself, after a whole step. ``log_space=False`` starts from
    ``max(exp(matrix), 1e-10)`` and divides.
    """
    current = matrix if log_space else maximum(exp(matrix), 1e-10)
    running = np.ones((*matrix.shape[:-2], 1, 1), dtype=np.bool_)
    for _ in range(max_iterations):
        if not running.any():
            break
        following = current
        for line in (-1, -2):
            if log_space:
                following = following - logsumexp(following, line)
            else:
                following = following / total(following, line)
        current = where(running, following, current)
        running = running & ~_converged(current, epsilon, log_space)
    return exp(current) if log_space else current


def _converged(current: Value, epsilon: float, log_space: bool) -> NDArray[np.bool_]:
    """Return whether each matrix has met both conditions, as ``[..., 1, 1]``."""
    # A decision, not a quantity: it is taken on values and has no derivative.
    entries = real_part(current.data)
    matrix = np.exp(entries) if log_space else entries
    errors = [np.abs(np.sum(matrix, axis=axis, keepdims=True) - 1.0) for axis in (-1, -2)]
    largest = [np.max(error, axis=(-1, -2), keepdims=True) for error in errors]
    return (largest[0] < epsilon) & (largest[1] < epsilon)


# --- other mixers -----------------------------------------------------------------------------


def mixer(name: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a mixer of the oracle, by the name that variants give."""

    def register(function: Callable[..., Value]) -> Callable[..., Value]:
        MIXERS[name] = function
        return function

    return register


@mixer("mhc-lite")
def _mean_of_permutations(logits: Value, n: int) -> Value:
    """Return the transposed mean of all permutation matrices, in lexicographic order."""
    weights = exp(logits - logsumexp(logits, -1))
    rows = (np.eye(n)[list(p)] for p in itertools.permutations(range(n)))
    return _weighted(weights, list(rows)).swapaxes(-1, -2)


@mixer("kromhc")
def _kronecker(logits: Value, n: int) -> Value:
    """Return the Kronecker product of 2 x 2 mixes, the first logits' outermost."""
    product, swap = None, np.array([[0.0, 1.0], [1.0, 0.0]])
    for k in range(0, logits.shape[-1], 2):
        pair = logits[..., k : k + 2]
        factor = _weighted(exp(pair - logsumexp(pair, -1)), [np.eye(2), swap])
        if product is None:
            product = factor
            continue
        outer = product[..., :, None, :, None] * factor[..., None, :, None, :]
        size = 2 * product.shape[-1]
        product = outer.reshape(*logits.shape[:-1], size, size)
    assert product is not None
    return product


@mixer("circulant")
def _shifts(logits: Value, n: int, gamma: float) -> Value:
    """Return the mean of the cyclic shifts, of which gamma moves."""
    weights = gamma * exp(logits - logsumexp(logits, -1))
    return (1 - gamma) * np.eye(n) + _weighted(
        weights, [np.roll(np.eye(n), k, axis=1) for k in range(n)]
    )


@mixer("go-mhc")
def _orthostochastic(logits: Value, n: int, s: int) -> Value:
    """Return the means over blocks of Q squared, with Q Cayley's of theta - theta^T."""
    size = n * s
    theta = logits.reshape(*logits.shape[:-1], size, size)
    skew = theta - theta.swapaxes(-1, -2)
    q = inverse(np.eye(size) - skew) @ (skew + np.eye(size))
    rows: Array = np.repeat(np.eye(n), s, axis=1)  # [n, n s]: 1 where a row belongs to a stream
    return value(rows) @ (q * q) @ value(np.transpose(rows)) / s


@mixer("sinkhorn-limit")
def _doubly_stochastic(logits: Value, n: int) -> Value:
    """Return Sinkhorn after so many iterations that no more of them change it."""
    return sinkhorn(logits.reshape(*logits.shape[:-1], n, n), 400)


def _weighted(weights: Value, matrices: Sequence[Array]) -> Value:
    """Return ``sum_k weights[..., k] matrices[k]``."""
    return sum(
        (weights[..., k, None, None] * matrix for k, matrix in enumerate(matrices[1:], 1)),
        weights[..., 0, None, None] * matrices[0],
    )


# --- mappings ---------------------------------------------------------------------------------


@op
def mappings(
    x: Value, phi: Value, scale: Value, bias: Value, variant: Variant
) -> tuple[Value, Value, Value | None]:
    """Return H_pre, H_post and H_res of every token (eqs. 7-8 and 14-19)."""
    n = x.shape[-2]
    z = project(x, phi, variant)
    z_pre = z[..., :n] * scale[0] + bias[:n]
    z_post = z[..., n : 2 * n] * scale[1] + bias[n : 2 * n]
    H_res = None
    if variant.mixer != "identity":
        H_res = _mixed(z[..., 2 * n :] * scale[2] + bias[2 * n :], n, variant)
    H_post = variant.post_scale * sigmoid(z_post) + variant.post_eps
    return sigmoid(z_pre) + variant.pre_eps, H_post, H_res


def _mixed(z_res: Value, n: int, variant: Variant) -> Value:
    """Return H_res of its logits, in the paper's orientation."""
    if variant.mixer == "sinkhorn":
        logits = z_res.reshape(*z_res.shape[:-1], n, n)
        return _doubly(logits.swapaxes(-1, -2) if variant.res_transposed else logits, variant)
    H_res = MIXERS[variant.mixer](z_res, n, **dict(variant.mixer_options))
    return H_res.swapaxes(-1, -2) if variant.res_transposed else H_res


def _doubly(logits: Value, variant: Variant) -> Value:
    """Return Sinkhorn's matrix, in a variant's way."""
    iterations, eps = variant.sinkhorn_iterations, variant.sinkhorn_eps
    if variant.sinkhorn_clamp is not None:
        logits = clip(logits, *variant.sinkhorn_clamp)
    if variant.sinkhorn_start == "softmax" or eps == 0:  # without eps, the starts are the same
        return sinkhorn(logits, iterations, eps, variant.sinkhorn_first)
    lines = _lines(variant.sinkhorn_first)
    matrix = exp(logits - largest(logits, lines[0]))  # which has its share of the gradient
    for _ in range(iterations):
        for line in lines:
            matrix = matrix / (total(matrix, line) + eps)
    return matrix


def project(x: Value, phi: Value, variant: Variant) -> Value:
    """Return ``(vec(x) @ phi.T) / (sqrt(mean(vec(x)^2) + norm_eps) + norm_root_eps)``, by rows."""
    leading, size = x.shape[:-2], x.shape[-2] * x.shape[-1]
    vec = x.reshape(math.prod(leading), size)
    mean = total(vec * vec, -1) / size + variant.norm_eps
    r = (mean**0.5 + variant.norm_root_eps) ** -1.0 if variant.norm_root_eps else mean**-0.5
    return (vec @ phi.swapaxes(0, 1) * r).reshape(*leading, phi.shape[0])


@op
def static_mappings(
    h_pre_raw: Value, h_post_raw: Value, h_res_raw: Value, iterations: int = 20
) -> tuple[Value, Value, Value]:
    """Return the mappings of the static forms, from parameters alone."""
    H_res = sinkhorn(h_res_raw, iterations, 0.0, "rows")
    return sigmoid(h_pre_raw), 2.0 * sigmoid(h_post_raw), H_res


# --- streams ----------------------------------------------------------------------------------


@op
def aggregate(x: Value, h_pre: Value) -> Value:
    """Return ``sum_i H_pre_i x_i``."""
    return _drop(total(h_pre[..., None] * x, -2))


@op
def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
    """Return ``H_res x + H_post (outer) y``, with no H_res where the streams are not mixed."""
    return (x if h_res is None else h_res @ x) + h_post[..., None] * y[..., None, :]


@op
def pre(
    x: Value, phi: Value, scale: Value, bias: Value, variant: Variant
) -> tuple[Value, Value, Value | None]:
    """Return h, H_post and H_res: the mappings, and the aggregate."""
    H_pre, H_post, H_res = mappings(x, phi, scale, bias, variant)
    return aggregate(x, H_pre), H_post, H_res


@op
def combine_pre(
    x: Value,
    y: Value,
    h_post: Value,
    h_res: Value | None,
    phi: Value,
    scale: Value,
    bias: Value,
    h_pre: Value | None = None,
    *,
    variant: Variant,
    x_rounded: NDArray[Any] | None = None,
) -> tuple[Value, Value, Value, Value, Value | None]:
    """Return x', h' and the mappings: a sublayer's combine, then the next one's pre.

    h' is collapsed with h_pre where it is given (V4.1), else with the H_pre' found here.
    ``x_rounded`` is what the second half reads in place of x': a library that stores the streams
    in fewer bits reads them back as stored.
    """
    x_next = combine(x, y, h_post, h_res)
    stored = x_next if x_rounded is None else straight_through(x_next, _raised(x_rounded))
    H_pre, H_post, H_res = mappings(stored, phi, scale, bias, variant)
    h = aggregate(stored, H_pre if h_pre is None else h_pre)
    return x_next, h, H_pre, H_post, H_res


@op
def pre_residual(
    x: Value, phi: Value, scale: Value, bias: Value, variant: Variant
) -> tuple[Value, Value, Value | None, Value]:
    """Return pre's outputs, and the streams themselves."""
    return *pre(x, phi, scale, bias, variant), x


@op
def pre_norm(
    x: Value,
    phi: Value,
    scale: Value,
    bias: Value,
    h_norm_weight: Value,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
    h_rounded: NDArray[Any] | None = None,
) -> tuple[Value, Value, Value | None, Value | None]:
    """Return pre's h after an RMS norm, H_post, H_res and, where it is wanted, h itself.

    ``h_rounded`` is what the norm reads in place of h, as ``x_rounded`` in :func:`combine_pre`.
    """
    h, H_post, H_res = pre(x, phi, scale, bias, variant)
    stored = h if h_rounded is None else straight_through(h, _raised(h_rounded))
    return rms_norm(stored, h_norm_weight, h_norm_eps), H_post, H_res, h if h_raw else None


@op
def combine_pre_norm(
    x: Value,
    y: Value,
    h_post: Value,
    h_res: Value | None,
    phi: Value,
    scale: Value,
    bias: Value,
    h_norm_weight: Value,
    h_pre: Value | None = None,
    *,
    variant: Variant,
    h_norm_eps: float,
    h_raw: bool,
    x_rounded: NDArray[Any] | None = None,
    h_rounded: NDArray[Any] | None = None,
) -> tuple[Value, Value, Value, Value, Value | None, Value | None]:
    """Return combine_pre's outputs with h' after an RMS norm and, where it is wanted, h' itself."""
    arrays = (x, y, h_post, h_res, phi, scale, bias, h_pre)
    outputs = combine_pre(*arrays, variant=variant, x_rounded=x_rounded)
    x_next, h, H_pre, H_post, H_res = outputs
    stored = h if h_rounded is None else straight_through(h, _raised(h_rounded))
    normed = rms_norm(stored, h_norm_weight, h_norm_eps)
    return x_next, normed, H_pre, H_post, H_res, h if h_raw else None


@op
def head(x: Value, phi: Value, scale: Value, bias: Value, variant: Variant) -> Value:
    """Return the streams collapsed before the output: one sigmoid weight for each."""
    weights = sigmoid(project(x, phi, variant) * scale + bias) + variant.pre_eps
    return aggregate(x, weights)


@op
def expand(h: Value, n: int) -> Value:
    """Return the n equal streams that a model starts from."""
    return broadcast_to(h[..., None, :], (*h.shape[:-1], n, h.shape[-1]))


@op
def contract(x: Value, how: str = "sum") -> Value:
    """Return the sum or the mean of the streams."""
    if how not in ("sum", "mean"):
        raise ValueError(f"contract: how is {how!r}; needs 'sum' or 'mean'")
    summed = _drop(total(x, -2))
    return summed if how == "sum" else summed / x.shape[-2]


def _drop(summed: Value) -> Value:
    """Remove the axis of streams, which ``total`` left with size 1."""
    return summed[..., 0, :]


@op
def rms_norm(x: Value, weight: Value, eps: float) -> Value:
    """Return ``x * rsqrt(mean(x^2) + eps) * weight`` along the last axis."""
    return x * (total(x * x, -1) / x.shape[-1] + eps) ** -0.5 * weight


@op
def residual_add_aggregate(x: Value, res: Value, h_pre: Value) -> tuple[Value, Value]:
    """Return ``x + res`` and its aggregate."""
    added = x + res
    return added, aggregate(added, h_pre)


# --- gated streams ----------------------------------------------------------------------------


@op
def gated_pre(
    x: Value, norm: Value, down: Value, up: Value, inject: Value, eps: float
) -> tuple[Value, Value]:
    """Return h and H_post of streams that are normalised one by one and gated by channel."""
    h, u = gated(x, norm, down, up, eps)
    return h, 2.0 * sigmoid(_times(u, inject) / x.shape[-2])


@op
def gated_head(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Value:
    """Return the streams collapsed before the output, by gates for each channel."""
    return gated(x, norm, down, up, eps)[0]


def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> tuple[Value, Value]:
    """Return ``mean_i sigmoid(z_i) u_i``, and the normalised streams u."""
    n, C = x.shape[-2:]
    u = rms_norm(x, norm.reshape(n, C) + 1.0, eps)
    low = _times(u, down) / n
    gates = sigmoid(_times((low * sigmoid(low))[..., None, :], up))
    return _drop(total(gates.reshape(*x.shape) * u, -2)) / n, u


def _times(u: Value, weight: Value) -> Value:
    """Return ``vec(u) @ weight.T``, ``[..., rows of weight]``."""
    leading = u.shape[:-2]
    vec = u.reshape(math.prod(leading), u.shape[-2] * u.shape[-1])
    return (vec @ weight.swapaxes(0, 1)).reshape(*leading, weight.shape[0])


# --- static forms -----------------------------------------------------------------------------


@op
def static_layer(
    x: Value,
    h_pre_raw: Value,
    h_post_raw: Value,
    h_res_raw: Value,
    rms_weight: Value,
    eps: float = 1e-5,
    iterations: int = 20,
) -> Value:
    """Return ``H_res x + H_post (outer) rms_norm(aggregate(x, H_pre))``."""
    H_pre, H_post, H_res = static_mappings(h_pre_raw, h_post_raw, h_res_raw, iterations)
    return combine(x, rms_norm(aggregate(x, H_pre), rms_weight, eps), H_post, H_res)


@op
def gated_combine(x: Value, y: Value, h_pre: Value, h_post: Value, h_res: Value) -> Value:
    """Return ``H_post * (y + H_res (H_pre * x))``; the streams are n slices of the last axis."""
    n = h_pre.shape[-1]
    streams, update = _slices(x, n), _slices(y, n)
    mixed = h_post[..., None] * (update + h_res @ (h_pre[..., None] * streams))
    return mixed.reshape(*x.shape)


@op
def pre_scale(x: Value, h_pre: Value) -> Value:
    """Return ``H_pre * x``, where the streams are n slices of the last axis."""
    return (h_pre[..., None] * _slices(x, h_pre.shape[-1])).reshape(*x.shape)


def _slices(x: Value, n: int) -> Value:
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


# --- by name ----------------------------------------------------------------------------------


def forward(op: str, primals: Sequence[NDArray[Any]], **static: Any) -> tuple[Array, ...]:
    """Evaluate an op by name; a single output comes as a tuple of one."""
    return tuple(output.data for output in _outputs(op, _leaves(primals), static))


def gradients(
    op: str, primals: Sequence[NDArray[Any]], cotangents: Sequence[NDArray[Any]], **static: Any
) -> tuple[Array, ...]:
    """Return d sum(cotangent * output) / d primal for every primal, in order."""
    inputs = _leaves(primals)
    outputs = _outputs(op, inputs, static)
    return pull_back(outputs, [_raised(cotangent) for cotangent in cotangents], inputs)


def _leaves(primals: Sequence[NDArray[Any]]) -> tuple[Value, ...]:
    return tuple(value(_raised(primal)) for primal in primals)


def _raised(array: NDArray[Any]) -> Array:
    """Return floats of 64 bits or fewer as float64; complex numbers stay, for the tests."""
    array = np.asarray(array)
    return array if np.iscomplexobj(array) else array.astype(np.float64)


def _outputs(op: str, inputs: tuple[Value, ...], static: dict[str, Any]) -> tuple[Value, ...]:
    """Return the outputs that are not None; ``absent`` names the arrays that are left out."""
    if op not in OPS:
        raise KeyError(f"the oracle has no op {op!r}; it has {', '.join(sorted(OPS))}")
    absent: tuple[str, ...] = static.pop("absent", ())
    names = [name for name in inspect.signature(OPS[op]).parameters if name not in absent]
    result = OPS[op](**dict(zip(names, inputs, strict=False)), **dict.fromkeys(absent), **static)
    outputs = result if isinstance(result, tuple) else (result,)
    return tuple(output for output in outputs if output is not None)
