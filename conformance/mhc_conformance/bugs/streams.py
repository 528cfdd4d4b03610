"""Bugs of the ops on streams and of their gradients."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mhc_conformance.bugs.declaration import Array, bug, right, with_changed_gradients


@bug(
    "h-res-transposed",
    "H_res transposed",
    op="combine",
    says="x of",
    shipped=False,
)
def transposed_h_res(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Mix the streams by columns of H_res."""
    return right("combine")(x, y, h_post, h_res.swapaxes(-1, -2))


@bug(
    "first-token-for-all",
    "mappings of the first token for all",
    op="combine",
    says="x of",
    shipped=False,
)
def first_token_for_all(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Use the first token's mappings for every token."""
    if not x.size:
        return right("combine")(x, y, h_post, h_res)
    one = [h.reshape(-1, *h.shape[-rank:])[0] for h, rank in ((h_post, 1), (h_res, 2))]
    many = [np.broadcast_to(h, (*x.shape[:-2], *h.shape)) for h in one]
    return right("combine")(x, y, *many)


@bug(
    "summed-in-bfloat16",
    "a sum in the streams' dtype",
    op="contract",
    says="h of",
    dtype="bfloat16",
    shipped=False,
)
def summed_in_bfloat16(x: Array, *, how: str) -> Array:
    """Add the streams in their own dtype."""
    summed = np.add.reduce(x, axis=-2, dtype=ml_dtypes.bfloat16)
    return (summed / (x.shape[-2] if how == "mean" else 1)).astype(x.dtype)


@bug(
    "wrong-sign",
    "a gradient with the wrong sign",
    op="combine",
    half="vjp",
    says="d h_post of",
    shipped=False,
)
@with_changed_gradients
def one_sign_wrong(dx: Array, dy: Array, dh_post: Array, dh_res: Array) -> Any:
    """Return combine's gradients with the sign of d h_post flipped."""
    return dx, dy, -dh_post, dh_res


@bug(
    "gradient-missing",
    "a gradient too few",
    op="aggregate",
    half="vjp",
    says="has 1 arrays; needs 2",
    shipped=False,
)
@with_changed_gradients
def only_the_first(first: Array, *_: Array) -> Any:
    """Return only the first gradient."""
    return (first,)


@bug(
    "gradient-in-float64",
    "a gradient in another dtype than its primal",
    op="rms_norm",
    half="vjp",
    says="is float64",
    shipped=False,
)
@with_changed_gradients
def weight_in_float64(dx: Array, dweight: Array) -> Any:
    """Sum the gradient of a weight in float64 and leave it there."""
    return dx, dweight.astype(np.float64)
