"""Bugs of what is done with the streams."""

from __future__ import annotations

from collections.abc import Callable

from mhc_conformance.autodiff import Value
from mhc_conformance.patches.declaration import patch, stopped


@patch("h-res-transposed", "H_res is applied transposed", "combine")
def _other_way(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return right(x, y, h_post, None if h_res is None else h_res.swapaxes(-1, -2))

    return combine


@patch("h-res-ignored", "the streams are not mixed", "combine")
def _unmixed(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return x + h_post[..., None] * y[..., None, :]

    return combine


@patch("no-residual", "the streams are left out", "combine")
def _no_streams(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return h_post[..., None] * y[..., None, :] + 0.0 * x

    return combine


@patch("h-post-ignored", "the layer's output is added without H_post", "combine")
def _no_post(right: Callable[..., Value]) -> Callable[..., Value]:
    def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
        return right(x, y, h_post * 0.0 + 1.0, h_res)

    return combine


@patch("mean-for-sum", "the mean over the streams in place of their sum", "aggregate")
def _mean(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, h_pre) / x.shape[-2]

    return aggregate


@patch(
    "no-gradient-of-h-pre",
    "no gradient passes through H_pre to the mappings",
    "aggregate",
    which="backward",
)
def _constant_h_pre(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, stopped(h_pre))

    return aggregate
