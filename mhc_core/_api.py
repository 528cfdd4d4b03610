"""The uniform API: one documented function per op, which runs on the chosen backend.

Shapes: ``...`` is any leading shape (its product is T tokens), n the streams, C the channels,
``m = 2 n + L``, with L the logits of the variant's mixer (``n * n`` with Sinkhorn). H_res is
always oriented as in the paper, ``x'_i = sum_j H_res[i, j] x_j``.

Dtypes: streams are float32, float16, bfloat16 or, where the library has it, float64. Mappings,
Sinkhorn and all sums are computed in float32 (float64 for float64 streams); streams and h are
rounded to the streams' dtype once, at the end. Gradients have their primal's dtype.

Errors: every op raises TypeError for an argument that is not an array, is an array of the wrong
library or has no floating dtype, and ValueError for a wrong shape or value. Both are raised before
any work, read the same on every backend, and name the argument, what was received and what is
needed. Where no backend can run the call, :class:`mhc_core.BackendError` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import isfunction
from typing import TYPE_CHECKING, Any, Literal

from mhc_core.dispatch import FUNCTIONS, call, call_vjp
from mhc_core.variants import First, Variant

Array = Any


def sinkhorn(
    logits: Array,
    iterations: int = 20,
    eps: float = 0.0,
    first: First = "columns",
    *,
    backend: str | None = None,
) -> Array:
    """Normalise the rows and columns of exp(logits) in turn, towards a doubly stochastic matrix.

    With a the axis summed first (``"columns"``: every column sums to 1) and b the other::

        P = softmax along a + eps;  P /= sum_b + eps
        then iterations - 1 times:  P /= sum_a + eps;  P /= sum_b + eps

    ``eps=0`` is evaluated in the log domain, so no line underflows to 0 / 0. The lines of b sum to
    1 exactly; those of a only as far as the iterations bring them.

    Parameters
    ----------
    logits
        ``[..., n, n]``, any float dtype. -inf is allowed where every line keeps a finite entry.
    iterations
        Pairs of normalisations, from 1 to 1000.
    eps
        Added to the softmax and to every divisor, at least 0.
    first
        ``"columns"`` or ``"rows"``.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, n]``, float32 (float64 for float64 logits).

    Notes
    -----
    ``eps=0, first="columns"`` is eq. (9) of arXiv:2512.24880. DeepSeek-V4's ``comb`` is the
    transpose of ``sinkhorn(logits_transposed, eps=1e-6)``. Errors: see :mod:`mhc_core._api`.

    Examples
    --------
    >>> import numpy, mhc_core as mhc
    >>> mhc.sinkhorn(numpy.zeros((2, 2))).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    static = {"iterations": iterations, "eps": eps, "first": first}
    return call("sinkhorn", (logits,), static, backend)


def mappings(
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    variant: Variant,
    *,
    backend: str | None = None,
) -> tuple[Array, Array, Array]:
    """Compute H_pre, H_post and H_res of every token from its streams.

    ::

        r = 1 / sqrt(mean(vec(x)^2) + norm_eps)
        z = (vec(x) @ phi.T) * r * scale[group] + bias
        H_pre = sigmoid(z_pre) + pre_eps;  H_post = post_scale sigmoid(z_post)
        H_res = the variant's mixer of z_res, such as sinkhorn(z_res)

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    phi
        ``[m, n * C]`` as checkpoints store it, rows ``[pre n | post n | res L]``; a norm weight is
        absorbed in it. L is the number of the mixer's logits, ``n * n`` with Sinkhorn.
    scale
        ``[3]``: for pre, post and res; ``[2]`` with a mixer without logits.
    bias
        ``[m]``, added after the division by the root mean square.
    variant
        The constants, such as :data:`mhc_core.PAPER` or :data:`mhc_core.DEEPSEEK_V4`.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h_pre, h_post, h_res
        ``[..., n]``, ``[..., n]`` and ``[..., n, n]``, float32 (float64 for float64 streams). h_res
        is None with the mixer ``"identity"``.

    Notes
    -----
    Eqs. (7-8) and (14-19) of arXiv:2512.24880. Errors: see :mod:`mhc_core._api`.
    """
    return call("mappings", (x, phi, scale, bias), {"variant": variant}, backend)


