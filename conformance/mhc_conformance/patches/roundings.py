"""Roundings to the dtype of the streams, or to TF32, where the oracle has none.

Each says at which place. A cast of a library rounds what passes it, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mhc_conformance import oracle
from mhc_conformance.autodiff import Value, broadcast_to, node, sigmoid, total, value
from mhc_conformance.cases import NARROW
from mhc_conformance.patches.declaration import Array, Replaced, cast, patch, patches
from mhc_conformance.patches.sinkhorn import FAINT, masked


def _normed(x: Value, variant: Any) -> tuple[Value, Value]:
    """Return the streams as rows, and their root mean square."""
    vec = x.reshape(int(np.prod(x.shape[:-2])), x.shape[-2] * x.shape[-1])
    root = (total(vec * vec, -1) / vec.shape[-1] + variant.norm_eps) ** 0.5
    return vec, root + variant.norm_root_eps


# --- TF32 -------------------------------------------------------------------------------------


def _nearest(data: Array) -> Array:
    """Round to TF32 as ``cvt.rna.tf32.f32`` does."""
    return _tf32(data, 0x1000)


def _truncated(data: Array) -> Array:
    """Leave out the 13 bits that a tensor core does not read."""
    return _tf32(data, 0)


def _tf32(data: Array, add: int) -> Array:
    bits = np.asarray(data, np.float32).view(np.int32) + add
    return (bits & ~0x1FFF).view(np.float32).astype(np.float64)


def _product_in_tf32(read: Callable[[Array], Array]) -> Replaced:
    """Return project whose product, and the two of its backward, read their operands so."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def project(x: Value, phi: Value, variant: Any) -> Value:
            vec, root = _normed(x, variant)
            left: Any = read(vec.data)
            weight: Any = read(phi.data)

            def pull(g: Any) -> tuple[Array, Array]:
                cotangent: Any = read(g)
                return cotangent @ weight, cotangent.T @ left

            made = node("tf32", left @ weight.T, (vec, phi), pull)
            return (made / root).reshape(*x.shape[:-2], phi.shape[0])

        return project

    return replacement


for _how, _read in (("truncated", _truncated), ("rounded", _nearest)):
    patch(
        "projection-in-tf32",
        f"phi's product in TF32, its operands {_how} to 10 bits, and so the products of its vjp",
        "project",
    )(_product_in_tf32(_read))


# --- products in the streams' dtype -----------------------------------------------------------


def _projected_in(dtype: str) -> Replaced:
    """Return project whose operands and product are of a dtype, as are its gradients."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def project(x: Value, phi: Value, variant: Any) -> Value:
            vec, root = _normed(cast(dtype, x), variant)
            left, weight = cast(dtype, vec / root), cast(dtype, phi)
            made = cast(dtype, left @ weight.swapaxes(0, 1))
            return made.reshape(*x.shape[:-2], phi.shape[0])

        return project

    return replacement


def _combined_in(dtype: str) -> Replaced:
    """Return combine whose mappings, products and sum are of a dtype, as are all gradients."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def narrow(array: Value) -> Value:
            return cast(dtype, array)

        def combine(x: Value, y: Value, h_post: Value, h_res: Value | None = None) -> Value:
            written = _product(dtype, h_post[..., None], y[..., None, :])
            return (x if h_res is None else narrow(narrow(h_res) @ x)) + written

        return combine

    return replacement


def _product(dtype: str, a: Value, b: Value) -> Value:
    """Return a product of a dtype; each gradient is rounded before it is summed, and after."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    wide = [cast(dtype, broadcast_to(cast(dtype, one), shape)) for one in (a, b)]
    return cast(dtype, wide[0] * wide[1])


def _aggregated_in(dtype: str, each: bool) -> Replaced:
    """Return aggregate whose products are of a dtype, and so their sum, or each step of it."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def aggregate(x: Value, h_pre: Value) -> Value:
            parts = _product(dtype, h_pre[..., None], x)
            if not each:
                return cast(dtype, total(parts, -2))[..., 0, :]
            made = parts[..., 0, :]
            for stream in range(1, x.shape[-2]):
                made = cast(dtype, made + parts[..., stream, :])
            return made

        return aggregate

    return replacement


def _cast_first(dtype: str) -> Replaced:
    """Return a function whose first array is cast: its gradient is rounded by itself."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def function(first: Value, *others: Any) -> Any:
            return right(cast(dtype, first), *others)

        return function

    return replacement


def _returned_in(dtype: str) -> Replaced:
    """Return a function whose result is cast, and so the cotangent that it gets."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def function(*given: Any, **static: Any) -> Any:
            return cast(dtype, right(*given, **static))

        return function

    return replacement


def _rounded_mappings(dtype: str) -> Replaced:
    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def mappings(*given: Any, **static: Any) -> Any:
            H_pre, H_post, H_res = right(*given, **static)
            return H_pre, cast(dtype, H_post), None if H_res is None else cast(dtype, H_res)

        return mappings

    return replacement


