"""The operations beyond the array API standard: the only file that tells libraries apart."""

from __future__ import annotations

import functools
import itertools
import math
import operator
import os
import shutil
import typing
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from mhc_core.sharding import Axis, Named, channel_axis, library

__all__ = [
    "as_dtype_of",
    "channels",
    "clamped",
    "collapse",
    "constant",
    "dot",
    "doubled",
    "e4m3_bits",
    "from_e4m3_bits",
    "fused",
    "gram",
    "inverse",
    "largest",
    "log_sum_exp",
    "matmul",
    "mean_square",
    "mix",
    "namespace",
    "outer",
    "over_channels",
    "project",
    "reinterpreted",
    "scan",
    "scan_reverse",
    "scan_while",
    "share_of_largest",
    "shift",
    "sigmoid",
    "stopped",
    "sum_to",
    "sum_tokens",
    "swap",
    "tokens",
    "unproject",
    "upcast",
    "within",
]

Array = Any


# ------------------------------------------------------------------------- namespaces and dtypes


def _lax() -> Any:
    return import_module("jax.lax")


def namespace(array: Array) -> Any:
    """Return the array API namespace of an array.

    MLX's arrays name their own namespace. array_api_compat would first test for JAX's arrays by
    ``jax.Array``, which does not exist yet while another thread imports JAX.
    """
    if type(array).__module__.startswith("mlx."):
        return array.__array_namespace__()
    from array_api_compat import array_namespace

    return array_namespace(array)


def _is(xp: Any, library: str) -> bool:
    return xp.__name__.startswith(library)


def upcast(xp: Any, array: Array) -> Array:
    """Convert an array to the dtype of computation: float32, or float64 for float64.

    An array that has that dtype is returned itself, not copied: no caller writes into the result.
    """
    is_float64 = str(array.dtype).endswith("float64")
    return _as(xp, array, xp.float64 if is_float64 else xp.float32)


def as_dtype_of(xp: Any, array: Array, like: Array) -> Array:
    """Return a result in the dtype of ``like``, as asarray would: itself where it has it already.

    So the result must be a new array: if it may be a view of a caller's array, copy it by
    ``xp.astype``, which copies in libraries whose arrays are writable.
    """
    return _as(xp, array, like.dtype)


def _as(xp: Any, array: Array, dtype: Any) -> Array:
    """Cast without a copy where nothing changes; NumPy and PyTorch would make one."""
    if _is(xp, "jax"):  # it makes none, and takes away what is weak about a filled array's dtype
        return xp.astype(_rounded(array, dtype), dtype)
    if array.dtype == dtype:
        return array
    narrowed = xp.astype(array, dtype)
    return _bits_kept(narrowed) if _is(xp, "array_api_compat.torch") else narrowed


def _bits_kept(array: Array) -> Array:
    """Return a narrow tensor in such a way that torch.compile keeps its rounding.

    Its generated code computes bfloat16 in float32 and leaves out a rounding that is cast back
    (emulate_precision_casts is off in torch/_inductor/config.py). Reading the bits forces the
    rounding. The difference that it makes, 0 in eager code, is added as a constant to autograd.
    """
    import torch
    from torch._subclasses.fake_tensor import is_fake  # the compiler's later stages have no flag

    if array.dtype not in (torch.bfloat16, torch.float16) or not is_fake(array):
        return array
    # without the bitwise_or, the compiler drops both views
    rounded = array.view(torch.int16).bitwise_or(0).view(array.dtype)
    away = (rounded - array).detach()
    return array + torch.where(away.isnan(), 0.0, away)  # NaN where both are infinite


def _rounded(array: Array, dtype: Any) -> Array:
    """Round a JAX array to what a narrower dtype can hold, in a way that XLA must keep.

    XLA drops the rounding of float32 -> bfloat16 -> float32 on GPUs (xla_allow_excess_precision is
    on by default there), but it must keep jax.lax.reduce_precision
    (https://docs.jax.dev/en/latest/_autosummary/jax.lax.reduce_precision.html).
    """
    if str(dtype) not in _NARROW or str(array.dtype) not in ("float32", "float64"):
        return array
    return _narrowing()(array, str(dtype))


# exponent bits, mantissa bits, and the exponent of the step between float16's numbers below 2^-14,
# which reduce_precision rounds to 0; bfloat16's smallest numbers are float32's own
_NARROW = {"bfloat16": (8, 7, 0), "float16": (5, 10, 24)}


