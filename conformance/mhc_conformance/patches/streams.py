"""Bugs of what is done with the streams."""

from __future__ import annotations

from collections.abc import Callable

from mhc_conformance.autodiff import Value
from mhc_conformance.cases import NARROW
from mhc_conformance.patches.declaration import Replaced, cast, patch, rounded, stopped


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


def _combined_in(dtype: str) -> Replaced:
    """Return combine whose mappings, products and sum are rounded, as are its gradients."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def narrow(array: Value) -> Value:
            return cast(dtype, array)

        def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
            added = narrow(narrow(h_post)[..., None] * y[..., None, :])
            return (x if h_res is None else narrow(narrow(h_res) @ x)) + added

        return combine

    return replacement


for _dtype in NARROW:
    patch(
        "mappings-narrow",
        f"H_post, H_res and each product are rounded to {_dtype}",
        "combine",
    )(_combined_in(_dtype))


@patch("mean-for-sum", "the mean over the streams in place of their sum", "aggregate")
def _mean(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, h_pre) / x.shape[-2]

    return aggregate


@patch(
    "no-gradient-of-h-pre",
    "no gradient passes through H_pre to the mappings",
    "aggregate",
    "backward",
)
def _constant_h_pre(right: Callable[..., Value]) -> Callable[..., Value]:
    def aggregate(x: Value, h_pre: Value) -> Value:
        return right(x, stopped(h_pre))

    return aggregate


def _collapsed_in(dtype: str) -> Replaced:
    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def aggregate(x: Value, h_pre: Value) -> Value:
            h_pre = cast(dtype, h_pre)
            made: Value | None = None
            for stream in range(x.shape[-2]):
                part = rounded(dtype, h_pre[..., stream, None] * x[..., stream, :])
                made = part if made is None else rounded(dtype, made + part)
            assert made is not None
            return made

        return aggregate

    return replacement


for _dtype in NARROW:
    patch("aggregate-narrow", f"H_pre and each product are rounded to {_dtype}", "aggregate")(
        _collapsed_in(_dtype)
    )