def aggregate(x: Array, h_pre: Array, *, backend: str | None = None) -> Array:
    """Sum the streams with weights, ``h = sum_i h_pre_i x_i``: the layer's input.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    h_pre
        ``[..., n]``, or ``[n]`` shared by all tokens; any float dtype.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., C]`` in x's dtype.

    Notes
    -----
    Eq. (3) of arXiv:2512.24880, its inner part. Errors: see :mod:`mhc_core._api`.
    """
    return call("aggregate", (x, h_pre), {}, backend)


def combine(
    x: Array, y: Array, h_post: Array, h_res: Array | None, *, backend: str | None = None
) -> Array:
    """Mix the streams and write the layer's output, ``x'_i = sum_j H_res[i, j] x_j + h_post_i y``.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams before the layer.
    y
        ``[..., C]``, what the layer returned.
    h_post
        ``[..., n]``, or ``[n]`` shared by all tokens.
    h_res
        ``[..., n, n]``, or ``[n, n]`` shared by all tokens. None leaves the streams unmixed,
        ``x'_i = x_i + h_post_i y``; no matrix is made.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, C]`` in x's dtype.

    Notes
    -----
    Eq. (3) of arXiv:2512.24880. DeepSeek-V4's ``comb`` is ``h_res`` transposed.
    Errors: see :mod:`mhc_core._api`.

    Examples
    --------
    >>> import numpy, mhc_core as mhc
    >>> x, y = numpy.ones((2, 3)), numpy.ones(3)
    >>> mhc.combine(x, y, numpy.array([1.0, 2.0]), numpy.eye(2)).tolist()
    [[2.0, 2.0, 2.0], [3.0, 3.0, 3.0]]
    """
    arrays = (x, y, h_post) if h_res is None else (x, y, h_post, h_res)
    return call("combine", arrays, {}, backend)