@functools.cache
def _narrowing() -> Callable[[Array, str], Array]:
    import jax
    import jax.numpy as jnp

    custom_jvp = typing.cast("Callable[..., Any]", jax.custom_jvp)

    @functools.partial(custom_jvp, nondiff_argnums=(1,))
    def narrowed(array: Array, dtype: str) -> Array:
        exponent, mantissa, step = _NARROW[dtype]
        rounded = jax.lax.reduce_precision(array, exponent, mantissa)
        if not step:
            return rounded
        small = jnp.abs(array) < 2.0**-14
        return jnp.where(small, jnp.round(array * 2.0**step) * 2.0**-step, rounded)

    @narrowed.defjvp
    def _(dtype: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return narrowed(primals[0], dtype), tangents[0]

    return narrowed


def _by_platform(on_gpu: Callable[..., Any], elsewhere: Callable[..., Any], *given: Any) -> Any:
    """Apply the form of a JAX function for the platform that it is lowered for, and only that."""
    return _lax().platform_dependent(*given, cuda=on_gpu, rocm=on_gpu, default=elsewhere)


# ------------------------------------------------------------------------------ shapes and sums


def reinterpreted(xp: Any, array: Array, dtype: str) -> Array:
    """Return the bits of an array as another dtype of the same width, "int32" or "float32"."""
    if _is(xp, "jax"):
        return _lax().bitcast_convert_type(array, dtype)
    return array.view(getattr(xp, dtype))


def e4m3_bits(xp: Any, array: Array) -> Array:
    """Return float32 numbers of at most 448 as E4M3, rounded to nearest even, in uint8."""
    if _is(xp, "mlx"):
        return xp.to_fp8(array)
    if _is(xp, "jax"):
        return _lax().bitcast_convert_type(array.astype("float8_e4m3fn"), "uint8")
    if _is(xp, "array_api_compat.torch"):
        return array.to(xp.float8_e4m3fn).view(xp.uint8)
    return array.astype(import_module("ml_dtypes").float8_e4m3fn).view(xp.uint8)


def from_e4m3_bits(xp: Any, bits: Array) -> Array:
    """Return the numbers whose E4M3 bits are given, in float32."""
    if _is(xp, "mlx"):
        return xp.from_fp8(bits, dtype=xp.float32)
    if _is(xp, "jax"):
        return _lax().bitcast_convert_type(bits, "float8_e4m3fn").astype("float32")
    if _is(xp, "array_api_compat.torch"):
        return bits.view(xp.float8_e4m3fn).to(xp.float32)
    return bits.view(import_module("ml_dtypes").float8_e4m3fn).astype(xp.float32)


def swap(xp: Any, array: Array) -> Array:
    """Transpose the last two axes."""
    return xp.matrix_transpose(array)


# JAX may have sharded any axis over devices. Separately sharded axes cannot be merged without a
# gather, which Explicit meshes refuse: in JAX, leading axes are not merged.


def keeps_axes(xp: Any) -> bool:
    """Return whether leading axes must not be merged."""
    return _is(xp, "jax")


def tokens(xp: Any, array: Array, last: int) -> Array:
    """Flatten all but the last ``last`` axes into one; unlike -1 it works for zero tokens."""
    split = array.ndim - last
    count = math.prod(array.shape[:split])
    return xp.reshape(array, (count, *array.shape[split:]))


def sum_tokens(xp: Any, array: Array, last: int) -> Array:
    """Sum over all but the last ``last`` axes."""
    if keeps_axes(xp):
        return xp.sum(array, axis=tuple(range(array.ndim - last)))
    return xp.sum(tokens(xp, array, last), axis=0)


def sum_to(xp: Any, gradient: Array, like: Array) -> Array:
    """Sum a gradient over the tokens that shared ``like``, and cast it to its dtype."""
    if gradient.ndim > like.ndim:
        gradient = sum_tokens(xp, gradient, like.ndim)
    return as_dtype_of(xp, gradient, like)


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), exact far below zero and without overflow, differentiable at 0."""
    small = xp.exp(xp.where(z >= 0, -z, z))
    return xp.where(z >= 0, 1 / (1 + small), small / (1 + small))


def shift(xp: Any, logits: Array, axis: int) -> Array:
    """Return the largest entry along an axis, which stays with size 1, as a constant to autodiff.

    The shift cancels out of the result, but with a library's gradient of max it might not cancel
    exactly.
    """
    return stopped(xp, xp.max(logits, axis=axis, keepdims=True))


def largest(xp: Any, logits: Array, axis: int) -> Array:
    """Return the largest entry along an axis, which stays with size 1, with its derivative."""
    constant = shift(xp, logits, axis)
    # adds 0; the difference keeps the gradient alone, that of the library's own max cancels
    return constant + xp.sum(
        share_of_largest(xp, logits, axis)
        * xp.where(_ties(xp, logits, axis), logits - constant, 0),
        axis=axis,
        keepdims=True,
    )


def share_of_largest(xp: Any, logits: Array, axis: int) -> Array:
    """Return the derivative of the largest entry along an axis: 1, shared among equal entries."""
    ties = xp.astype(_ties(xp, logits, axis), logits.dtype)
    return ties / xp.sum(ties, axis=axis, keepdims=True)


def _ties(xp: Any, logits: Array, axis: int) -> Array:
    """Return which entries are the largest: at least one of a line, and NaN.

    A compiler may compute the entries twice, in two kernels that round differently (XLA does: a
    product and a sum may be rounded as one), and then none equals the largest. So one is found by
    its place too.
    """
    equal = xp.logical_not(logits < shift(xp, logits, axis))
    shape = [1] * logits.ndim
    shape[axis] = size = logits.shape[axis]
    places = xp.reshape(constant(xp, [float(k) for k in range(size)], logits), tuple(shape))
    place = xp.argmax(stopped(xp, logits), axis=axis, keepdims=True)
    return xp.logical_or(equal, places == xp.astype(place, logits.dtype))


def clamped(xp: Any, array: Array, bounds: tuple[float, float] | None) -> Array:
    """Return an array within bounds, NaN for NaN; entries beyond them have no derivative."""
    if bounds is None:
        return array
    low, high = bounds
    array = xp.where(array < low, low, array)
    return xp.where(array > high, high, array)


def within(xp: Any, gradient: Array, array: Array, bounds: tuple[float, float] | None) -> Array:
    """Return the gradient before :func:`clamped` from the one after it."""
    if bounds is None:
        return gradient
    low, high = bounds
    return xp.where(xp.logical_or(array < low, array > high), 0, gradient)


def doubled(xp: Any, half: Array) -> Array:
    """2 half, or -inf where that overflows the dtype: callers need only its exponential, 0."""
    if "numpy" in xp.__name__ and not _is(xp, "jax"):
        with xp.errstate(over="ignore"):  # NumPy warns
            return 2 * half
    return 2 * half


def log_sum_exp(xp: Any, logits: Array, axis: int) -> Array:
    """log(sum(exp(logits))) along an axis, which stays with size 1; the largest entry shifts it."""
    largest = shift(xp, logits, axis)
    return largest + xp.log(xp.sum(xp.exp(logits - largest), axis=axis, keepdims=True))


def stopped(xp: Any, array: Array) -> Array:
    """Return the array as a constant to autodiff."""
    if _is(xp, "jax"):
        return _lax().stop_gradient(array)
    if _is(xp, "mlx"):
        return xp.stop_gradient(array)
    return array.detach() if hasattr(array, "detach") else array


def constant(xp: Any, values: Any, like: Array) -> Array:
    """Return nested sequences of numbers as an array of the dtype of ``like``, on its device."""
    if _is(xp, "mlx"):
        return xp.array(values, dtype=like.dtype)
    if _is(xp, "jax"):
        return xp.asarray(values, dtype=like.dtype)
    device = getattr(like, "device", None)  # NumPy's arrays have one from 2.0 on
    return xp.asarray(values, dtype=like.dtype, **({} if device is None else {"device": device}))


def inverse(xp: Any, matrix: Array) -> Array:
    """Invert matrices [..., N, N] whose symmetric part is positive definite.

    MLX inverts on the CPU alone, and without a derivative; JAX's products on a GPU would be TF32.
    There it is Gauss-Jordan elimination, in place and a column at a time. Such matrices need no
    pivots: after every step, what is left of them has a positive definite symmetric part too.
    """
    if not (_is(xp, "jax") or _is(xp, "mlx")):
        return xp.linalg.inv(matrix)
    size = matrix.shape[-1]

    def step(state: Any) -> tuple[Any, Any]:
        a, e = state  # e is 1 at the column that is eliminated
        across, down = 1 - e, (1 - e)[:, None]
        column = xp.sum(a * e, axis=-1, keepdims=True) * down
        row = xp.sum(a * e[:, None], axis=-2, keepdims=True)
        row = (row * across + e) / xp.sum(row * e, axis=-1, keepdims=True)
        a = a * across * down - column * row + e[:, None] * row
        return (a, xp.roll(e, 1)), None

    first = constant(xp, [1.0, *[0.0] * (size - 1)], matrix)
    return scan(xp, step, (matrix, first), size)[0][0]


# --------------------------------------------------------------------------------- fusion in MLX
# MLX computes operation by operation unless mx.compile fuses them, and inside mx.grad it ignores
# mx.compile. So a formula has two forms: unrolled sums of products, which fuse into one pass
# over the streams (half the time of a matmul on a CPU), and matmuls, which are twice as fast as
# the sums where nothing fuses. On a GPU the sums are always taken: a float32 matmul may be TF32.

_unrolled: ContextVar[bool] = ContextVar("mhc_unrolled", default=False)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let MLX compile a function of a namespace and arrays into as few passes as possible."""

    @functools.wraps(function)
    def call(xp: Any, *arrays: Array) -> Any:
        # a compiled kernel without elements ends the process in MLX's CUDA build
        if _is(xp, "mlx") and all(array.size for array in arrays):
            return _fused_by_mlx(function, _on_gpu(xp))(*arrays)
        return function(xp, *arrays)

    return call


