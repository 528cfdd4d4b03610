"""The common parts of the modules of all libraries: the start, the options, a stack's sublayers.

Imports no array library. The modules' parameters, and how a library recomputes, are their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import mhc_core
from mhc_core import checks
from mhc_core.variants import Variant, check_variant

mhc: Any = mhc_core  # the arrays here are those of any library

__all__ = [
    "ALPHA",
    "GATE_DEVIATION",
    "GATE_RANK",
    "Call",
    "Recompute",
    "calls",
    "check_stack",
    "checked_connection",
    "checked_gates",
    "checked_recompute",
    "checked_sizes",
    "collapse",
    "deviation",
    "head_bias",
    "is_repeatable",
    "names_of",
    "received",
    "residual_bias",
    "run_sublayers",
    "segment",
    "sent",
]

Recompute = Literal["auto", False] | int
Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one layer after h

GATE_RANK = 320  # the rank of Qwen4-Exp's gates

# The start:
ALPHA = 0.01  # the scales: how much of a mapping depends on the token
DEVIATION = 0.1  # the standard deviation of the projection that alpha scales
GATE_DEVIATION = 0.02  # that of a gated residual's matrices, as transformers draws Qwen4-Exp's
LEAN = 0.5  # how much H_pre and H_post differ between the streams, relative to their mean


def names_of(variant: Variant) -> tuple[str, str, str]:
    """Return the names of phi, scale and bias, which tell the layout.

    They are ``fn``, ``scale``, ``base`` if the variant stores H_res transposed, as in DeepSeek-V4's
    checkpoints; otherwise the paper's ``phi``, ``alpha``, ``bias``. So weights of one layout never
    load as the other.
    """
    return ("fn", "scale", "base") if variant.res_transposed else ("phi", "alpha", "bias")


def checked_sizes(owner: str, dims: Any, n: Any, variant: Any) -> tuple[int, int, Variant]:
    """Return the arguments of a connection or a head in their plain form, or raise."""
    return (
        checks.positive_int(owner, "dims", dims),
        checks.positive_int(owner, "n", n),
        check_variant(owner, "variant", variant),
    )


def checked_connection(owner: str, dims: Any, n: Any, variant: Any) -> tuple[int, int, Variant]:
    """Return the arguments of a connection, whose mixer must take n streams."""
    dims, n, variant = checked_sizes(owner, dims, n, variant)
    if reason := variant.refuses(n):
        raise ValueError(f"{owner}: {reason}")
    return dims, n, variant


def checked_gates(
    owner: str, dims: Any, n: Any, rank: Any, eps: Any
) -> tuple[int, int, int, float]:
    """Return the arguments of a gated residual in their plain form, or raise."""
    return (
        checks.positive_int(owner, "dims", dims),
        checks.positive_int(owner, "n", n),
        checks.positive_int(owner, "rank", rank),
        checks.non_negative(owner, "eps", eps),
    )


# ---- the start ----------------------------------------------------------------------------------


def deviation(dims: int, n: int) -> float:
    """Return the standard deviation of phi at the start."""
    return DEVIATION / math.sqrt(n * dims)


def residual_bias(n: int, variant: Variant) -> list[float]:
    """Return the bias that starts as a plain residual; see the notes of HyperConnection."""
    post = [_logit(h / variant.post_scale) if variant.post_scale else 0.0 for h in _leaning(n, 2)]
    res = variant.made_by.init(n, **variant.options)
    return [*head_bias(n, variant), *post, *res]


def head_bias(n: int, variant: Variant) -> list[float]:
    """Return the bias of H_pre, which a head's weights start with too."""
    return [_logit(h / n - variant.pre_eps) for h in _leaning(n, 1)]


def _leaning(n: int, half_waves: int) -> list[float]:
    """Return n numbers of mean 1 along a cosine; those of 1 and 2 half waves are orthogonal."""
    lean = LEAN if half_waves < n else 0.0
    return [1 + lean * math.cos(math.pi * half_waves * (i + 0.5) / n) for i in range(n)]


def _logit(p: float) -> float:
    p = min(max(p, 1e-3), 1 - 1e-3)
    return math.log(p / (1 - p))


# ---- stacks: options ----------------------------------------------------------------------------


def checked_recompute(owner: str, value: Any) -> Recompute:
    """Return ``value``, which must be "auto", False or a size of at least 1."""
    if value == "auto" or value is False:
        return value
    if isinstance(value, (bool, str)):
        raise ValueError(
            f"{owner}: recompute is {value!r}; needs 'auto', False or an integer of at least 1"
        )
    return checks.positive_int(owner, "recompute", value)


def segment(recompute: Recompute, n: int, count: int) -> int:
    """Return the number of sublayers in a segment, of ``count`` in all."""
    if isinstance(recompute, str):
        return max(1, round(math.sqrt(n * count / (n + 2))))
    return min(recompute or count, count)


