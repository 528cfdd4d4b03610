"""mappings: H_pre, H_post and H_res of every token, from the streams themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhc_core.math import _xp
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

PROJECTION = {"phi": "m nC", "scale": "parts", "bias": "m"}
"""m and parts are the variant's: its mixer has its logits' rows of phi, and their scale."""

OP = Op(
    name="mappings",
    arrays={"x": "... n C", **PROJECTION},
    outputs={
        "h_pre": Out("... n", "mapping"),
        "h_post": Out("... n", "mapping"),
        "h_res": Out("... n n", "mapping", mixed=True),
    },
    static={"variant": check_variant},
)


class Projected(NamedTuple):
    """The part of the projection that the vjp needs: m + 1 numbers a token.

    u = vec(x) @ phi.T, and r = rsqrt(mean(vec(x)^2) + norm_eps).
    """

    u: Any  # [..., m]
    r: Any  # [..., 1]


def forward(x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant) -> tuple[Any, Any, Any]:
    """Compute eqs. (7-8) and (14-19)."""
    return forward_with_saved(x, phi, scale, bias, variant=variant)[0]


def forward_with_saved(
    x: Any, phi: Any, scale: Any, bias: Any, *, variant: Variant
) -> tuple[Any, Projected]:
    """Return the mappings and the projection behind them."""
    xp = _xp.namespace(x)
    x, phi, scale, bias = (_xp.upcast(xp, array) for array in (x, phi, scale, bias))
    projected = projection(xp, x, phi, variant)
    return activated(xp, x.shape[-2], projected, scale, bias, variant), projected


def vjp(
    primals: Any,
    cotangents: Any,
    saved: Any = None,
    saved_cotangents: Any = None,
    *,
    variant: Variant,
):
    """Pull back through the activations, the division by the RMS and the projection."""
    xp = _xp.namespace(primals[0])
    x, phi, scale, bias = (_xp.upcast(xp, array) for array in primals)
    projected = Projected(*saved) if saved else projection(xp, x, phi, variant)
    more = Projected(*saved_cotangents) if saved_cotangents else None
    gradients = pullback(xp, x, phi, scale, bias, projected, cotangents, variant, more)
    return tuple(_xp.as_dtype_of(xp, g, p) for g, p in zip(gradients, primals, strict=True))


def projection(xp: Any, x: Any, phi: Any, variant: Variant) -> Projected:
    """Project vec(x) and take its root mean square, over all n * C numbers of a token."""
    u, square = _xp.over_channels(xp, _xp.project(xp, x, phi), _xp.mean_square(xp, x, axes=2))
    root, more = xp.sqrt(square + variant.norm_eps), variant.norm_root_eps
    return Projected(u, 1 / (root + more if more else root))


def _sizes(n: int, columns: int) -> tuple[int, ...]:
    """Return the columns of each part: pre n, post n, and the mixer's logits where it has any."""
    return (n, n, columns - 2 * n)[: 2 + (columns > 2 * n)]


def groups(xp: Any, scale: Any, sizes: tuple[int, ...]) -> Any:
    """Repeat each scale over the columns of its part."""
    parts = [xp.broadcast_to(scale[i : i + 1], (size,)) for i, size in enumerate(sizes)]
    return xp.concat(parts, axis=0)


def _activate(xp: Any, n: int, projected: Projected, scale: Any, bias: Any):
    """Return the two sigmoids and the mixer's logits."""
    sizes = _sizes(n, bias.shape[0])
    z = (projected.u * projected.r) * groups(xp, scale, sizes) + bias
    return _xp.sigmoid(xp, z[..., :n]), _xp.sigmoid(xp, z[..., n : 2 * n]), z[..., 2 * n :]


def _turned(variant: Variant) -> bool:
    """Return whether H_res is the transpose of the mixer's; Sinkhorn transposes its logits."""
    return variant.res_transposed and variant.mixer != "sinkhorn"


def _mixed(xp: Any, logits: Any, n: int, variant: Variant) -> Any:
    forward = variant.made_by.forward
    if forward is None:
        return None
    h_res = forward(logits, n=n, **variant.options)
    return _xp.swap(xp, h_res) if _turned(variant) else h_res


def _unmixed(xp: Any, logits: Any, g: Any, n: int, variant: Variant) -> list[Any]:
    """Return the gradient of the logits, or none where there are none."""
    vjp = variant.made_by.vjp
    if vjp is None or not logits.shape[-1]:
        return []
    g = _xp.swap(xp, g) if _turned(variant) else g
    return [vjp(logits, g, n=n, **variant.options)]


def activated(xp: Any, n: int, projected: Projected, scale: Any, bias: Any, variant: Variant):
    """H_pre = sigmoid + pre_eps; H_post = post_scale sigmoid; H_res is the mixer's, or None."""
    pre, post, logits = _activate(xp, n, projected, scale, bias)
    h_res = _mixed(xp, logits, n, variant)
    return pre + variant.pre_eps, variant.post_scale * post + variant.post_eps, h_res


def pullback(
    xp: Any,
    x: Any,
    phi: Any,
    scale: Any,
    bias: Any,
    projected: Projected,
    cotangents: Any,
    variant: Variant,
    more: Projected | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Return dx, dphi, dscale and dbias in the dtype of computation.

    ``more`` holds cotangents of u and r to add to those from the mappings.
    """
    n, sizes = x.shape[-2], _sizes(x.shape[-2], bias.shape[0])
    pre, post, logits = _activate(xp, n, projected, scale, bias)
    g_pre, g_post = (_xp.upcast(xp, g) for g in cotangents[:2])
    g_res = None if cotangents[2] is None else _xp.upcast(xp, cotangents[2])
    dz = xp.concat(
        [
            g_pre * pre * (1 - pre),
            g_post * variant.post_scale * post * (1 - post),
            *_unmixed(xp, logits, g_res, n, variant),
        ],
        axis=-1,
    )
    summed = _xp.sum_tokens(xp, dz * (projected.u * projected.r), 1)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    dscale = xp.stack([xp.sum(summed[end - k : end]) for end, k in zip(ends, sizes, strict=True)])
    dbias = _xp.sum_tokens(xp, dz, 1)
    dx, dphi = projection_pullback(
        xp, x, phi, projected, dz * groups(xp, scale, sizes), variant, more
    )
    return dx, dphi, dscale, dbias


def projection_pullback(
    xp: Any,
    x: Any,
    phi: Any,
    projected: Projected,
    d_product: Any,
    variant: Variant,
    more: Projected | None = None,
):
    """Return dx and dphi from the cotangent of u * r, and from ``more``, those of u and r.

    du = d r, dr = d . u, and the root mean square brings dx += -dr r^3 x / (n C). For streams of
    1e18, r^3 underflows in float32 and d . u overflows; d . (u r), d r and r x do neither.
    """
    u, r = projected
    pull = xp.sum(d_product * (u * r), axis=-1, keepdims=True)
    du = d_product * r
    if more is not None:
        du, pull = du + more.u, pull + more.r * r
    if variant.norm_root_eps:  # of the root alone, without what is added to it
        pull = pull / (1 - variant.norm_root_eps * r)
    pull = (pull * r / -(x.shape[-2] * _xp.channels(xp, x)))[..., None]
    dx = _xp.unproject(xp, du, phi, x) + pull * (x * r[..., None])
    return dx, _xp.gram(xp, du, x, like=phi)