@functools.cache
def _fused_by_mlx(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    import mlx.core as mx

    def body(*arrays: Array) -> Any:
        token = _unrolled.set(_fusing(mx, arrays[0]))
        try:
            return function(mx, *arrays)
        finally:
            _unrolled.reset(token)

    return mx.compile(body) if on_gpu or _cpu_compiler() else body


@functools.cache
def _cpu_compiler() -> bool:
    """Return whether mx.compile works on the CPU, where it calls g++."""
    return shutil.which("g++") is not None


def _on_gpu(mx: Any) -> bool:
    return mx.default_device().type == mx.DeviceType.gpu


def _fusing(mx: Any, array: Array) -> bool:
    """Return whether this code runs under mx.compile or mx.grad, where arrays have no values.

    mx.eval would work under mx.grad, but arrays evaluated there keep their whole graph alive.
    """
    if _on_gpu(mx):
        return True
    try:
        mx.async_eval(array)
    except ValueError:
        return True
    return False


def _sums(xp: Any, terms: int) -> bool:
    """Return whether products over a few streams are better unrolled into sums that fuse."""
    if terms > 8:
        return False
    return _is(xp, "jax") or (_is(xp, "mlx") and (_unrolled.get() or _on_gpu(xp)))


# ----------------------------------------------------------------------- products over the streams


def matmul(xp: Any, a: Array, b: Array) -> Array:
    """Multiply matrices in full float32, which some libraries do not do by default on a GPU."""
    if _is(xp, "jax"):
        if options := _summed_over_devices(a):
            return xp.einsum("...ik,...kj->...ij", a, b, precision="highest", **options)
        return xp.matmul(a, b, precision="highest")
    if _is(xp, "mlx") and _on_gpu(xp) and os.environ.get("MLX_ENABLE_TF32") != "0":
        return _product_by_halves()(a, b)
    return xp.matmul(a, b)


def _matmul_by_halves(mx: Any, a: Array, b: Array) -> Array:
    """Multiply in float32 precision where the hardware multiplies in TF32, of 11 significant bits.

    a = a_1 + a_2 with a_1 the nearest in TF32; only a_2 @ b_2, of float32's rounding, is left out.
    """
    (a_1, a_2), (b_1, b_2) = _halves(mx, a), _halves(mx, b)
    return mx.matmul(a_1, b_1) + (mx.matmul(a_1, b_2) + mx.matmul(a_2, b_1))


@functools.cache
def _product_by_halves() -> Callable[..., Array]:
    """Return that product with gradients that are such products too, to any order.

    MLX's own derivative would multiply the cotangent in TF32.
    """
    import mlx.core as mx

    product = mx.custom_function(functools.partial(_matmul_by_halves, mx))

    def pullback(primals: Any, cotangent: Array, _: Any) -> tuple[Array, Array]:
        a, b = primals
        da = matmul(mx, cotangent, swap(mx, b))
        db = matmul(mx, swap(mx, a), cotangent)
        return _summed_to(mx, da, a.shape), _summed_to(mx, db, b.shape)

    product.vjp(pullback)
    return product


def _summed_to(mx: Any, gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an array of that shape was broadcast."""
    extra = gradient.ndim - len(shape)
    gradient = mx.sum(gradient, axis=tuple(range(extra))) if extra else gradient
    repeated = tuple(k for k, n in enumerate(shape) if n == 1 and gradient.shape[k] != 1)
    return mx.sum(gradient, axis=repeated, keepdims=True) if repeated else gradient


def _halves(mx: Any, a: Array) -> tuple[Array, Array]:
    nearest = mx.view(mx.bitwise_and(mx.view(a, mx.uint32) + 0x1000, 0xFFFFE000), mx.float32)
    upper = a + mx.stop_gradient(nearest - a)  # exact, and its derivative is 1
    return upper, a - upper


def _tree(terms: list[Array]) -> Array:
    """Add in pairs: MLX's fused kernels run 1.5x faster without one long chain of sums."""
    while len(terms) > 1:
        odd = terms[len(terms) // 2 * 2 :]
        terms = [one + two for one, two in zip(terms[::2], terms[1::2], strict=False)] + odd
    return terms[0]


def mix(xp: Any, h: Array, x: Array, plus: Array | None = None) -> Array:
    """sum_j h[..., i, j] x[..., j, C] (+ plus) -> [..., i, C]; h may lack the leading axes."""
    if _sums(xp, x.shape[-2]):
        terms = [h[..., :, j, None] * x[..., None, j, :] for j in range(x.shape[-2])]
        return _tree(terms if plus is None else [*terms, plus])
    if plus is None:
        return matmul(xp, h, x)
    if _is(xp, "mlx") and not _on_gpu(xp):
        return xp.addmm(plus, h, x)  # a pass over the streams less than matmul and +
    return matmul(xp, h, x) + plus


def collapse(xp: Any, h: Array, x: Array) -> Array:
    """sum_i h[..., i] x[..., i, C] -> [..., C]; h may lack the leading axes."""
    if _sums(xp, x.shape[-2]):
        terms = [h[..., i, None] * x[..., i, :] for i in range(x.shape[-2])]
        return _tree(terms)
    if _is(xp, "mlx") and _on_gpu(xp):
        return xp.sum(h[..., None] * x, axis=-2)
    return matmul(xp, h[..., None, :], x)[..., 0, :]


def dot(xp: Any, a: Array, b: Array, like: Array | None = None) -> Array:
    """sum_C a[..., C] b[..., C] -> [...], also over the tokens that share ``like``."""
    shared = like is not None and like.ndim < a.ndim - 1
    return (_dot_all if shared else _dot_each)(xp, a, b)


@fused
def _dot_each(xp: Any, a: Array, b: Array) -> Array:
    if b.shape[-2:-1] == (1,) and not _is(xp, "mlx"):
        return matmul(xp, a, swap(xp, b))[..., 0]  # XLA's sum takes 40 times as long on a CPU
    if not _folds(xp, a.shape[-1]):
        return xp.sum(a * b, axis=-1)
    return _sum_last(xp, _folded(a, b, -1) if _unrolled.get() else a * b)


@fused
def _dot_all(xp: Any, a: Array, b: Array) -> Array:
    if keeps_axes(xp):
        return xp.sum(sum_tokens(xp, a * b, 2), axis=-1)
    a, b = tokens(xp, a, 2), tokens(xp, b, 2)
    products = _folded(a, b, 0) if _unrolled.get() and a.shape[0] % FOLDS == 0 else a * b
    return xp.sum(xp.sum(products, axis=0), axis=-1)


def mean_square(xp: Any, x: Array, axes: int = 1) -> Array:
    """mean(x^2) over the last axis, or the last two, which become one axis of size 1.

    Streams of 1e18 have squares of 1e36, and float32 cannot hold the sum of 341 such squares. So
    the division by their number comes before the sum where that fuses, else after partial sums of
    at most 256 squares. Where the channels are on several devices, this is one device's part of the
    mean, for :func:`over_channels` to sum.
    """
    count = math.prod(x.shape[x.ndim - axes :])
    if keeps_axes(xp):
        last, count = tuple(range(-axes, 0)), count * _devices_of_channels(xp)
        return xp.sum(x * (1 / max(count, 1)) * x, axis=last)[..., None]
    mean = _mean_square(xp, xp.reshape(x, (*x.shape[: x.ndim - axes], count)))[..., None]
    devices = _devices_of_channels(xp)
    return mean if devices == 1 else mean / devices


@fused
def _mean_square(xp: Any, x: Array) -> Array:
    *ahead, size = x.shape
    each = 1 / max(size, 1)
    if _is(xp, "mlx") and (_unrolled.get() or _on_gpu(xp)):
        if _folds(xp, size):
            return _sum_last(xp, _folded(x, x, -1, each))
        return xp.sum(x * each * x, axis=-1)
    across = 16 if _folds(xp, size) else 1  # as _sum_last: MLX's CPU adds one number at a time
    along = math.gcd(size // across, 256 // across)
    if along == 1:
        return xp.sum(x * each * x, axis=-1)
    some = xp.reshape(x * x, (*ahead, size // (along * across), along, across))
    return xp.sum(xp.sum(xp.sum(some, axis=-2) * each, axis=-1), axis=-1)


def outer(xp: Any, g: Array, x: Array, like: Array) -> Array:
    """sum_C g[..., i, C] x[..., j, C] -> [..., i, j], also over the tokens that share ``like``."""
    return (_outer_all if like.ndim < g.ndim else _outer_each)(xp, g, x)


@fused
def _outer_each(xp: Any, g: Array, x: Array) -> Array:
    if _unrolled.get() and x.shape[-2] <= 8 and _folds(xp, x.shape[-1]):
        return _sum_last(xp, _folded(g[..., :, None, :], x[..., None, :, :], -1))
    return _times_transposed(xp, g, x)


@fused
def _outer_all(xp: Any, g: Array, x: Array) -> Array:
    if keeps_axes(xp):
        return sum_tokens(xp, _times_transposed(xp, g, x), 2)
    g, x = tokens(xp, g, 2), tokens(xp, x, 2)
    if _unrolled.get() and x.shape[-2] <= 8 and x.shape[0] % FOLDS == 0:
        products = _folded(g[:, :, None, :], x[:, None, :, :], 0)
        return xp.sum(xp.sum(products, axis=0), axis=-1)
    return xp.sum(_times_transposed(xp, g, x), axis=0)


def _matmul_transposed(mx: Any, g: Array, x: Array) -> Array:
    return mx.matmul(g, swap(mx, x))


def _times_transposed(xp: Any, g: Array, x: Array) -> Array:
    if _is(xp, "jax"):
        product = functools.partial(_einsum_transposed, xp)
        if x.shape[-2] > 8:
            return product(g, x)
        return _by_platform(functools.partial(_sums_of_products, xp), product, g, x)
    if g.ndim == 3 and _spreads(xp, g.shape[0]):
        halves = _on_two_cores(xp, _matmul_transposed, g, x)
        return xp.concat(halves, axis=0)
    return matmul(xp, g, swap(xp, x))


def _einsum_transposed(xp: Any, g: Array, x: Array) -> Array:
    """Multiply in JAX: on a CPU twice as fast as with a transposed array."""
    options = _summed_over_devices(g)
    return xp.einsum("...ic,...jc->...ij", g, x, precision="highest", **options)


def _sums_of_products(xp: Any, g: Array, x: Array) -> Array:
    """Multiply by sums over C, which XLA fuses on GPUs: a product first makes both float32.

    On an H200 (T = C = 4096, n = 4, bfloat16) the product and the conversions take 390 us.
    """
    columns = [xp.sum(g * x[..., j, None, :], axis=-1) for j in range(x.shape[-2])]
    return xp.stack(columns, axis=-1)


def _folds(xp: Any, size: int) -> bool:
    """Return whether a sum over C is better taken in steps: MLX's CPU adds one number at a time."""
    return _is(xp, "mlx") and size % (16 * FOLDS) == 0 and not _on_gpu(xp)


FOLDS = 4  # with twice as many blocks, what g++ makes of it runs out of registers


def _folded(a: Array, b: Array, axis: int, factor: float | None = None) -> Array:
    """Multiply, and add the blocks of an axis onto each other: one pass if it fuses.

    ``factor`` multiplies every block of ``a``: all of ``a`` at once would be kept in memory.
    """
    size = a.shape[axis] // FOLDS
    ahead = () if axis == 0 else (...,)
    parts = [(*ahead, slice(k * size, (k + 1) * size)) for k in range(FOLDS)]
    if factor is None:
        return _tree([a[part] * b[part] for part in parts])
    return _tree([a[part] * factor * b[part] for part in parts])


def _sum_last(mx: Any, a: Array) -> Array:
    """Sum the last axis in two steps, the first of which runs along contiguous numbers."""
    *ahead, size = a.shape  # named, as MLX infers no axis of an array without elements
    return mx.sum(mx.sum(mx.reshape(a, (*ahead, size // 16, 16)), axis=-2), axis=-1)


def project(xp: Any, x: Array, phi: Array) -> Array:
    """vec(x)[..., n C] @ phi[m, n C].T -> [..., m] in full float32.

    phi stays as checkpoints store it, and x[..., n, C] as it is.
    """
    if keeps_axes(xp):
        both = ((x.ndim - 2, x.ndim - 1), (1, 2))
        return _dot_general(x, _by_stream(xp, phi, x), both, **_summed_over_devices(x, 2))
    columns = swap(xp, phi)
    flat = xp.reshape(x, (math.prod(x.shape[:-2]), phi.shape[1]))
    if _is(xp, "mlx") and flat.shape[0] > 2 and not _on_gpu(xp):
        columns = xp.contiguous(columns)  # MLX's CPU matmul is 1.5x slower along a strided phi
    return xp.reshape(_rows(xp, flat, columns), (*x.shape[:-2], phi.shape[0]))


def unproject(xp: Any, du: Array, phi: Array, x: Array) -> Array:
    """du[..., m] @ phi[m, n C] -> [..., n, C], the shape of x."""
    if keeps_axes(xp):
        return _dot_general(du, _by_stream(xp, phi, x), ((du.ndim - 1,), (0,)))
    return xp.reshape(_rows(xp, tokens(xp, du, 1), phi), x.shape)


def gram(xp: Any, du: Array, x: Array, like: Array) -> Array:
    """Sum du[..., m] (outer) vec(x)[..., n C] over all tokens -> [m, n C], the shape of phi."""
    if keeps_axes(xp):
        leading = tuple(range(x.ndim - 2))
        contracted = (leading, leading)
        return xp.reshape(_on_devices_of(like, x, _dot_general, du, x, contracted), like.shape)
    du = tokens(xp, du, 1)
    x = xp.reshape(x, (du.shape[0], like.shape[1]))
    if not _spreads(xp, x.shape[0]):
        return matmul(xp, swap(xp, du), x)
    first, second = _on_two_cores(xp, _gram_in_blocks, du, x)
    return first + second


def merged(xp: Any, gradient: Array, like: Array) -> Array:
    """Return the gradient [n, C] of a weight for every stream as [n C], on its devices.

    Where Explicit axes shard the channels, JAX does not merge the axes by itself.
    """
    sharding = _explicit_sharding(gradient) if keeps_axes(xp) else None
    if sharding is not None:
        gradient = _resharded(gradient, sharding, (None, None))
    return xp.reshape(gradient, like.shape)


def _by_stream(xp: Any, phi: Array, x: Array) -> Array:
    """phi[m, n C] -> [m, n, C]: neither x's axes nor their sharding are merged.

    Where Explicit axes shard x's channels, each device takes its part of phi: with a whole phi, JAX
    would gather the streams.
    """
    phi = xp.reshape(phi, (phi.shape[0], *x.shape[-2:]))
    sharding = _explicit_sharding(x)
    if sharding is None or sharding.spec[-1] is None:
        return phi
    return _resharded(phi, sharding, (None, None, sharding.spec[-1]))


def _dot_general(a: Array, b: Array, contracted: Any, **options: Any) -> Array:
    """Contract axes of JAX arrays in full float32."""
    dimensions = (contracted, ((), ()))
    return _lax().dot_general(a, b, dimensions, precision="highest", **options)


def _on_devices_of(like: Array, x: Array, product: Callable[..., Array], *given: Any) -> Array:
    """Return a product [m, n, C], a sum over tokens, on every device of ``like`` [m, n C].

    Where Explicit axes shard x's channels, each device sums its own before they are gathered.
    """
    sharding, of_x = _explicit_sharding(like), _explicit_sharding(x)
    if sharding is None:
        return product(*given)
    whole = _split_last(sharding)
    if of_x is None or of_x.spec[-1] is None:
        return product(*given, out_sharding=whole)
    rows = (*tuple(whole.spec)[:1], None, of_x.spec[-1])
    parts = product(*given, out_sharding=_placed(sharding, rows))
    return _resharded(parts, sharding, tuple(whole.spec))


def _placed(sharding: Any, spec: tuple[Any, ...]) -> Any:
    return type(sharding)(sharding.mesh, type(sharding.spec)(*spec))


def _resharded(array: Array, sharding: Any, spec: tuple[Any, ...]) -> Array:
    return import_module("jax").sharding.reshard(array, _placed(sharding, spec))


def _explicit_sharding(array: Array) -> Any:
    """Return the sharding in an array's type, which exists on a mesh with Explicit axes."""
    jax = import_module("jax")
    typeof = getattr(jax, "typeof", None)  # JAX 0.6
    sharding = getattr(typeof(array), "sharding", None) if typeof else None
    axis_types = getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return sharding if any(axis_type.name == "Explicit" for axis_type in axis_types) else None


def _summed_over_devices(a: Array, axes: int = 1) -> dict[str, Any]:
    """Return where a product over the last axes of ``a`` lies, if Explicit axes shard the last.

    JAX asks to be told: it could also leave a part of the sum on each device.
    """
    sharding = _explicit_sharding(a)
    if sharding is None or sharding.spec[-1] is None:
        return {}
    return {"out_sharding": _placed(sharding, (*tuple(sharding.spec)[:-axes], None))}


def _split_last(sharding: Any) -> Any:
    """Return the sharding of [m, n, C] for that of [m, n C], whose last axis is not sharded."""
    return _placed(sharding, tuple(sharding.spec)[:1])


def _rows(xp: Any, a: Array, b: Array) -> Array:
    """a[T, K] @ b[K, m] -> [T, m], the tokens spread over the cores."""
    if not _spreads(xp, a.shape[0]):
        return matmul(xp, a, b)

    def times(mx: Any, half: Array) -> Array:
        return mx.matmul(half, b)

    return xp.concat(_on_two_cores(xp, times, a), axis=0)


def _gram_in_blocks(mx: Any, du: Array, x: Array, block: int = 32) -> Array:
    """Sum over blocks of tokens, which stay in the cache and lose fewer bits."""
    if x.shape[0] % block:
        return mx.matmul(swap(mx, du), x)
    count = x.shape[0] // block
    du = mx.reshape(du, (count, block, du.shape[-1]))
    x = mx.reshape(x, (count, block, x.shape[-1]))
    return mx.sum(mx.matmul(swap(mx, du), x), axis=0)


# MLX's CPU computes a stream of operations on one thread. The products with phi are most of a
# sublayer, and half of the tokens can be computed on a second stream: 0.55 of the time where
# another core is idle, and no more than the whole where none is.


def _spreads(xp: Any, tokens: int) -> bool:
    return _is(xp, "mlx") and tokens >= 256 and not _on_gpu(xp) and (os.cpu_count() or 1) > 1


def _on_two_cores(mx: Any, function: Callable[..., Array], *arrays: Array) -> list[Array]:
    """Apply a function to each half of the tokens."""
    half = arrays[0].shape[0] // 64 * 32
    first = function(mx, *(array[:half] for array in arrays))
    with mx.stream(_second_stream(mx)):
        second = function(mx, *(array[half:] for array in arrays))
    return [first, second]


@functools.cache
def _second_stream(mx: Any) -> Any:
    return mx.new_thread_local_stream(mx.cpu)


# ------------------------------------------------------------------------------ sums over devices
# Where devices share the channels an array is a device's part, and a sum over C that of its part.


def over_channels(xp: Any, *sums: Array) -> tuple[Array, ...]:
    """Sum one device's sums over C across all devices that have channels, in one all-reduce."""
    axis = _axis_of(xp)
    if axis is None:
        return sums
    if isinstance(axis, Named):
        return _lax().psum(sums, axis.name)
    if len(sums) == 1:
        return (axis.total(sums[0]),)
    total = axis.total(xp.concat([xp.reshape(one, (math.prod(one.shape),)) for one in sums]))
    starts = itertools.accumulate((math.prod(one.shape) for one in sums), initial=0)
    return tuple(
        xp.reshape(total[start : start + math.prod(one.shape)], one.shape)
        for start, one in zip(starts, sums, strict=False)
    )


def channels(xp: Any, x: Array) -> int:
    """Return C, on all devices together."""
    return x.shape[-1] * _devices_of_channels(xp)


def _devices_of_channels(xp: Any) -> int:
    axis = _axis_of(xp)
    if axis is None:
        return 1
    return _lax().psum(1, axis.name) if isinstance(axis, Named) else axis.size


def _axis_of(xp: Any) -> Axis | None:
    """Return the devices that share this library's channels, if any."""
    sharing = library()
    return channel_axis() if sharing and sharing in xp.__name__ else None


# -------------------------------------------------------------------------------------- iterations


def scan(xp: Any, step: Callable[[Any], tuple[Any, Any]], state: Any, length: int) -> Any:
    """Apply ``state, kept = step(state)`` repeatedly; return the state and all that was kept."""
    if _is(xp, "jax"):

        def forward(state: Any, _: Any) -> Any:
            return step(state)

        return _scan_in_jax(forward, state, None, length)
    kept: list[Any] = []
    for _ in range(length):
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def scan_reverse(xp: Any, step: Callable[[Any, Any], Any], state: Any, kept: Any) -> Any:
    """Apply ``state = step(state, keep)`` to all that :func:`scan` kept, last first."""
    if _is(xp, "jax"):

        def backward(state: Any, keep: Any) -> Any:
            return step(state, keep), None

        return _scan_in_jax(backward, state, kept, _length(kept), reverse=True)[0]
    for keep in reversed(kept):
        state = step(state, keep)
    return state


# On a CPU a loop runs faster than its unrolled steps and compiles in a tenth of the time: 0.5 s
# against 3 to 9 for 20 iterations of Sinkhorn. On a GPU every step of a loop is a few launches by
# the host, and pre of one token takes twice the time on the device: 71 us against 32 on an H200.
MOST_UNROLLED = 32
# XLA fuses small sums into all that reads them, again and again: it compiles the vjp of one token's
# 20 iterations, unrolled, for more than 200 s. With a barrier after every second step of a vjp it
# takes 3 s, and no more launches; after every fourth, 16 (JAX 0.10, compiled for an H200).
FUSED_STEPS = 2


def _scan_in_jax(function: Any, state: Any, kept: Any, length: int, reverse: bool = False) -> Any:
    """Apply jax.lax.scan, unrolled where XLA compiles for a GPU; only that form is lowered."""

    def rolled(state: Any, kept: Any) -> Any:
        return _lax().scan(function, state, kept, length=length, reverse=reverse)

    def unrolled(state: Any, kept: Any) -> Any:
        return _unrolled_scan(function, state, kept, length, reverse)

    if not 1 < length <= MOST_UNROLLED:
        return rolled(state, kept)
    return _by_platform(unrolled, rolled, state, kept)


def _unrolled_scan(function: Any, state: Any, kept: Any, length: int, reverse: bool) -> Any:
    mapped, stack = import_module("jax").tree.map, import_module("jax.numpy").stack
    outs: list[Any] = []
    steps = range(length)
    for k in reversed(steps) if reverse else steps:
        state, out = function(state, mapped(operator.itemgetter(k), kept))
        outs.append(out)
        of_vjp = kept is not None or out is not None
        if of_vjp and len(outs) % FUSED_STEPS == 0:
            state = _lax().optimization_barrier(state)

    def stacked(*some: Array) -> Array:
        return stack(some)

    return state, mapped(stacked, *(outs[::-1] if reverse else outs))


def _length(kept: Any) -> int:
    (length, *_), *_ = (leaf.shape for leaf in import_module("jax").tree.leaves(kept))
    return length


def scan_while(
    xp: Any,
    step: Callable[[Any], tuple[Any, Any]],
    idle: Callable[[Any], tuple[Any, Any]],
    state: Any,
    length: int,
) -> Any:
    """Scan while ``state.active`` is true anywhere.

    ``step`` must leave inactive entries unchanged, so that stopping early changes no bit. Where
    values can be read, the loop stops; in JAX the remaining steps run ``idle``, which costs
    nothing; inside MLX's transformations values cannot be read, so every step is taken.
    """
    if _is(xp, "jax"):

        def either(state: Any, _: Any) -> Any:
            return _lax().cond(xp.any(state.active), step, idle, state)

        return _lax().scan(either, state, None, length=length)
    kept: list[Any] = []
    for _ in range(length):
        if _known_false(xp, state.active):
            break
        state, keep = step(state)
        kept.append(keep)
    return state, kept


def _known_false(xp: Any, active: Array) -> bool:
    try:
        return not bool(xp.any(active))
    except ValueError:  # MLX's word for a value that is being traced
        return False
