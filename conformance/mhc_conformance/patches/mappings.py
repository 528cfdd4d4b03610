"""Bugs of the mappings that the projection leads to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mhc_conformance.autodiff import Value, concatenate
from mhc_conformance.cases import NARROW
from mhc_conformance.patches.declaration import Replaced, patch, rounded, stopped


def _changed(which: int, change: Callable[[Value], Value]) -> Replaced:
    """Return mappings with one of its three outputs changed."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def mappings(x: Value, phi: Value, scale: Value, bias: Value, variant: Any) -> Any:
            made = list(right(x, phi, scale, bias, variant))
            if made[which] is not None:
                made[which] = change(made[which])
            return tuple(made)

        return mappings

    return replacement


def _half(h: Value) -> Value:
    return h / 2.0


def _transposed(h: Value) -> Value:
    return h.swapaxes(-1, -2)


patch("no-post-scale", "H_post is half of what it should be", "mappings")(_changed(1, _half))
patch("h-res-transposed", "H_res comes out transposed", "mappings")(_changed(2, _transposed))
for _dtype in NARROW:
    for _which, _name in enumerate(("H_pre", "H_post", "H_res")):
        patch("mappings-rounded", f"{_name} rounded to {_dtype}", "mappings")(
            _changed(_which, lambda h, dtype=_dtype: rounded(dtype, h))
        )
for _which, _name in enumerate(("H_pre", "H_post", "H_res")):
    patch(
        f"no-gradient-of-{_name.lower().replace('_', '-')}",
        f"no gradient passes through {_name}",
        "mappings",
        which="backward",
    )(_changed(_which, stopped))


def _given(change: Callable[[int, Value, Value, int], tuple[Value, Value]]) -> Replaced:
    """Return mappings that get another scale or bias."""

    def replacement(right: Callable[..., Any]) -> Callable[..., Any]:
        def mappings(x: Value, phi: Value, scale: Value, bias: Value, variant: Any) -> Any:
            n = x.shape[-2]
            scale, bias = change(n, scale, bias, bias.shape[0])
            return right(x, phi, scale, bias, variant)

        return mappings

    return replacement


def _scale_at(index: int, instead: int) -> Callable[[int, Value, Value, int], tuple[Value, Value]]:
    def change(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
        order = list(range(scale.shape[0]))
        order[index] = instead
        return concatenate([scale[at : at + 1] for at in order], 0), bias

    return change


for _index, _instead in ((1, 0), (0, 1), (2, 1), (2, 0), (1, 2)):
    _group = ("pre", "post", "res")
    patch(
        "wrong-scale",
        f"the scale of {_group[_instead]} is used for {_group[_index]}",
        "mappings",
    )(_given(_scale_at(_index, _instead)))


def _no_bias(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
    return scale, bias * np.where(np.arange(m) < 2 * n, 1.0, 0.0)


def _no_bias_at_all(n: int, scale: Value, bias: Value, m: int) -> tuple[Value, Value]:
    return scale, bias * 0.0


patch("no-bias", "no bias in the logits of H_res", "mappings")(_given(_no_bias))
patch("no-bias", "no bias", "mappings")(_given(_no_bias_at_all))
