"""The functions that give a library's methods gradients, tested without the library."""

from __future__ import annotations

import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")

import mlx.core as mx

import mhc_core.mlx  # noqa: F401 - it raises if MLX is missing
from mhc_backends.mlx_nn.models.gradients import (
    constant_choices,
    straight_through,
    with_globals,
    with_gradient,
)

FACTOR = 2.0


def scaled(x: mx.array, *, by: float = 3.0) -> mx.array:
    """Use a global name, a default and another module."""
    return FACTOR * by * mx.round(x)


def test_rounding_keeps_its_bits_and_passes_gradients() -> None:
    x = mx.array([0.2, 0.5, 1.7, -2.49])
    weights = mx.array([1.0, -2.0, 3.0, 4.0])
    rounded = straight_through(lambda x, digits: mx.round(x, digits))
    value, gradient = mx.value_and_grad(lambda x: (weights * rounded(x, 0)).sum())(x)
    assert value.item() == (weights * mx.round(x, 0)).sum().item()
    assert gradient.tolist() == weights.tolist()
    compiled = mx.compile(mx.grad(lambda x: (weights * rounded(x, 0)).sum()))
    assert compiled(x).tolist() == weights.tolist()


def test_a_gradient_is_what_was_given_for_it() -> None:
    turned = with_gradient(lambda x: mx.round(x), lambda cotangent: -5 * cotangent)
    assert mx.grad(lambda x: turned(x).sum())(mx.array([1.2, 3.0])).tolist() == [-5.0, -5.0]


def test_choices_are_constants() -> None:
    x = mx.array([3.0, 1.0, 2.0])
    for choose in (constant_choices.argsort, lambda x: constant_choices.argpartition(x, 1)):
        gradient = mx.grad(lambda x, choose=choose: x[choose(x)][0] * 7)(x)
        assert gradient.tolist() == [0.0, 7.0, 0.0]
        with pytest.raises(ValueError, match="VJP with respect to indices"):
            mx.grad(lambda x: x[mx.argsort(x)][0])(x)
    assert constant_choices.matmul is mx.matmul


def test_a_function_gets_other_globals_and_the_original_keeps_its_own() -> None:
    other = with_globals(scaled, FACTOR=10.0)
    x = mx.array(1.0)
    assert other(x).item() == 30.0
    assert other(x, by=1.0).item() == 10.0
    assert scaled(x).item() == 6.0


def test_super_works_in_a_method_with_other_globals() -> None:
    class Base:
        def value(self) -> float:
            return 1.0

    class Library(Base):
        def value(self) -> float:
            return super().value() + FACTOR

    class Ours(Library):
        value = with_globals(Library.value, FACTOR=5.0)

    assert Ours().value() == 6.0
    assert Library().value() == 3.0


def test_a_name_that_a_function_does_not_use_is_an_error() -> None:
    with pytest.raises(AttributeError, match=r"test_gradients.scaled does not use FACTORS"):
        with_globals(scaled, FACTORS=1.0)
