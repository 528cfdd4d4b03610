"""Bugs of kernels: their tiles, tails, reductions, barriers and launches.

What a kernel's bug does to the numbers is done here in NumPy, by reading or writing the array
elements that the kernel would.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from mhc_conformance.bugs.declaration import Array, bug, right, with_changed_gradients

THREADGROUP_MEMORY = 32 * 1024  # bytes that Metal gives


def _tokens(array: Array, like: int) -> Array:
    """View an array with all but its last axes flattened into one, zero tokens too."""
    split = array.ndim - like
    return array.reshape(math.prod(array.shape[:split]), *array.shape[split:])


def _rows(tokens: int, step: int, width: int) -> Array:
    """Return the addresses that a kernel reads for each token: ``step`` apart, ``width`` long."""
    start: Array = np.arange(tokens)
    return step * start[:, None] + np.arange(width)


@bug(
    "one-c-only",
    "fused kernel right only for one C",
    op="combine",
    says="x of",
)
def for_eight_channels(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Read the tokens of y 8 channels apart, the C that the kernel was compiled for."""
    flat = y.ravel()
    index = _rows(math.prod(y.shape[:-1]), step=8, width=y.shape[-1])
    misread = flat[index % max(1, flat.size)].reshape(y.shape)
    return right("combine")(x, misread, h_post, h_res)


@bug(
    "dead-tail",
    "a tail that is dead code",
    op="combine",
    says="x of",
)
def without_tail(x: Array, *rest: Array) -> Array:
    """Write vectors of 4 channels, and never run the loop over the remaining channels."""
    out = right("combine")(x, *rest).copy()
    out[..., out.shape[-1] // 4 * 4 :] = 0
    return out


@bug(
    "tail-under-if",
    "a tail under #if on a template argument",
    op="combine",
    half="vjp",
    says="d x of",
)
@with_changed_gradients
def gradients_without_tail(dx: Array, dy: Array, *rest: Array) -> Any:
    """Leave dx unwritten after the last vector: `#if C % 4` sees no template argument, but 0."""
    dx = np.array(dx)
    dx[..., dx.shape[-1] // 4 * 4 :] = 0
    return dx, dy, *rest


@bug(
    "carry-over",
    "carry-over between rows: odd tokens wrong from T=1024 on",
    op="combine",
    says="leading (1031,)",
)
def carrying_over(x: Array, *rest: Array) -> Array:
    """Add an odd token's predecessor to it, from token 1024 on."""
    out = np.array(_tokens(right("combine")(x, *rest), 2))
    out[1025::2] += out[1024:-1:2][: len(out[1025::2])]
    return out.reshape(x.shape)


@bug(
    "token-off",
    "gradients off by one token",
    op="aggregate",
    half="vjp",
    says="d x of",
    shipped=False,
)
@with_changed_gradients
def one_token_off(dx: Array, *rest: Array) -> Any:
    """Return each token's dx at its neighbour."""
    return np.roll(_tokens(dx, 2), 1, axis=0).reshape(dx.shape), *rest


@bug(
    "no-tokens",
    "T=0 launch",
    op="combine",
    says="raised RuntimeError: invalid grid",
)
def without_empty_launch(x: Array, *rest: Array) -> Array:
    """Launch one threadgroup per token; a launch of none is an error."""
    if x.size == 0:
        raise RuntimeError("invalid grid: 0 threadgroups")
    return right("combine")(x, *rest)


@bug(
    "unsupported-n",
    "unsupported n silently wrong",
    op="aggregate",
    says="h of",
)
def for_eight_streams(x: Array, h_pre: Array) -> Array:
    """Sum only the first 8 streams, for which the kernel has registers, without an error."""
    return right("aggregate")(x[..., :8, :], h_pre[..., :8])


@bug(
    "unrolled-past-n",
    "an unrolled loop reading past n, where n is no multiple of 8",
    op="aggregate",
    says="h of",
    note="the read itself, whatever it finds: mhc-metal-simulator",
)
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


@bug(
    "whole-tiles-only",
    "tiles assuming C divisible by the threadgroup",
    op="aggregate",
    says="C=257",
)
def in_whole_tiles(x: Array, h_pre: Array) -> Array:
    """Launch C // 256 threadgroups of 256 channels each, if C is above 256."""
    h = right("aggregate")(x, h_pre).copy()
    if h.shape[-1] > 256:
        h[..., h.shape[-1] // 256 * 256 :] = 0
    return h


@bug(
    "tree-double-count",
    "a tree reduction that double-counts when the threadgroup is no power of two",
    op="rms_norm",
    says="y of",
)
def adding_the_middle_twice(x: Array, weight: Array, *, eps: float) -> Array:
    """Reduce C threads by halves; if their number is odd, both halves count the middle one."""
    squares = x.astype(np.float32) ** 2
    while squares.shape[-1] > 1:
        half = (squares.shape[-1] + 1) // 2
        squares = squares[..., :half] + squares[..., -half:]
    root = np.sqrt(squares / np.float32(x.shape[-1]) + np.float32(eps))
    return (x / root * weight).astype(x.dtype)


@bug(
    "float4-through-half",
    "a float4 load through a half pointer",
    op="aggregate",
    says="h of",
    dtype="float16",
)
def float4_through_half(x: Array, h_pre: Array) -> Array:
    """Load a float4 through a pointer to half: two neighbours are read as one float."""
    if x.dtype != np.float16:
        return right("aggregate")(x, h_pre)
    pairs = np.append(x.ravel(), np.zeros(x.size, x.dtype)).view(np.float32)
    return right("aggregate")(pairs.reshape(x.shape), h_pre).astype(x.dtype)


@bug(
    "no-barrier",
    "shared memory reused without a barrier",
    op="rms_norm",
    fails=("repeated", "forward"),
    says="differs between two runs on the same input",
    note="where a race is won every time: mhc-metal-simulator, which finds the race itself",
)
class Racing:
    """A kernel that overwrites a root mean square that half of the threads still have to read.

    On a GPU luck decides which threads are late; here half of them are in every second launch.
    """

    def __init__(self) -> None:
        self._launches = itertools.count()

    def __call__(self, x: Array, weight: Array, *, eps: float) -> Array:
        """Return rms_norm's output."""
        upcast = _tokens(x, 1).astype(np.float32)
        root = np.sqrt(np.mean(upcast**2, axis=-1, keepdims=True) + np.float32(eps))
        roots = np.repeat(root, x.shape[-1], axis=-1)
        if next(self._launches) % 2:
            late = x.shape[-1] // 2
            roots[:-1, late:] = roots[1:, late:]
        return (upcast / roots * weight).astype(x.dtype).reshape(x.shape)


@bug(
    "threadgroup-memory",
    "more than 32 KiB of threadgroup memory at n=64",
    op="combine",
    says="n=64",
)
def needing_too_much_memory(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Need more threadgroup memory for H_res and its cotangent than Metal allows."""
    n = x.shape[-2]
    if (needed := 4 * (2 * n * n + n)) > THREADGROUP_MEMORY:
        raise RuntimeError(
            f"Threadgroup memory size ({needed}) exceeds the maximum threadgroup memory allowed "
            f"({THREADGROUP_MEMORY})"
        )
    return right("combine")(x, y, h_post, h_res)
