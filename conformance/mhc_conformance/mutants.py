"""Wrong versions of ops and vjps: each is the right one but for a single bug.

Most are NumPy, also those of kernels: what a kernel's bug does to the numbers is done here by
reading or writing the array elements that the kernel would. Bugs of transforms are in the library
that has the transforms. :mod:`mhc_conformance.bugs` lists each bug and the check that sees it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mhc_core.math import load

Array = NDArray[Any]
Op = Callable[..., Any]

HALF_MAX = float(np.finfo(np.float16).max)
THREADGROUP_MEMORY = 32 * 1024  # bytes that Metal gives


def right(op: str) -> Op:
    """Return the right forward of an op, on arrays of any library."""
    return load(op).forward


def right_vjp(op: str, primals: Any, cotangents: Any, **static: Any) -> tuple[Any, ...]:
    """Pull back by the right vjp of an op."""
    return load(op).vjp(primals, cotangents, **static)


def on_other_variant(op: str, **fields: Any) -> Op:
    """Run the right forward with some fields of the variant changed."""

    def wrong(*arrays: Array, variant: Any) -> Any:
        return right(op)(*arrays, variant=replace(variant, **fields))

    return wrong


def with_changed_gradients(change: Op) -> Op:
    """Change what comes out of the right vjp."""

    def wrong(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        return change(*right_vjp(op, primals, cotangents, **static))

    return wrong


def _tokens(array: Array, like: int) -> Array:
    """View an array with all but its last axes flattened into one, zero tokens too."""
    split = array.ndim - like
    return array.reshape(math.prod(array.shape[:split]), *array.shape[split:])


def _rows(tokens: int, step: int, width: int) -> Array:
    """Return the addresses that a kernel reads for each token: ``step`` apart, ``width`` long."""
    start: Array = np.arange(tokens)
    return step * start[:, None] + np.arange(width)


def _axes(first: str) -> tuple[int, int]:
    return (-2, -1) if first == "columns" else (-1, -2)


# --- Sinkhorn ---------------------------------------------------------------------------------


def sinkhorn_in(dtype: Any) -> Op:
    """Keep the matrix of Sinkhorn's iterations in a narrow dtype."""

    def wrong(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
        a, b = _axes(first)
        wide = logits.astype(np.float32)
        powers = np.exp(wide - wide.max(axis=a, keepdims=True))
        start = powers / powers.sum(axis=a, keepdims=True) + np.float32(eps)
        matrix = start.astype(dtype)
        matrix = matrix / (matrix.sum(axis=b, keepdims=True) + dtype(eps))
        for axis in (a, b) * (iterations - 1):
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + dtype(eps))
        return matrix.astype(np.float32)

    return wrong


