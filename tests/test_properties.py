"""The laws that the kit tries on inputs that hypothesis chooses: each is seen to fail."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mhc_backends.numpy import SPEC
from mhc_backends.numpy import ops as right
from mhc_conformance import Subject, applies, check, grid, properties
from mhc_core import math

if TYPE_CHECKING:
    from conftest import Plugins

Array = NDArray[Any]


def _mine(plugins: Plugins, op: str = "", wrong: Any = None, **fields: Any) -> Subject:
    """Return a backend that is NumPy's but for one op, or its vjp."""
    functions = {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}
    functions |= {op: wrong} if op else {}
    given = {"array_types": SPEC.array_types, "dtypes": SPEC.dtypes, "without": SPEC.without}
    plugins.backend("mine", functions, automatic=False, **{**given, **fields})
    return Subject("mine")


def _too_few(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    return right.sinkhorn(logits, iterations=min(iterations, 4), eps=eps, first=first)


def _favourite(logits: Array, **static: Any) -> Array:
    """Mix in a fixed preference for the first stream over the second."""
    moved = logits.copy()
    moved[..., 0, 1:2] += 0.1
    return right.sinkhorn(moved, **static)


def _clipped(logits: Array, **static: Any) -> Array:
    return right.sinkhorn(np.minimum(logits, 3), **static)


def _softened(logits: Array, **static: Any) -> Array:
    return right.sinkhorn(logits, **static) * (1 - 1e-6 * (logits.shape[-1] == 1))


def _normed_bias(x: Array, phi: Array, scale: Array, bias: Array, *, variant: Any) -> Any:
    return right.mappings(x, phi, scale, bias / np.abs(bias).max(), variant=variant)


def _without_the_last(x: Array, h_pre: Array) -> Array:
    return right.aggregate(x[..., :-1, :], h_pre[..., :-1])


def _by_columns_of_phi(x: Array, phi: Array, *rest: Array, variant: Any) -> Any:
    return right.pre(x, np.roll(phi, 1, axis=-1), *rest, variant=variant)


def _numbered(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    return right.combine(x, y, h_post, h_res) + 1e-6 * np.arange(x.shape[-2])[:, None]


def _clamped(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    return right.combine(x, np.clip(y, -3, 3), h_post, h_res)


def _leaking(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    return right.combine(x, y, h_post, h_res * (1 - 1e-6))


def _gated(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    return right.combine(x, y, h_post, h_res * (1 - 1e-6 * (x.shape[-2] == 1)))


BROKEN = [
    ("doubly stochastic", "sinkhorn", _too_few),
    ("equivariant under permutations", "sinkhorn", _favourite),
    ("invariant to constants added to res logits", "sinkhorn", _clipped),
    ("the identity for n=1", "sinkhorn", _softened),
    ("invariant to a constant added to res logits", "mappings", _normed_bias),
    ("invariant under permutations of the streams", "aggregate", _without_the_last),
    ("equivariant under permutations of the streams", "combine", _numbered),
    ("equivariant under permutations of the streams", "pre", _by_columns_of_phi),
    ("linear in y", "combine", _clamped),
    ("the mean of the streams is preserved", "combine", _leaking),
    ("the identity for n=1", "combine", _gated),
]


def _tried(name: str, subject: Subject, op: str, dtype: str = "float64", seed: int = 0) -> Any:
    (law,) = [law for law in properties.PROPERTIES if law.op == op and law.name.startswith(name)]
    return properties._tried(law, subject, dtype, seed)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(("name", "op", "wrong"), BROKEN, ids=lambda v: getattr(v, "__name__", v))
def test_a_broken_law_is_seen(
    plugins: Plugins, name: str, op: str, wrong: Callable[..., Any]
) -> None:
    seen = _tried(name, _mine(plugins, op, wrong), op)
    assert not seen.passed
    assert seen.where.startswith(name)
    assert _tried(name, Subject("numpy"), op).passed


@pytest.mark.parametrize("op", math.OPS)
def test_a_gradient_that_is_no_slope_is_seen(plugins: Plugins, op: str) -> None:
    """Check gradients off by one part in 100 000, in one array of several."""

    def wrong(name: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        *others, last = right.vjp(name, primals, cotangents, **static)
        return (*others, last * (1 + 1e-5))

    seen = _tried("gradients equal", _mine(plugins, "vjp", wrong), op)
    assert not seen.passed
    assert _tried("gradients equal", Subject("numpy"), op).passed


@pytest.mark.parametrize(("law", "op"), sorted({(law, _op) for law, _op, _ in BROKEN}))
def test_every_law_but_slopes_is_tried_in_float32(law: str, op: str) -> None:
    assert _tried(law, Subject("numpy"), op, "float32").passed


def test_every_law_is_seen_broken() -> None:
    laws = {(law.name, law.op) for law in properties.PROPERTIES if len(law.dtypes) > 1}
    broken = {(n, o) for n, o in laws for start, op, _ in BROKEN if o == op and n.startswith(start)}
    assert broken == laws
    slopes = {law.op for law in properties.PROPERTIES if law.dtypes == ("float64",)}
    assert slopes == set(math.OPS)


def test_the_same_seed_draws_the_same(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check also that other loaded modules change nothing, and no folder is left behind."""
    monkeypatch.chdir(tmp_path)
    drawn: list[list[bytes]] = []
    for index, seed in enumerate((5, 5, 6)):
        source = tmp_path / f"constants_{index}.py"
        source.write_text("\n".join(f"x = {i / 64 - 3.987654}" for i in range(500)))
        module = ModuleType(source.stem)
        module.__file__ = str(source)
        monkeypatch.setitem(sys.modules, source.stem, module)
        seen: list[bytes] = []

        def noting(*arrays: Array, seen: list[bytes] = seen) -> Array:
            seen.append(b"".join(array.tobytes() for array in arrays))
            return right.combine(*arrays)

        subject = _mine(plugins, "combine", noting)
        assert check(subject, "combine", "float64", "properties", seed).passed
        drawn.append(seen)
    assert drawn[0] == drawn[1] != drawn[2]
    assert not (tmp_path / ".hypothesis").exists()


def test_a_failure_is_the_same_when_seen_again(plugins: Plugins) -> None:
    subject = _mine(plugins, "combine", _numbered)
    one, two = (check(subject, "combine", "float64", "properties", 3) for _ in range(2))
    assert one == two
    assert "the mean of the streams is preserved" in one.detail
    assert "--kind properties --seed 3" in one.detail


def test_an_error_of_the_backend_is_reported(plugins: Plugins) -> None:
    def raising(*_: Array) -> Array:
        raise RuntimeError("out of luck")

    record = check(_mine(plugins, "combine", raising), "combine", "float64", "properties")
    assert "raised RuntimeError: out of luck" in record.detail


def test_laws_are_left_out_with_a_reason(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _mine(plugins, dtypes=("float32",), sizes=(2, 3))
    assert ("sinkhorn", "float32", "properties") in grid(subject)  # with 3 streams
    assert applies(subject, "contract", "float32", "properties") == (
        "its one property, gradients equal to differences, needs float64"
    )
    assert check(subject, "combine", "float32", "properties").cases == 3
    monkeypatch.setattr(properties, "find_spec", lambda _: None)
    assert applies(subject, "sinkhorn", "float32", "properties") == (
        "hypothesis is not installed: pip install hypothesis"
    )


def test_laws_whose_sizes_a_backend_refuses_are_left_out(plugins: Plugins) -> None:
    subject = _mine(plugins, sizes=(9, None))
    assert applies(subject, "combine", "float64", "properties") == (
        "no property is tried at the sizes of mine"
    )