def pre(
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    variant: Variant,
    *,
    h_norm_weight: Array | None = None,
    h_norm_eps: float | None = None,
    h_raw: bool = False,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Compute all that a layer needs first, :func:`mappings` and :func:`aggregate`, in one pass.

    ``H_pre, H_post, H_res = mappings(x, ...);  h = sum_i H_pre_i x_i``, and with h_norm_weight
    ``h = rms_norm(h, h_norm_weight, h_norm_eps)``.

    Parameters
    ----------
    x, phi, scale, bias, variant
        As for :func:`mappings`.
    h_norm_weight
        ``[C]``: the weight of the RMS norm at the layer's begin. With it h is normalised in the
        same pass.
    h_norm_eps
        The norm's eps, by default 1e-5.
    h_raw
        Whether to return h before the norm too.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h, h_post, h_res
        ``h [..., C]`` in x's dtype, the layer's input; the other two for :func:`combine`. With
        h_raw, h before the norm is a fourth array.

    Notes
    -----
    Eqs. (3), (7-9) and (14-19) of arXiv:2512.24880. The norm reads h as rounded to x's dtype. With
    a norm, the op is :func:`pre_norm`, also for :func:`vjp`. Errors: see :mod:`mhc_core._api`.
    """
    if h_norm_weight is None:
        _refuse_norm("pre", h_norm_eps, h_raw)
        return call("pre", (x, phi, scale, bias), {"variant": variant}, backend)
    eps = 1e-5 if h_norm_eps is None else h_norm_eps
    made = pre_norm(x, phi, scale, bias, h_norm_weight, variant, eps, h_raw, backend=backend)
    return made if h_raw else made[:-1]


def pre_residual(
    x: Array, phi: Array, scale: Array, bias: Array, variant: Variant, *, backend: str | None = None
) -> tuple[Array, Array, Array, Array]:
    """Run :func:`pre`, and pass x through for :func:`combine`, so that training is faster.

    ``h, H_post, H_res, x = pre_residual(x, ...)``: pass the x that is returned to combine. Its
    gradient is then an input of this op's vjp, which adds it to its own in the same pass: else the
    library adds the two gradients of x, which reads two arrays of streams and writes a third.

    Parameters
    ----------
    x, phi, scale, bias, variant
        As for :func:`mappings`.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h, h_post, h_res, x
        As :func:`pre` returns them, and x, ``[..., n, C]``.

    Notes
    -----
    Without gradients there is nothing to gain. If the x that is returned is not used, the library
    makes zeros for its gradient. Errors: see :mod:`mhc_core._api`.
    """
    return call("pre_residual", (x, phi, scale, bias), {"variant": variant}, backend)


def _refuse_norm(op: str, h_norm_eps: float | None, h_raw: bool) -> None:
    """Raise for arguments of a norm that has no weight."""
    for name, value in (("h_norm_eps", h_norm_eps), ("h_raw", h_raw or None)):
        if value is not None:
            raise ValueError(
                f"{op}: {name} is {value!r} without h_norm_weight; needs the norm's weight, or "
                f"no {name}: without a norm h is returned as it is"
            )


def pre_norm(
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    h_norm_weight: Array,
    variant: Variant,
    h_norm_eps: float = 1e-5,
    h_raw: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Run :func:`pre` and the :func:`rms_norm` of its h in one pass: pre with h_norm_weight.

    ``h, H_post, H_res = pre(x, ...);  h = rms_norm(h, h_norm_weight, h_norm_eps)``.

    Parameters
    ----------
    x, phi, scale, bias, variant
        As for :func:`mappings`.
    h_norm_weight
        ``[C]``.
    h_norm_eps
        At least 0.
    h_raw
        Whether to return h before the norm too.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h, h_post, h_res, h_raw
        The normalised h, ``[..., C]``, the mappings, and h before the norm, or None unless it is
        asked for.

    Notes
    -----
    The norm reads h as rounded to x's dtype, so that the result equals ``rms_norm(pre(...))``. As
    primals of :func:`vjp`, h_norm_weight comes last. Errors: see :mod:`mhc_core._api`.
    """
    static = {"variant": variant, "h_norm_eps": h_norm_eps, "h_raw": h_raw}
    return call("pre_norm", (x, phi, scale, bias, h_norm_weight), static, backend)


def combine_pre(
    x: Array,
    y: Array,
    h_post: Array,
    h_res: Array | None,
    phi: Array,
    scale: Array,
    bias: Array,
    variant: Variant,
    h_pre: Array | None = None,
    *,
    h_norm_weight: Array | None = None,
    h_norm_eps: float | None = None,
    h_raw: bool = False,
    backend: str | None = None,
) -> tuple[Array, ...]:
    """Run :func:`combine` of one sublayer and :func:`pre` of the next in one pass.

    ``x' = H_res x + H_post (outer) y;  H_pre', H_post', H_res' = mappings(x', ...)``;
    ``h' = sum_i H_pre'_i x'_i``, or with the given h_pre; with h_norm_weight h' is normalised.

    The streams are read once and written once: (2 n + 2) C numbers per token, not (3 n + 2) C.
    The mappings read x' as rounded to the streams' dtype, so it equals ``pre(combine(...))``.

    Parameters
    ----------
    x, y, h_post, h_res
        As for :func:`combine`.
    phi, scale, bias, variant
        As for :func:`mappings`, of the next sublayer.
    h_pre
        ``[..., n]`` or ``[n]``: weights to use for h' instead of h_pre' (single-pass mHC as in
        DeepSeek-V4.1, where the mix comes from the sublayer before).
    h_norm_weight, h_norm_eps, h_raw
        As for :func:`pre`.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    x, h, h_pre, h_post, h_res
        The new streams, the next layer's input and the next mappings. With h_raw, h' before the
        norm is a sixth array.

    Notes
    -----
    Eqs. (3), (7-9) and (14-19) of arXiv:2512.24880. As primals of :func:`vjp`, h_pre comes last.
    With a norm, the op is :func:`combine_pre_norm`. Errors: see :mod:`mhc_core._api`.
    """
    arrays = (x, y, h_post, h_res, phi, scale, bias)
    if h_norm_weight is None:
        _refuse_norm("combine_pre", h_norm_eps, h_raw)
        arrays = arrays if h_pre is None else (*arrays, h_pre)
        return call("combine_pre", arrays, {"variant": variant}, backend)
    eps = 1e-5 if h_norm_eps is None else h_norm_eps
    made = combine_pre_norm(*arrays, h_norm_weight, variant, h_pre, eps, h_raw, backend=backend)
    return made if h_raw else made[:-1]


def combine_pre_norm(
    x: Array,
    y: Array,
    h_post: Array,
    h_res: Array | None,
    phi: Array,
    scale: Array,
    bias: Array,
    h_norm_weight: Array,
    variant: Variant,
    h_pre: Array | None = None,
    h_norm_eps: float = 1e-5,
    h_raw: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Run :func:`combine_pre` and the :func:`rms_norm` of its h' in one pass.

    ``x', h', ... = combine_pre(x, ...);  h' = rms_norm(h', h_norm_weight, h_norm_eps)``.

    Parameters
    ----------
    x, y, h_post, h_res
        As for :func:`combine`.
    phi, scale, bias, variant
        As for :func:`mappings`, of the next sublayer.
    h_norm_weight
        ``[C]``, of the norm at the next layer's begin.
    h_pre
        As for :func:`combine_pre`.
    h_norm_eps
        At least 0.
    h_raw
        Whether to return h' before the norm too.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    x, h, h_pre, h_post, h_res, h_raw
        The new streams, the normalised h', the next mappings, and h' before the norm, or None
        unless it is asked for.

    Notes
    -----
    The norm reads h' as rounded to x's dtype. As primals of :func:`vjp`, h_norm_weight and then
    h_pre come last. Errors: see :mod:`mhc_core._api`.
    """
    arrays = (x, y, h_post, h_res, phi, scale, bias, h_norm_weight)
    static = {"variant": variant, "h_norm_eps": h_norm_eps, "h_raw": h_raw}
    return call("combine_pre_norm", arrays if h_pre is None else (*arrays, h_pre), static, backend)


def head(
    x: Array,
    phi: Array,
    scale: Array,
    bias: Array,
    variant: Variant,
    *,
    backend: str | None = None,
) -> Array:
    """Collapse the streams before the output, by sigmoid weights of the streams themselves.

    ``h = sum_i w_i x_i`` with ``w = sigmoid((vec(x) @ phi.T) r scale + bias) + pre_eps``.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    phi, scale, bias
        ``[n, n * C]``, ``[1]`` and ``[n]``.
    variant
        Only its norm_eps and pre_eps are used.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., C]`` in x's dtype.

    Notes
    -----
    DeepSeek-V4's ``hc_head``. Errors: see :mod:`mhc_core._api`.
    """
    return call("head", (x, phi, scale, bias), {"variant": variant}, backend)


def expand(h: Array, n: int, *, backend: str | None = None) -> Array:
    """Repeat a hidden state into n streams, ``x_i = h``.

    Parameters
    ----------
    h
        ``[..., C]``.
    n
        How many streams, at least 1.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, C]`` in h's dtype.

    Notes
    -----
    Section 3 of arXiv:2512.24880. Errors: see :mod:`mhc_core._api`.
    """
    return call("expand", (h,), {"n": n}, backend)


def contract(x: Array, how: Literal["sum", "mean"] = "sum", *, backend: str | None = None) -> Array:
    """Collapse the streams, ``h = sum_i x_i`` or their mean.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    how
        ``"sum"`` or ``"mean"``.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., C]`` in x's dtype.

    Notes
    -----
    Errors: see :mod:`mhc_core._api`.
    """
    return call("contract", (x,), {"how": how}, backend)


def rms_norm(x: Array, weight: Array, eps: float = 1e-5, *, backend: str | None = None) -> Array:
    """Normalise the last axis by its root mean square.

    ``y = x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x
        ``[..., C]``.
    weight
        ``[C]``.
    eps
        At least 0.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., C]`` in x's dtype.

    Notes
    -----
    arXiv:1910.07467. Errors: see :mod:`mhc_core._api`.
    """
    return call("rms_norm", (x, weight), {"eps": eps}, backend)


def residual_add_aggregate(
    x: Array, res: Array, h_pre: Array, *, backend: str | None = None
) -> tuple[Array, Array]:
    """Add a residual and take the next layer's input.

    ``x' = x + res;  h = sum_i h_pre_i x'_i``.

    Parameters
    ----------
    x, res
        ``[..., n, C]`` both.
    h_pre
        ``[..., n]``, or ``[n]`` shared by all tokens; already activated.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    x, h
        ``[..., n, C]`` and ``[..., C]``, in x's dtype.

    Notes
    -----
    ``residual_add_agg`` of mhc-mlx. h is computed from the sum before it is rounded.
    Errors: see :mod:`mhc_core._api`.
    """
    return call("residual_add_aggregate", (x, res, h_pre), {}, backend)


def static_layer(
    x: Array,
    h_pre_raw: Array,
    h_post_raw: Array,
    h_res_raw: Array,
    rms_weight: Array,
    eps: float = 1e-5,
    iterations: int = 20,
    *,
    backend: str | None = None,
) -> Array:
    """Apply a whole layer with static mappings, F being an RMS norm.

    ``x' = H_res x + H_post (outer) rms_norm(sum_i H_pre_i x_i, rms_weight)``, with the mappings of
    :func:`static_mappings`. Nothing is rounded in between.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    h_pre_raw, h_post_raw, h_res_raw
        ``[n]``, ``[n]`` and ``[n, n]``, before their activations.
    rms_weight
        ``[C]``.
    eps
        Of the norm, at least 0.
    iterations
        Of Sinkhorn, from 1 to 1000.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, C]`` in x's dtype.

    Notes
    -----
    ``MHCLayer`` of mhc-mlx. Errors: see :mod:`mhc_core._api`.
    """
    arrays = (x, h_pre_raw, h_post_raw, h_res_raw, rms_weight)
    return call("static_layer", arrays, {"eps": eps, "iterations": iterations}, backend)


def gated_pre(
    x: Array,
    norm: Array,
    down: Array,
    up: Array,
    inject: Array,
    eps: float = 1e-6,
    *,
    backend: str | None = None,
) -> tuple[Array, Array]:
    """Compute a layer's input from streams that are normalised one by one and gated by channel.

    ::

        u_i = x_i / sqrt(mean(x_i^2) + eps) (1 + norm_i)
        z = silu(vec(u) @ down.T / n) @ up.T
        h = mean_i sigmoid(z_i) u_i;  h_post = 2 sigmoid(vec(u) @ inject.T / n)

    The layer's output y is written by :func:`combine` without H_res: ``x'_i = x_i + h_post_i y``.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.
    norm
        ``[n * C]``, the weight of the norm without its 1, as checkpoints store it.
    down, up
        ``[R, n * C]`` and ``[n * C, R]``, the two factors of the gates' projection.
    inject
        ``[n, n * C]``.
    eps
        Added to the mean square of each stream, at least 0.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h, h_post
        ``[..., C]`` in x's dtype, the layer's input; ``[..., n]``, float32 (float64 for float64
        streams), for :func:`combine`.

    Notes
    -----
    The gated residual of Qwen4-Exp. Errors: see :mod:`mhc_core._api`.
    """
    return call("gated_pre", (x, norm, down, up, inject), {"eps": eps}, backend)


def gated_head(
    x: Array, norm: Array, down: Array, up: Array, eps: float = 1e-6, *, backend: str | None = None
) -> Array:
    """Collapse the streams before the output, ``h = mean_i sigmoid(z_i) u_i`` as in gated_pre.

    Parameters
    ----------
    x, norm, down, up, eps
        As for :func:`gated_pre`.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., C]`` in x's dtype.

    Notes
    -----
    The last mixer of Qwen4-Exp. Errors: see :mod:`mhc_core._api`.
    """
    return call("gated_head", (x, norm, down, up), {"eps": eps}, backend)


def gated_combine(
    x: Array, y: Array, h_pre: Array, h_post: Array, h_res: Array, *, backend: str | None = None
) -> Array:
    """Connect a layer on the n slices of one hidden state.

    ``x' = H_post * (y + H_res (H_pre * x))``, where ``*`` scales each slice.

    Parameters
    ----------
    x, y
        ``[..., D]`` both: the layer's input and output; D is a multiple of n.
    h_pre, h_post, h_res
        ``[n]``, ``[n]`` and ``[n, n]``, already mapped (sigmoids and Sinkhorn applied), shared by
        all tokens; or one of each per token.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., D]`` in x's dtype.

    Notes
    -----
    ``ManifoldHyperConnection`` of mlx-mhc, ``MHCRewire`` of mhc-mlx.
    Errors: see :mod:`mhc_core._api`.
    """
    return call("gated_combine", (x, y, h_pre, h_post, h_res), {}, backend)


def pre_scale(x: Array, h_pre: Array, *, backend: str | None = None) -> Array:
    """Scale each of the n slices of the last axis, ``x'_i = h_pre_i x_i``.

    Parameters
    ----------
    x
        ``[..., D]``; D is a multiple of n.
    h_pre
        ``[n]``, or ``[..., n]`` per token; already activated.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., D]`` in x's dtype.

    Notes
    -----
    ``ManifoldHyperConnection.pre_scale`` of mlx-mhc. Errors: see :mod:`mhc_core._api`.
    """
    return call("pre_scale", (x, h_pre), {}, backend)


def static_mappings(
    h_pre_raw: Array,
    h_post_raw: Array,
    h_res_raw: Array,
    iterations: int = 20,
    *,
    backend: str | None = None,
) -> tuple[Array, Array, Array]:
    """Activate static parameters.

    ``H_pre = sigmoid(h_pre_raw);  H_post = 2 sigmoid(h_post_raw)``;
    ``H_res = sinkhorn(h_res_raw, iterations, first="rows")``.

    Parameters
    ----------
    h_pre_raw, h_post_raw, h_res_raw
        ``[..., n]``, ``[..., n]`` and ``[..., n, n]``.
    iterations
        Of Sinkhorn, from 1 to 1000.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    h_pre, h_post, h_res
        In float32 (float64 for float64 parameters).

    Notes
    -----
    The mappings of mhc-mlx and mlx-mhc. Errors: see :mod:`mhc_core._api`.
    """
    arrays = (h_pre_raw, h_post_raw, h_res_raw)
    return call("static_mappings", arrays, {"iterations": iterations}, backend)


def sinkhorn_knopp(
    matrix: Array,
    max_iterations: int = 100,
    epsilon: float = 1e-6,
    log_space: bool = True,
    *,
    backend: str | None = None,
) -> Array:
    """Normalise rows, then columns, of exp(matrix) until both sum to 1 within ``epsilon``.

    From ``P = exp(matrix)``, each step is ``P /= sums of rows;  P /= sums of columns``. Each matrix
    of a batch stops by itself: it is frozen after the first full step that leaves its largest row
    and column errors both under ``epsilon``. Works under jit and mx.compile; where the values can
    be read, the loop ends early, with the same bits.

    Parameters
    ----------
    matrix
        ``[..., n, n]``, any float dtype.
    max_iterations
        The most steps, from 1 to 1000.
    epsilon
        At least 0.
    log_space
        False starts from ``max(exp(matrix), 1e-10)``, unshifted, and divides.
    backend
        A backend's name, instead of the one chosen elsewhere.

    Returns
    -------
    array
        ``[..., n, n]``, float32 (float64 for a float64 matrix).

    Notes
    -----
    ``sinkhorn_knopp`` of mlx-mhc, batched. Errors: see :mod:`mhc_core._api`.
    """
    static = {"max_iterations": max_iterations, "epsilon": epsilon, "log_space": log_space}
    return call("sinkhorn_knopp", (matrix,), static, backend)


def vjp(
    op: str | Callable[..., Any],
    primals: Sequence[Array],
    cotangents: Array | Sequence[Array],
    *,
    backend: str | None = None,
    **static: Any,
) -> tuple[Array, ...]:
    """Pull cotangents back through an op, in any library, with or without autodiff.

    Parameters
    ----------
    op
        The op's name, or the function itself: ``"combine"`` or ``mhc.combine``.
    primals
        Its array arguments, in the order of its signature; combine_pre's h_pre comes last.
    cotangents
        One array per output, of its shape; for a single output, the array itself is accepted.
    backend
        A backend's name, instead of the one chosen elsewhere.
    **static
        The op's other arguments, by keyword; those left out have the op's defaults.

    Returns
    -------
    tuple of arrays
        d sum(cotangent * output) / d primal for each primal, in its shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As the op itself, and for cotangents that do not fit its outputs.

    Examples
    --------
    >>> import numpy, mhc_core as mhc
    >>> x, h_pre = numpy.ones((2, 3)), numpy.array([0.5, 2.0])
    >>> dx, dh_pre = mhc.vjp("aggregate", (x, h_pre), numpy.ones(3))
    >>> dh_pre.tolist()
    [3.0, 3.0]
    """
    return call_vjp(op, primals, cotangents, static, backend)


FUNCTIONS.update(globals())  # a vjp's defaults are those of its op's function

if TYPE_CHECKING:  # editors read a list, and without one take the imports above for public too
    __all__ = [
        "aggregate",
        "combine",
        "combine_pre",
        "combine_pre_norm",
        "contract",
        "expand",
        "gated_combine",
        "gated_head",
        "gated_pre",
        "head",
        "mappings",
        "pre",
        "pre_norm",
        "pre_residual",
        "pre_scale",
        "residual_add_aggregate",
        "rms_norm",
        "sinkhorn",
        "sinkhorn_knopp",
        "static_layer",
        "static_mappings",
        "vjp",
    ]
else:
    __all__ = sorted(
        name
        for name, value in globals().items()
        if isfunction(value) and value.__module__ == __name__ and not name.startswith("_")
    )
