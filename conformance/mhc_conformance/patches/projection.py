"""Bugs of the projection: its norm, its product, and phi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mhc_conformance.autodiff import Value, total
from mhc_conformance.patches.declaration import patch, stopped


def _normed(x: Value, phi: Value, variant: Any) -> tuple[Value, Value, Value]:
    """Return the streams as rows, what phi makes of them, and their root mean square."""
    tokens, size = int(np.prod(x.shape[:-2])), x.shape[-2] * x.shape[-1]
    vec = x.reshape(tokens, size)
    root = (total(vec * vec, -1) / size + variant.norm_eps) ** 0.5 + variant.norm_root_eps
    return vec, vec @ phi.swapaxes(0, 1), root


@patch("rms-over-c", "RMS over C instead of nC", "project")
def _over_c(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        n, C = x.shape[-2:]
        root = (total(x * x, -1) / C + variant.norm_eps) ** 0.5
        vec = (x / root).reshape(int(np.prod(x.shape[:-2])), n * C)
        return (vec @ phi.swapaxes(0, 1)).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("phi-columns", "columns of phi in the wrong order", "project")
def _columns(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        n, C = x.shape[-2:]
        swapped = phi.reshape(phi.shape[0], n, C).swapaxes(1, 2).reshape(*phi.shape)
        return right(x, swapped, variant)

    return project


@patch("eps-on-the-root", "norm_eps is added to the root, not under it", "project")
def _on_root(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        vec, made, _ = _normed(x, phi, variant)
        root = (total(vec * vec, -1) / vec.shape[-1]) ** 0.5 + variant.norm_eps
        return (made / root).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("sum-for-mean", "the sum of squares in place of their mean", "project")
def _sum_of_squares(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        vec, made, _ = _normed(x, phi, variant)
        root = (total(vec * vec, -1) + variant.norm_eps) ** 0.5
        return (made / root).reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("no-norm", "phi is applied to streams that are not normalised", "project")
def _unnormed(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        return _normed(x, phi, variant)[1].reshape(*x.shape[:-2], phi.shape[0])

    return project


@patch("no-gradient-of-norm", "no gradient passes through the norm", "project", which="backward")
def _constant_norm(right: Callable[..., Value]) -> Callable[..., Value]:
    def project(x: Value, phi: Value, variant: Any) -> Value:
        _, made, root = _normed(x, phi, variant)
        return (made / stopped(root)).reshape(*x.shape[:-2], phi.shape[0])

    return project
