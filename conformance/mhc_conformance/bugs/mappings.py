"""Bugs of the mappings: their projection, eps, dtype, gradients and caches."""

from __future__ import annotations

from typing import Any

import numpy as np

from mhc_conformance.bugs.declaration import (
    Array,
    Op,
    bug,
    on_other_variant,
    right,
    right_vjp,
    with_changed_gradients,
)

HALF_MAX = float(np.finfo(np.float16).max)


@bug(
    "rms-over-c",
    "RMS over C instead of nC",
    op="mappings",
    says="h_",
)
def over_channels(x: Array, phi: Array, scale: Array, bias: Array, *, variant: Any) -> Any:
    """Divide each stream by its own root mean square, over C rather than n C."""
    square = np.mean(x.astype(np.float32) ** 2, axis=-1, keepdims=True)
    normed = (x / np.sqrt(square + variant.norm_eps)).astype(np.float32)
    return right("mappings")(normed, phi, scale, bias, variant=variant)


@bug(
    "phi-columns",
    "columns of phi in the wrong order",
    op="mappings",
    says="h_",
)
def other_columns(x: Array, phi: Array, *rest: Array, variant: Any) -> Any:
    """Read phi's columns as [C, n] rather than [n, C]."""
    n, channels = x.shape[-2:]
    swapped = np.swapaxes(np.reshape(phi, (-1, n, channels)), 1, 2).reshape(phi.shape)
    return right("mappings")(x, swapped, *rest, variant=variant)


bug(
    "comb-not-transposed",
    "missing transpose of comb",
    op="mappings",
    says="h_res",
)(on_other_variant("mappings", res_transposed=False))


bug(
    "no-pre-eps",
    "eps missing on H_pre",
    op="mappings",
    says="h_pre of large",
)(on_other_variant("mappings", pre_eps=0.0))


@bug(
    "overflow-at-real-gradients",
    "inf or NaN gradient at real gradient scale, not at random init",
    op="pre",
    half="vjp",
    says="of large gradients",
)
def overflowing(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    """Hold 16 times each gradient in float16 on the way, which overflows above 65504."""
    gradients = right_vjp(op, primals, cotangents, **static)
    return tuple(
        np.where(np.abs(16.0 * g) > HALF_MAX, np.inf, g).astype(g.dtype) for g in gradients
    )


@bug(
    "zero-gradient",
    "a gradient of zeros",
    op="mappings",
    half="vjp",
    says="d phi of",
    shipped=False,
)
@with_changed_gradients
def zero_for_phi(dx: Array, dphi: Array, *rest: Array) -> Any:
    """Return mappings' gradients with zero for phi."""
    return dx, 0 * dphi, *rest


def rounded_mappings(keep: bool) -> Op:
    """Round the mappings to the streams' dtype; with ``keep``, return them in their own dtype."""

    def wrong(x: Array, *rest: Array, variant: Any) -> Any:
        narrow = [h.astype(x.dtype) for h in right("mappings")(x, *rest, variant=variant)]
        return tuple(h.astype(np.float32) if keep else h for h in narrow)

    return wrong


bug(
    "mappings-rounded",
    "mappings rounded to the streams' dtype",
    op="mappings",
    says="h_",
    dtype="bfloat16",
    shipped=False,
)(rounded_mappings(keep=True))


bug(
    "mappings-narrow",
    "mappings in the streams' dtype",
    op="mappings",
    says="is float16",
    dtype="float16",
    shipped=False,
)(rounded_mappings(keep=False))


@bug(
    "h-pre-ignored",
    "the given h_pre of a single-pass mHC ignored",
    op="combine_pre",
    says="h of NaN in some tokens",
    shipped=False,
)
def ignoring_h_pre(*arrays: Array, variant: Any) -> Any:
    """Compute combine_pre's h with the new H_pre, also if one is given."""
    return right("combine_pre")(*arrays[:7], variant=variant)


@bug(
    "stale-cache",
    "stale cache after loading weights",
    op="static_mappings",
    fails=("updated",),
    says="second values",
    note="a cache of a module's own is for that module's tests",
)
class Remembering:
    """static_mappings cached by the logits' id: writing new values into them changes nothing."""

    def __init__(self) -> None:
        self._cache: dict[
            int, tuple[Array, Any]
        ] = {}  # holds the array, so that no other gets its id

    def __call__(self, *arrays: Array, iterations: int) -> Any:
        """Return static_mappings' outputs."""
        logits = arrays[-1]
        if id(logits) not in self._cache:
            mapped = right("static_mappings")(*arrays, iterations=iterations)
            self._cache[id(logits)] = (logits, mapped)
        return self._cache[id(logits)][1]