def check_stack(
    owner: str,
    blocks: Sequence[Any],
    n: int,
    head: Any,
    single_pass: bool,
    kinds: tuple[type[Any], type[Any]],
    last: bool = True,
) -> None:
    """Raise unless all blocks, and a head, are of these kinds and have the same sizes."""
    kind_of_block, kind_of_head = kinds
    if not blocks:
        raise ValueError(f"{owner}: blocks is empty; needs at least one {kind_of_block.__name__}")
    for k, block in enumerate(blocks):
        if not isinstance(block, kind_of_block):
            raise TypeError(
                f"{owner}: blocks[{k}] is a {type(block).__name__}; needs a "
                f"{kind_of_block.__name__}"
            )
        connection = block.connection
        _check_sizes(owner, f"blocks[{k}]", connection, n, blocks[0].connection.dims)
    if head is None:
        return
    if not isinstance(head, kind_of_head):
        raise TypeError(
            f"{owner}: head is a {type(head).__name__}; needs a {kind_of_head.__name__}"
        )
    if single_pass:
        raise ValueError(f"{owner}: head is given; the single-pass order has no head")
    if not last:
        raise ValueError(f"{owner}: head is given; only the last stage has one")
    _check_sizes(owner, "head", head, blocks[0].connection.n, blocks[0].connection.dims)


def _check_sizes(owner: str, name: str, module: Any, n: int, dims: int) -> None:
    if (module.n, module.dims) != (n, dims):
        raise ValueError(
            f"{owner}: {name} has n={module.n} and dims={module.dims}; needs n={n} and dims={dims}"
        )


def calls(
    owner: str, count: int, args: tuple[Any, ...], each: Any, kwargs: Mapping[str, Any]
) -> list[Call]:
    """Return the arguments of every layer, after its input."""
    each = cast("Sequence[Mapping[str, Any]]", [{}] * count if each is None else each)
    if len(each) != count:
        raise ValueError(
            f"{owner}: each has {len(each)} entries; needs one for each of the {count} blocks"
        )
    return [(args, {**kwargs, **own}) for own in each]


def is_repeatable(value: Any, plain: tuple[type[Any], ...]) -> bool:
    """Return whether a layer can be called twice with an argument: an array, or plain data.

    ``plain`` are the library's arrays and dtypes. A cache is not repeatable, because the layer
    would append to it twice.
    """
    if isinstance(value, (list, tuple)):
        return all(is_repeatable(item, plain) for item in cast("Sequence[Any]", value))
    if type(value) is dict:
        return all(is_repeatable(v, plain) for v in cast("dict[Any, Any]", value).values())
    return value is None or isinstance(value, (bool, int, float, str, *plain))


# ---- stacks: sublayers --------------------------------------------------------------------------


def run_sublayers(
    blocks: Sequence[Any],
    start: int,
    arguments: Sequence[Call],
    state: Any,
    single_pass: bool,
    first: bool = True,
) -> tuple[Any, ...]:
    """Run ``len(arguments)`` sublayers, from number ``start`` on.

    ``blocks`` are the blocks of these sublayers and of the next one. The state before the first
    sublayer is the hidden state, or in a later stage of a pipeline, where ``first`` is False, what
    :func:`sent` returned; then the streams, a layer's normalised input and its mappings; after the
    last one, the streams and its H_pre. H_pre is for the single-pass order alone.
    """
    if start == 0:
        enter: Callable[..., tuple[Any, ...]] = _first_state if first else _state_of_stage
        state = enter(blocks[0], *state, single_pass)
    for k, (args, kwargs) in enumerate(arguments):
        x, h, h_pre, h_post, h_res = state
        y = blocks[k].layer(h, *args, **kwargs)
        if k + 1 == len(blocks):
            return mhc.combine(x, y, h_post, h_res), h_pre
        following = blocks[k + 1]
        state = following.connection.combine_pre(
            x, y, h_post, h_res, h_pre if single_pass else None, following.norm
        )
    return state


def _first_state(first: Any, h: Any, single_pass: bool) -> tuple[Any, ...]:
    """Return the streams, the first layer's normalised input and its mappings."""
    x = mhc.expand(h, first.connection.n)
    if single_pass:
        h_pre, h_post, h_res = first.connection.mappings(x)
        return x, first.norm(h), h_pre, h_post, h_res
    h, h_post, h_res = first.connection.pre(x, first.norm)
    return x, h, None, h_post, h_res


def _state_of_stage(first: Any, x: Any, *rest: Any) -> tuple[Any, ...]:
    """Return the streams, the first layer's normalised input and its mappings, after a stage."""
    *mix, _ = rest
    if not mix:
        h, h_post, h_res = first.connection.pre(x, first.norm)
        return x, h, None, h_post, h_res
    h_pre, h_post, h_res = first.connection.mappings(x)
    return x, first.norm(mhc.aggregate(x, *mix)), h_pre, h_post, h_res


def received(first: bool, single_pass: bool) -> int:
    """Return how many arrays a stage of a pipeline begins with."""
    return 1 + (single_pass and not first)


def sent(state: Any, single_pass: bool) -> Any:
    """Return what crosses to the next stage: the streams, and in the single-pass order H_pre."""
    x, h_pre = state
    return (x, h_pre) if single_pass else x


def collapse(state: Any, single_pass: bool, head: Callable[[Any], Any] | None) -> Any:
    """Return the output from the last state: by H_pre, the head or the mean."""
    x, h_pre = state
    if single_pass:
        return mhc.aggregate(x, h_pre)
    return mhc.contract(x, "mean") if head is None else head(x)