for _dtype in NARROW:
    patch(
        "gradient-in-parts",
        f"the gradient of the streams is the sum of two that are rounded to {_dtype}",
        "project",
        "aggregate",
        which="backward",
    )(_cast_first(_dtype))
    patch(
        "mappings-narrow",
        f"H_post, H_res and each product are rounded to {_dtype}",
        "combine",
    )(_combined_in(_dtype))
    patch(
        f"projection-in-{_dtype}",
        f"normalised streams, phi and their product are rounded to {_dtype}",
        "project",
    )(_projected_in(_dtype))
    patch("mappings-rounded", f"H_res and its cotangent are rounded to {_dtype}", "sinkhorn")(
        _returned_in(_dtype)
    )
    for _each in (False, True):
        _sum = "each step of their sum" if _each else "their sum"
        patch(
            "aggregate-narrow",
            f"H_pre, its products and {_sum} are rounded to {_dtype}",
            "aggregate",
        )(_aggregated_in(_dtype, _each))
        patches(
            f"projection-in-{_dtype}",
            f"normalised streams, phi, their product, all mappings, the products with the streams "
            f"and {_sum} are rounded to {_dtype}",
            project=_projected_in(_dtype),
            mappings=_rounded_mappings(_dtype),
            aggregate=_aggregated_in(_dtype, _each),
        )


for _floor in FAINT:
    patches(
        "nan-where-masked",
        f"where(sum > {_floor:g}, 1 / sum, ...) has a NaN gradient where a line is 0, and the "
        "gradient of the streams is the sum of two that are rounded to bfloat16",
        sinkhorn=masked(_floor, careful=False),
        aggregate=_cast_first("bfloat16"),
        combine=_cast_first("bfloat16"),
    )


# --- gates ------------------------------------------------------------------------------------


def _gated_in(dtype: str, each: bool) -> Replaced:
    """Return the gates whose steps after the norm are of a dtype, as are all gradients.

    SiLU and the mean are one step each, or two where ``each``.
    """

    def narrow(array: Value) -> Value:
        return cast(dtype, array)

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Any:
            n, C = x.shape[-2:]
            normed = narrow(oracle.rms_norm(narrow(x), narrow(norm).reshape(n, C) + 1.0, eps))
            u = narrow(normed)  # whose gradient is rounded before that of the first use is added
            low = narrow(narrow(_times(narrow(normed), down)) / n)
            low = (
                _product(dtype, low, _sigmoid_in(dtype, narrow(low), each))
                if each
                else narrow(low * sigmoid(low))
            )
            z = narrow(_times(low[..., None, :], up)).reshape(*x.shape)
            summed = total(_product(dtype, _sigmoid_in(dtype, z, each), u), -2)
            mean = narrow(summed) * float(narrow(value(1.0 / n)).data) if each else summed / n
            return narrow(mean[..., 0, :]), u

        return gated

    return replacement


def _injected_in(dtype: str, each: bool) -> Replaced:
    """Return gated_pre whose H_post is made by steps of a dtype."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def gated_pre(
            x: Value, norm: Value, down: Value, up: Value, inject: Value, eps: float
        ) -> Any:
            h, u = oracle.gated(x, norm, down, up, eps)
            z = cast(dtype, cast(dtype, _times(cast(dtype, u), inject)) / x.shape[-2])
            return h, cast(dtype, 2.0 * _sigmoid_in(dtype, z, each))

        return gated_pre

    return replacement


def _sigmoid_in(dtype: str, z: Value, each: bool) -> Value:
    """Return a sigmoid of a dtype, whose vjp reads the rounded output.

    Where ``each``, exp is rounded, as in MLX's ``1 / (1 + exp(abs(x)))`` on a CPU (its
    ``mlx/backend/cpu/unary_ops.h``), and so is each step of the vjp, s (1 - s).
    """

    def narrow(data: Array) -> Array:
        return cast(dtype, value(data)).data

    if not each:
        s = narrow(sigmoid(value(z.data)).data)
        return node("sigmoid", s, (z,), lambda g: (np.asarray(g) * s * (1.0 - s),))
    small = 1.0 / (1.0 + narrow(np.exp(np.abs(z.data))))
    s = narrow(np.where(z.data < 0, small, 1.0 - small))
    slope = narrow(s * narrow(1.0 - s))
    return node("sigmoid", s, (z,), lambda g: (np.asarray(g) * slope,))


def _times(u: Value, weight: Value) -> Value:
    leading, size = u.shape[:-2], u.shape[-2] * u.shape[-1]
    made = u.reshape(int(np.prod(leading)), size) @ weight.swapaxes(0, 1)
    return made.reshape(*leading, weight.shape[0])


for _dtype in NARROW:
    for _each in (False, True):
        patches(
            "gates-narrow",
            f"each {'operation' if _each else 'step'} after the norm is rounded to {_dtype}, and "
            "so is each of its gradients",
            gated=_gated_in(_dtype, _each),
            gated_pre=_injected_in(_dtype, _each),
        )


# --- sums -------------------------------------------------------------------------------------


def _added_in(dtype: str) -> Replaced:
    """Return expand whose gradient is added stream by stream, each sum rounded."""

    def replacement(right: Callable[..., Value]) -> Callable[..., Value]:
        def expand(h: Value, n: int) -> Value:
            def pull(g: Array) -> tuple[Array]:
                made = g[..., 0, :]
                for stream in range(1, n):
                    made = cast(dtype, value(made + g[..., stream, :])).data
                return (made,)

            return node("expand", right(h, n).data, (h,), pull)

        return expand

    return replacement


for _dtype in NARROW:
    patch(
        f"summed-in-{_dtype}", f"the gradient of h is a sum in {_dtype}", "expand", which="backward"
    )(_added_in(_dtype))