def extra_pass(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise once more at the end, so that the other axis sums to 1."""
    matrix = right("sinkhorn")(logits, iterations=iterations, eps=eps, first=first)
    return matrix / (matrix.sum(axis=_axes(first)[0], keepdims=True) + eps)


def unshifted(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Take exp of the logits as they are: above 88 it is inf, and inf / inf is NaN."""
    return _divisions(np.exp(logits.astype(np.float32)), iterations, eps, first)[0]


def exp_for_softmax(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Start from exp + eps, shifted, where softmax + eps belongs."""
    if eps == 0:
        return right("sinkhorn")(logits, iterations=iterations, eps=eps, first=first)
    a, b = _axes(first)
    wide = logits.astype(np.float32)
    matrix = np.exp(wide - wide.max(axis=(-1, -2), keepdims=True)) + eps
    for axis in (b, *(a, b) * (iterations - 1)):
        matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + eps)
    return matrix.astype(np.float32)


def rows_first(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise rows first, whatever was asked for."""
    return right("sinkhorn")(logits, iterations=iterations, eps=eps, first="rows")


def on_leading_axes(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    """Normalise the first two axes, which are a matrix's own only without a batch."""
    options: dict[str, Any] = {"iterations": iterations, "eps": eps, "first": first}
    if logits.ndim == 2 or not logits.size:
        return right("sinkhorn")(logits, **options)
    matrices = np.moveaxis(logits, (0, 1), (-2, -1))
    return np.moveaxis(right("sinkhorn")(matrices, **options), (-2, -1), (0, 1))


def _divisions(
    powers: Array, iterations: int, eps: float, first: str
) -> tuple[Array, list[tuple[Array, Array, int]]]:
    """Iterate by division from exp(logits); keep each result, its divisor and its axis."""
    a, b = _axes(first)
    matrix, kept = powers, list[tuple[Array, Array, int]]()
    for index, axis in enumerate((a, b) * iterations):
        divisor = matrix.sum(axis=axis, keepdims=True) + np.float32(eps if index else 0)
        quotient = matrix / divisor
        kept.append((quotient, divisor, axis))
        matrix = quotient + np.float32(0 if index else eps)
    return matrix, kept


def unshifted_backward(
    op: str, primals: Any, cotangents: Any, *, iterations: int, eps: float, first: str
) -> tuple[Array]:
    """Walk back through the divisions from exp(logits), whose overflow no shift prevents."""
    (logits,), (g,) = primals, cotangents
    powers = np.exp(logits.astype(np.float32))
    _, kept = _divisions(powers, iterations, eps, first)
    carried = g.astype(np.float32)
    for quotient, divisor, axis in reversed(kept):
        inner = (carried * quotient).sum(axis=axis, keepdims=True)
        carried = (carried - inner) / divisor
    return ((carried * powers).astype(logits.dtype),)


def final_matrix_backward(
    op: str, primals: Any, cotangents: Any, *, iterations: int, eps: float, first: str
) -> tuple[Array]:
    """Walk every iteration back with the matrix of the last one."""
    (logits,), (g,) = primals, cotangents
    options: dict[str, Any] = {"iterations": iterations, "eps": eps, "first": first}
    matrix = right("sinkhorn")(logits, **options)
    a, b = _axes(first)
    carried = matrix * g
    for axis in (b, a) * iterations:
        carried = carried - matrix * carried.sum(axis=axis, keepdims=True)
    return (carried.astype(logits.dtype),)


def other_eps(op: str, primals: Any, cotangents: Any, *, eps: float, **static: Any) -> Any:
    """Take an eps of its own in the backward, 1e-3 at most."""
    return right_vjp(op, primals, cotangents, eps=min(eps, 1e-3), **static)


def iteration_less(op: str, primals: Any, cotangents: Any, *, iterations: int, **rest: Any) -> Any:
    """Take one iteration less in the backward."""
    return right_vjp(op, primals, cotangents, iterations=max(1, iterations - 1), **rest)


def masked_where_zero(op: str, primals: Any, cotangents: Any, **static: Any) -> tuple[Array]:
    """Treat a logit of 0 as padding without a gradient: at a common init all logits are 0."""
    (gradient,) = right_vjp(op, primals, cotangents, **static)
    return ((gradient * (primals[0] != 0)).astype(gradient.dtype),)


def knopp_of_transpose(matrix: Array, **static: Any) -> Array:
    """Normalise columns before rows, which sinkhorn_knopp does the other way round."""
    return right("sinkhorn_knopp")(matrix.swapaxes(-1, -2), **static).swapaxes(-1, -2)


# --- mappings ---------------------------------------------------------------------------------


def over_channels(x: Array, phi: Array, scale: Array, bias: Array, *, variant: Any) -> Any:
    """Divide each stream by its own root mean square, over C rather than n C."""
    square = np.mean(x.astype(np.float32) ** 2, axis=-1, keepdims=True)
    normed = (x / np.sqrt(square + variant.norm_eps)).astype(np.float32)
    return right("mappings")(normed, phi, scale, bias, variant=variant)


def other_columns(x: Array, phi: Array, *rest: Array, variant: Any) -> Any:
    """Read phi's columns as [C, n] rather than [n, C]."""
    n, channels = x.shape[-2:]
    swapped = np.swapaxes(np.reshape(phi, (-1, n, channels)), 1, 2).reshape(phi.shape)
    return right("mappings")(x, swapped, *rest, variant=variant)


def ignoring_h_pre(*arrays: Array, variant: Any) -> Any:
    """Take combine_pre's h from the new mix, also where one is given."""
    return right("combine_pre")(*arrays[:7], variant=variant)


def rounded_mappings(keep: bool) -> Op:
    """Round the mappings to the streams' dtype, and keep the mappings' own dtype or not."""

    def wrong(x: Array, *rest: Array, variant: Any) -> Any:
        narrow = [h.astype(x.dtype) for h in right("mappings")(x, *rest, variant=variant)]
        return tuple(h.astype(np.float32) if keep else h for h in narrow)

    return wrong


def overflowing(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    """Hold 16 times each gradient in float16 on the way, which overflows above 65504."""
    gradients = right_vjp(op, primals, cotangents, **static)
    return tuple(
        np.where(np.abs(16.0 * g) > HALF_MAX, np.inf, g).astype(g.dtype) for g in gradients
    )


class Remembering:
    """static_mappings cached by the array of logits: writing a new value changes nothing."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Array, Any]] = {}  # with the array, whose id then stays its own

    def __call__(self, *arrays: Array, iterations: int) -> Any:
        """Return static_mappings' outputs."""
        logits = arrays[-1]
        if id(logits) not in self._kept:
            mapped = right("static_mappings")(*arrays, iterations=iterations)
            self._kept[id(logits)] = (logits, mapped)
        return self._kept[id(logits)][1]


# --- streams ----------------------------------------------------------------------------------


def one_sign_wrong(dx: Array, dy: Array, dh_post: Array, dh_res: Array) -> Any:
    """Return combine's gradients with the sign of d h_post flipped."""
    return dx, dy, -dh_post, dh_res


def zero_for_phi(dx: Array, dphi: Array, *rest: Array) -> Any:
    """Return mappings' gradients with zero for phi."""
    return dx, 0 * dphi, *rest


def only_the_first(first: Array, *_: Array) -> Any:
    """Return the first gradient alone."""
    return (first,)


def weight_in_float64(dx: Array, dweight: Array) -> Any:
    """Sum the gradient of a weight in float64 and leave it there."""
    return dx, dweight.astype(np.float64)


def one_for_two(dx: Array, dres: Array, dh_pre: Array) -> Any:
    """Return the same array for two gradients that are equal."""
    return dx, dx, dh_pre


def one_token_off(dx: Array, *rest: Array) -> Any:
    """Return each token's dx at its neighbour."""
    return np.roll(_tokens(dx, 2), 1, axis=0).reshape(dx.shape), *rest


def carrying_over(x: Array, *rest: Array) -> Array:
    """Add an odd token's predecessor to it, from token 1024 on."""
    out = np.array(_tokens(right("combine")(x, *rest), 2))
    out[1025::2] += out[1024:-1:2][: len(out[1025::2])]
    return out.reshape(x.shape)


def for_eight_channels(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Step from token to token of y by 8, the C that the kernel was compiled for."""
    flat = y.ravel()
    index = _rows(math.prod(y.shape[:-1]), step=8, width=y.shape[-1])
    misread = flat[index % max(1, flat.size)].reshape(y.shape)
    return right("combine")(x, misread, h_post, h_res)


def without_tail(x: Array, *rest: Array) -> Array:
    """Write vectors of 4 channels and never enter the loop over those that are left."""
    out = right("combine")(x, *rest).copy()
    out[..., out.shape[-1] // 4 * 4 :] = 0
    return out


def gradients_without_tail(dx: Array, dy: Array, *rest: Array) -> Any:
    """Leave dx unwritten after the last vector: `#if C % 4` sees no template argument, but 0."""
    dx = np.array(dx)
    dx[..., dx.shape[-1] // 4 * 4 :] = 0
    return dx, dy, *rest


def in_whole_tiles(x: Array, h_pre: Array) -> Array:
    """Launch C // 256 threadgroups of 256 channels each, where C is above 256."""
    h = right("aggregate")(x, h_pre).copy()
    if h.shape[-1] > 256:
        h[..., h.shape[-1] // 256 * 256 :] = 0
    return h


def for_eight_streams(x: Array, h_pre: Array) -> Array:
    """Sum only the first 8 streams, for which the kernel has registers, without an error."""
    return right("aggregate")(x[..., :8, :], h_pre[..., :8])


def past_the_last_stream(x: Array, h_pre: Array) -> Array:
    """Sum n rounded up to 8 streams: past a token's last stream lie the next token's."""
    n, channels = x.shape[-2:]
    width = -(-n // 8) * 8
    tokens = math.prod(x.shape[:-2])
    index = _rows(tokens, step=n, width=width)
    behind = np.zeros((width, channels), x.dtype)
    streams = np.concatenate([x.reshape(tokens * n, channels), behind])[index]
    weights = np.concatenate([h_pre.ravel(), np.zeros(width, h_pre.dtype)])
    own = weights[index] if h_pre.ndim > 1 else np.broadcast_to(weights[:width], index.shape)
    h = np.einsum("tn,tnc->tc", own.astype(np.float32), streams.astype(np.float32))
    return h.reshape(*x.shape[:-2], channels).astype(x.dtype)


def adding_the_middle_twice(x: Array, weight: Array, *, eps: float) -> Array:
    """Halve a threadgroup of C threads in steps; if C is odd, both halves have the middle one."""
    squares = x.astype(np.float32) ** 2
    while squares.shape[-1] > 1:
        half = (squares.shape[-1] + 1) // 2
        squares = squares[..., :half] + squares[..., -half:]
    root = np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(eps))
    return (x / root * weight).astype(x.dtype)


def float4_through_half(x: Array, h_pre: Array) -> Array:
    """Load 4 floats through a pointer to half: 16 bytes, of which each pair is read as a number."""
    if x.dtype != np.float16:
        return right("aggregate")(x, h_pre)
    pairs = np.append(x.ravel(), np.zeros(x.size, x.dtype)).view(np.float32)
    return right("aggregate")(pairs.reshape(x.shape), h_pre).astype(x.dtype)


class Racing:
    """A kernel that overwrites a root mean square that half of the threads still have to read.

    On a GPU luck decides which threads are late; here half of them are in every second launch.
    """

    def __init__(self) -> None:
        self._launches = itertools.count()

    def __call__(self, x: Array, weight: Array, *, eps: float) -> Array:
        """Return rms_norm's output."""
        wide = _tokens(x, 1).astype(np.float32)
        root = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + np.float32(eps))
        roots = np.repeat(root, x.shape[-1], axis=-1)
        if next(self._launches) % 2:
            late = x.shape[-1] // 2
            roots[:-1, late:] = roots[1:, late:]
        return (wide / roots * weight).astype(x.dtype).reshape(x.shape)


def needing_too_much_memory(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Hold H_res and its cotangent in more threadgroup memory than Metal launches with."""
    n = x.shape[-2]
    if (needed := 4 * (2 * n * n + n)) > THREADGROUP_MEMORY:
        raise RuntimeError(
            f"Threadgroup memory size ({needed}) exceeds the maximum threadgroup memory allowed "
            f"({THREADGROUP_MEMORY})"
        )
    return right("combine")(x, y, h_post, h_res)


def without_empty_launch(x: Array, *rest: Array) -> Array:
    """Launch as many threadgroups as there are tokens, which may not be 0."""
    if x.size == 0:
        raise RuntimeError("invalid grid: 0 threadgroups")
    return right("combine")(x, *rest)


def transposed_h_res(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Mix the streams by columns of H_res."""
    return right("combine")(x, y, h_post, h_res.swapaxes(-1, -2))


def first_token_for_all(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Read mappings of each token as if all shared the first one's."""
    if not x.size:
        return right("combine")(x, y, h_post, h_res)
    one = [h.reshape(-1, *h.shape[-rank:])[0] for h, rank in ((h_post, 1), (h_res, 2))]
    many = [np.broadcast_to(h, (*x.shape[:-2], *h.shape)) for h in one]
    return right("combine")(x, y, *many)


def strideless(x: Array, h_pre: Array) -> Array:
    """Read the numbers at the addresses that they would have in a contiguous array."""
    base = x if x.base is None or x.flags.c_contiguous else x.base
    flat = np.ravel(base)[: x.size].reshape(x.shape)
    return right("aggregate")(flat, h_pre)


class Unsteady:
    """An aggregate that rounds every second result differently."""

    def __init__(self) -> None:
        self._calls = itertools.count()

    def __call__(self, x: Array, h_pre: Array) -> Array:
        """Return aggregate's output."""
        h = right("aggregate")(x, h_pre).astype(np.float32)
        return (h * (1 + 1e-7 * (next(self._calls) % 2))).astype(x.dtype)


def writing_over_input(x: Array, h_pre: Array) -> Array:
    """Double the streams in place after reading them."""
    h = right("aggregate")(x, h_pre)
    x *= 2
    return h


def view_of_input(h: Array, *, n: int) -> Array:
    """Repeat a hidden state without copying it: a write to one stream writes to all streams."""
    return np.broadcast_to(h[..., None, :], (*h.shape[:-1], n, h.shape[-1]))


def summed_in_bfloat16(x: Array, *, how: str) -> Array:
    """Add the streams in their own dtype."""
    summed = np.add.reduce(x, axis=-2, dtype=ml_dtypes.bfloat16)
    return (summed / (x.shape[-2] if how == "mean" else 1)).astype(x.dtype)


# --- transforms -------------------------------------------------------------------------------


def weightless_unless_traced(x: Any, weight: Any, *, eps: float) -> Any:
    """Take a fast path without the weight wherever MLX differentiates nothing."""
    import mlx.core as mx

    try:
        mx.async_eval(x)  # not eval, which mx.grad allows
    except ValueError:  # MLX's word for a value that is being traced
        return right("rms_norm")(x, weight, eps=eps)
    return right("rms_norm")(x, mx.ones_like(weight), eps=eps)


def capturing(x: Any, weight: Any, *, eps: float) -> Any:
    """Let an MLX custom function capture the weight: its gradient is then zero, silently."""
    import mlx.core as mx

    def norm(x: Any) -> Any:
        return right("rms_norm")(x, weight, eps=eps)

    def back(x: Any, g: Any, _: Any) -> Any:
        return right_vjp("rms_norm", (x, weight), (g,), eps=eps)[0]

    captured = mx.custom_function(norm)
    captured.vjp(back)
    return captured(x)


def looking_at_values(matrix: Any, *, max_iterations: int, epsilon: float, log_space: bool) -> Any:
    """Ask by float() whether there is anything to do, which MLX's compiler cannot trace."""
    import mlx.core as mx

    options: dict[str, Any] = {"epsilon": epsilon, "log_space": log_space}
    if matrix.size and float(mx.max(matrix)) == -math.inf:
        raise ValueError("sinkhorn_knopp: a matrix of -inf has no doubly stochastic one")
    return right("sinkhorn_knopp")(matrix, max_iterations=max_iterations, **options)


def dropping_saved(*arrays: Any, variant: Any) -> Any:
    """Save what the vjp needs as outputs of an MLX custom function, and drop their cotangents.

    First gradients are right. Where those are differentiated, what flows back into u, r and h_pre
    is lost.
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


def through_where(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    """Differentiate MLX's where, whose other branch is 0 times inf at s = 0."""
    import mlx.core as mx

    def guarded(*arrays: Any) -> list[Any]:
        return [_guarded_norm(mx, *arrays, **static)]

    return tuple(mx.vjp(guarded, list(primals), list(cotangents))[1])


def _guarded_norm(mx: Any, x: Any, weight: Any, *, eps: float) -> Any:
    """Compute 1 / (s + eps) as 1 / s, and as 1 / eps where s is 0: right in the forward."""
    s = mx.mean(x * x, axis=-1, keepdims=True)
    inverse = mx.where(s > 0, (1 / s) / (1 + eps / s), 1 / (eps or 1))
    return x * mx.sqrt(inverse) * weight
