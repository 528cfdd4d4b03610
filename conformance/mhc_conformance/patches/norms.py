"""Bugs of norms and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhc_conformance.autodiff import Value, total
from mhc_conformance.patches.declaration import patch


@patch("no-norm-weight", "the weight of the norm is left out", "rms_norm")
def _no_weight(right: Callable[..., Value]) -> Callable[..., Value]:
    def rms_norm(x: Value, weight: Value, eps: float) -> Value:
        return right(x, weight * 0.0 + 1.0, eps)

    return rms_norm


@patch("eps-on-the-root", "eps is added to the root, not under it", "rms_norm")
def _norm_on_root(right: Callable[..., Value]) -> Callable[..., Value]:
    def rms_norm(x: Value, weight: Value, eps: float) -> Value:
        return x / ((total(x * x, -1) / x.shape[-1]) ** 0.5 + eps) * weight

    return rms_norm


@patch("sum-for-mean", "the sum over the streams in place of their mean", "gated")
def _gates_summed(right: Callable[..., Any]) -> Callable[..., Any]:
    def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Any:
        h, u = right(x, norm, down, up, eps)
        return h * float(x.shape[-2]), u

    return gated


@patch("weight-not-shifted", "the norm's weight is used without the 1 that is added", "gated")
def _unshifted(right: Callable[..., Any]) -> Callable[..., Any]:
    def gated(x: Value, norm: Value, down: Value, up: Value, eps: float) -> Any:
        return right(x, norm - 1.0, down, up, eps)

    return gated
