"""mappings: H_pre, H_post and H_res of every token, from the streams themselves."""

from __future__ import annotations

from typing import Any, NamedTuple

from mhc_core.math import _xp, sinkhorn
from mhc_core.signature import Op, Out
from mhc_core.variants import Variant, check_variant

PROJECTION = {"phi": "m nC", "scale": "3", "bias": "m"}

OP = Op(
    name="mappings",
    arrays={"x": "... n C", **PROJECTION},
    outputs={
        "h_pre": Out("... n", "mapping"),
        "h_post": Out("... n", "mapping"),
        "h_res": Out("... n n", "mapping"),
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
    projected = projection(xp, x, phi, variant.norm_eps)
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
    projected = Projected(*saved) if saved else projection(xp, x, phi, variant.norm_eps)
    more = Projected(*saved_cotangents) if saved_cotangents else None
    gradients = pullback(xp, x, phi, scale, bias, projected, cotangents, variant, more)
    return tuple(_xp.as_dtype_of(xp, g, p) for g, p in zip(gradients, primals, strict=True))


def projection(xp: Any, x: Any, phi: Any, norm_eps: float) -> Projected:
    """Project vec(x) and take its root mean square, over all n * C numbers of a token."""
    mean = _xp.mean_square(xp, x, axes=2)
    return Projected(_xp.project(xp, x, phi), 1 / xp.sqrt(mean + norm_eps))


def groups(xp: Any, scale: Any, n: int) -> Any:
    """Repeat the three scales over their columns: pre n, post n, res n * n."""
    parts = [xp.broadcast_to(scale[i : i + 1], (size,)) for i, size in enumerate((n, n, n * n))]
    return xp.concat(parts, axis=0)


def _activate(xp: Any, n: int, projected: Projected, scale: Any, bias: Any, variant: Variant):
    """Return the two sigmoids and the logits of H_res, in H_res's orientation."""
    z = (projected.u * projected.r) * groups(xp, scale, n) + bias
    logits = xp.reshape(z[..., 2 * n :], (*z.shape[:-1], n, n))
    if variant.res_transposed:
        logits = _xp.swap(xp, logits)
    return _xp.sigmoid(xp, z[..., :n]), _xp.sigmoid(xp, z[..., n : 2 * n]), logits


def _sinkhorn(variant: Variant) -> dict[str, Any]:
    return {
        "iterations": variant.sinkhorn_iterations,
        "eps": variant.sinkhorn_eps,
        "first": variant.sinkhorn_first,
    }


def activated(xp: Any, n: int, projected: Projected, scale: Any, bias: Any, variant: Variant):
    """H_pre = sigmoid + pre_eps; H_post = post_scale sigmoid; H_res = sinkhorn."""
    pre, post, logits = _activate(xp, n, projected, scale, bias, variant)
    h_res = sinkhorn.forward(logits, **_sinkhorn(variant))
    return pre + variant.pre_eps, variant.post_scale * post, h_res


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
    n = x.shape[-2]
    pre, post, logits = _activate(xp, n, projected, scale, bias, variant)
    g_pre, g_post, g_res = (_xp.upcast(xp, g) for g in cotangents)
    (d_logits,) = sinkhorn.vjp((logits,), (g_res,), **_sinkhorn(variant))
    if variant.res_transposed:
        d_logits = _xp.swap(xp, d_logits)
    dz = xp.concat(
        [
            g_pre * pre * (1 - pre),
            g_post * variant.post_scale * post * (1 - post),
            xp.reshape(d_logits, (*d_logits.shape[:-2], n * n)),
        ],
        axis=-1,
    )
    summed = _xp.sum_tokens(xp, dz * (projected.u * projected.r), 1)
    dscale = xp.stack([xp.sum(summed[:n]), xp.sum(summed[n : 2 * n]), xp.sum(summed[2 * n :])])
    dbias = _xp.sum_tokens(xp, dz, 1)
    dx, dphi = projection_pullback(xp, x, phi, projected, dz * groups(xp, scale, n), more)
    return dx, dphi, dscale, dbias


def projection_pullback(
    xp: Any, x: Any, phi: Any, projected: Projected, d_product: Any, more: Projected | None = None
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
    pull = (pull * r / -(x.shape[-2] * x.shape[-1]))[..., None]
    dx = _xp.unproject(xp, du, phi, x) + pull * (x * r[..., None])
    return dx, _xp.gram(xp, du, x, like=phi)
