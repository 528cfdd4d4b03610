"""Numbers that show how a network's streams and mappings are doing, for any training loop.

They are the ones in arXiv:2512.24880: how much the residual path amplifies across the depth
(:func:`gain` of :func:`composite`), how far H_res is from doubly stochastic (:func:`sum_errors`),
and whether the streams still differ (:func:`stream_similarity`, :func:`entropy`).

The functions accept arrays of NumPy, JAX, MLX or PyTorch and return the same type, under the
libraries' own compilers too; importing this module imports no array library. They compute in
float32, or in float64 for float64 arrays, by differentiable operations, so that they can also be a
penalty in a loss; where a largest entry is taken, its gradient is a subgradient.

Errors: every function raises TypeError for an argument that is not an array or has no floating
dtype, and ValueError for a wrong shape. Both name the argument, what was received and what is
needed.

Examples
--------
>>> import numpy
>>> from mhc_core import diagnostics
>>> h_res = numpy.array([[[2.0, 0.0], [0.0, 1.0]]] * 3)  # three layers that double stream 0
>>> forward, backward = diagnostics.composite_gain(h_res)
>>> forward.tolist()
[2.0, 4.0, 8.0]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast

from mhc_core import checks
from mhc_core.dispatch import NUMBERS, checked_number, prepare
from mhc_core.signature import Op, Out, signature

__all__ = [
    "composite",
    "composite_gain",
    "entropy",
    "gain",
    "stream_similarity",
    "sum_errors",
    "summary",
]

Array = Any
Direction = Literal["forward", "backward"]

_direction = checks.one_of("forward", "backward")

Function = TypeVar("Function", bound=Callable[..., Any])

TINY = 1e-18  # streams of zeros stay 0, with finite gradients: its square is not 0 in float32


def _one_step(function: Function) -> Function:
    """Return a function that a tracing compiler keeps as one step: it cannot follow the checks."""
    name = function.__name__.strip("_")
    NUMBERS[name] = function

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        first: Any = next(iter((*given, *named.values())), None)
        while isinstance(first, (tuple, list)) and first:  # a list of layers
            first = cast("Any", first[0])
        prepare(type(first))  # pyright: ignore[reportUnknownArgumentType]
        return checked_number(name, *given, **named)

    return cast("Function", call)


@_one_step
def gain(h_res: Array) -> tuple[Array, Array]:
    """Return how much a mapping can amplify: its largest absolute row sum and column sum.

    ``forward = max_i |sum_j H[i, j]|``, for the signal; ``backward = max_j |sum_i H[i, j]|``, for
    the gradient. Both are 1 for a doubly stochastic matrix and for a product of doubly stochastic
    matrices.

    Parameters
    ----------
    h_res
        ``[..., n, n]``: H_res of a layer, or a product of them, as :func:`composite` returns.

    Returns
    -------
    forward, backward
        ``[...]`` both, float32 (float64 for float64).

    Notes
    -----
    The "Amax gain magnitude" of arXiv:2512.24880, section 3.1. The paper takes its mean over the
    tokens of a sequence.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> forward, backward = diagnostics.gain(numpy.array([[1.0, -3.0], [0.0, 1.0]]))
    >>> float(forward), float(backward)
    (2.0, 2.0)
    """
    xp, h = _checked("gain", h_res)
    forward, backward = (xp.max(xp.abs(xp.sum(h, axis=axis)), axis=-1) for axis in (-1, -2))
    return forward, backward


@_one_step
def composite(h_res: Array | Sequence[Array], direction: Direction = "forward") -> Array:
    """Multiply the H_res of the layers: the effect of the residual path alone on the streams.

    Entry l is ``H_l ... H_2 H_1`` forward, which takes the first streams to those after layer l,
    or ``H_L ... H_l`` backward, whose transpose takes the gradient at the end back to layer l.

    Parameters
    ----------
    h_res
        ``[L, ..., n, n]``, or L arrays ``[..., n, n]`` in the order of the layers.
    direction
        ``"forward"`` or ``"backward"``.

    Returns
    -------
    array
        ``[L, ..., n, n]``, float32 (float64 for float64).

    Notes
    -----
    The product in eq. (4) of arXiv:2512.24880.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> turn, double = numpy.array([[0.0, 1.0], [1.0, 0.0]]), numpy.diag([2.0, 1.0])
    >>> diagnostics.composite([double, turn])[-1].tolist()
    [[0.0, 1.0], [2.0, 0.0]]
    """
    from mhc_core.math import _xp

    _direction("composite", "direction", direction)
    xp, layers = _layers("composite", h_res)
    backward = direction == "backward"
    product = layers[-1 if backward else 0]
    products = [product]
    for h in layers[-2::-1] if backward else layers[1:]:
        product = _xp.matmul(xp, product, h) if backward else _xp.matmul(xp, h, product)
        products.append(product)
    return xp.stack(products[::-1] if backward else products, axis=0)


@_one_step
def composite_gain(h_res: Array | Sequence[Array]) -> tuple[Array, Array]:
    """Return how much the residual path can amplify over the depth.

    ``forward[l]`` is the signal's :func:`gain` from the first layer to the end of layer l, and
    ``backward[l]`` the gradient's from the last layer back to the start of layer l.

    Parameters
    ----------
    h_res
        ``[L, ..., n, n]``, or L arrays ``[..., n, n]`` in the order of the layers.

    Returns
    -------
    forward, backward
        ``[L, ...]`` both, float32 (float64 for float64). For the whole depth take ``forward[-1]``
        and ``backward[0]``.

    Notes
    -----
    Figures 3(b) and 7(b) of arXiv:2512.24880, where it reaches 3000 for unconstrained
    hyper-connections and 1.6 for mHC.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> forward, backward = diagnostics.composite_gain([numpy.diag([1.5, 1.0])] * 2)
    >>> forward.tolist(), backward.tolist()
    ([1.5, 2.25], [2.25, 1.5])
    """
    forward, _ = gain(composite(h_res))
    _, backward = gain(composite(h_res, "backward"))
    return forward, backward


@_one_step
def sum_errors(h_res: Array) -> tuple[Array, Array]:
    """Return how far the rows and the columns are from summing to 1.

    ``row_error = max_i |sum_j H[i, j] - 1|`` and ``column_error = max_j |sum_i H[i, j] - 1|``.

    Parameters
    ----------
    h_res
        ``[..., n, n]``.

    Returns
    -------
    row_error, column_error
        ``[...]`` both, float32 (float64 for float64).

    Notes
    -----
    After Sinkhorn's last half step, one of them is at rounding level, and the other is what its
    iterations left.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> row_error, column_error = diagnostics.sum_errors(numpy.array([[1.0, 0.0], [1.0, 0.0]]))
    >>> float(row_error), float(column_error)
    (0.0, 1.0)
    """
    xp, h = _checked("sum_errors", h_res)
    rows, columns = (xp.max(xp.abs(xp.sum(h, axis=axis) - 1), axis=-1) for axis in (-1, -2))
    return rows, columns


@_one_step
def entropy(h_res: Array) -> Array:
    """Return how much the streams are mixed: the mean entropy of the rows, in nats.

    ``mean_i -sum_j p_ij log p_ij`` with ``p_ij = |H[i, j]| / sum_k |H[i, k]|``: 0 where every
    stream comes from one, log n where each is the mean of all.

    Parameters
    ----------
    h_res
        ``[..., n, n]``; negative entries, as unconstrained mappings have, count by their size.

    Returns
    -------
    array
        ``[...]``, float32 (float64 for float64).

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> h_res = numpy.stack([numpy.eye(4), numpy.full((4, 4), 0.25)])
    >>> numpy.exp(diagnostics.entropy(h_res)).round(6).tolist()
    [1.0, 4.0]
    """
    xp, h = _checked("entropy", h_res)
    sizes = xp.abs(h)
    shares = sizes / (xp.sum(sizes, axis=-1, keepdims=True) + TINY)
    logs = xp.log(xp.where(shares > 0, shares, xp.ones_like(shares)))  # 0 log 0 = 0
    return -xp.mean(xp.sum(shares * logs, axis=-1), axis=-1)


@_one_step
def stream_similarity(x: Array) -> Array:
    """Return how alike the streams of a token are: the mean cosine of all pairs.

    ``mean over i != j of x_i . x_j / (|x_i| |x_j|)``: 1 where all point the same way (collapsed
    streams are worth no more than one), 0 where they are orthogonal or zero.

    Parameters
    ----------
    x
        ``[..., n, C]`` streams.

    Returns
    -------
    array
        ``[...]``, float32 (float64 for float64); 1 for a single stream.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> x = numpy.array([[[1.0, 0.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 3.0]]])
    >>> diagnostics.stream_similarity(x).tolist()
    [1.0, 0.0]
    """
    xp, x = _checked("stream_similarity", x)
    n = x.shape[-2]
    if n == 1:
        return xp.ones_like(x[..., 0, 0])
    unit = x / xp.sqrt(xp.sum(xp.square(x), axis=-1, keepdims=True) + TINY)
    together = xp.sum(xp.square(xp.sum(unit, axis=-2)), axis=-1)
    alone = xp.sum(xp.square(unit), axis=(-2, -1))
    return (together - alone) / (n * (n - 1))


def summary(h_res: Array | Sequence[Array], x: Array | None = None) -> dict[str, Array]:
    """Return one number for each quantity to watch while a network trains, for a log.

    Parameters
    ----------
    h_res
        ``[L, ..., n, n]``, or L arrays ``[..., n, n]`` in the order of the layers.
    x
        ``[..., n, C]`` streams of any layers, if their similarity is wanted.

    Returns
    -------
    dict of arrays without axes
        ``gain_forward`` and ``gain_backward`` over the whole depth, ``layer_gain_forward`` and
        ``layer_gain_backward`` of the layer that amplifies most, all as means over the tokens;
        ``row_error`` and ``column_error``, the largest anywhere; ``entropy``, the mean; and
        ``stream_similarity``, the mean, if x is given.

    Examples
    --------
    >>> import numpy
    >>> from mhc_core import diagnostics
    >>> told = diagnostics.summary([numpy.diag([1.5, 1.0])] * 2)
    >>> {name: float(number) for name, number in told.items()}["gain_forward"]
    2.25
    """
    return dict(zip(_SUMMARY, _summary(h_res, x), strict=False))  # the last only with x


_SUMMARY = (
    "gain_forward",
    "gain_backward",
    "layer_gain_forward",
    "layer_gain_backward",
    "row_error",
    "column_error",
    "entropy",
    "stream_similarity",
)


@_one_step
def _summary(h_res: Array | Sequence[Array], x: Array | None) -> list[Array]:
    xp, layers = _layers("summary", h_res)
    stacked = xp.stack(layers, axis=0)
    forward, backward = composite_gain(stacked)
    one_forward, one_backward = (
        xp.max(xp.mean(xp.reshape(each, (len(layers), -1)), axis=1)) for each in gain(stacked)
    )
    row_error, column_error = sum_errors(stacked)
    told = [
        xp.mean(forward[-1]),
        xp.mean(backward[0]),
        one_forward,
        one_backward,
        xp.max(row_error),
        xp.max(column_error),
        xp.mean(entropy(stacked)),
    ]
    return told if x is None else [*told, xp.mean(stream_similarity(x))]


# ---- checks -------------------------------------------------------------------------------------


def _declared(name: str) -> Op:
    """Return the declaration of a function, so that its argument is checked as those of the ops."""
    arrays = {"x": "... n C"} if name == "stream_similarity" else {"h_res": "... n n"}
    return Op(name=name, arrays=arrays, outputs={"number": Out("...", "mapping")})


def _checked(name: str, array: Array) -> tuple[Any, Array]:
    """Return the namespace and the array in the dtype of computation."""
    signature(_declared, name, (array,), {})
    from mhc_core.math import _xp

    xp = _xp.namespace(array)
    return xp, _xp.upcast(xp, array)


def _layers(name: str, h_res: Array | Sequence[Array]) -> tuple[Any, list[Array]]:
    """Return the namespace and the layers' matrices, all of one shape."""
    need = "needs [L, ..., n, n] or a list of L arrays [..., n, n], L at least 1"
    if not isinstance(h_res, (list, tuple)):
        xp, array = _checked(name, h_res)
        if array.ndim < 3 or not array.shape[0]:
            raise ValueError(f"{name}: h_res has shape {tuple(array.shape)}; {need}")
        return xp, [array[layer] for layer in range(array.shape[0])]
    if not h_res:
        raise ValueError(f"{name}: h_res is empty; {need}")
    checked = [_checked(name, layer) for layer in cast("Sequence[Array]", h_res)]
    shapes = list(dict.fromkeys(tuple(layer.shape) for _, layer in checked))
    if len(shapes) > 1:
        raise ValueError(f"{name}: h_res has layers of shapes {shapes[0]} and {shapes[1]}; {need}")
    return checked[0][0], [layer for _, layer in checked]
