"""The checks of one mixer: its declaration, its laws, and every backend that runs it.

A third party's mixer has no oracle. Its forward is held to what it declares, its vjp to
differences of its forward in float64, and each backend to NumPy in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mhc_core
from mhc_conformance.answers import condition, distance, size
from mhc_conformance.cases import Case, Sizes, data
from mhc_conformance.records import Comparison
from mhc_conformance.subject import Subject, several
from mhc_conformance.tolerances import DIFFERENCES, Quantity, eps, tolerance
from mhc_core import PAPER, Variant
from mhc_core.mixer import Mixer

__all__ = ["MIXER_CHECKS", "backends_of", "check_mixer", "sizes_of"]

Array = NDArray[Any]
Arrays = Sequence[Array]

MOST = 8  # streams that a mixer is tried with
LEADING = ((), (0,), (2, 3), (5,))
ROUNDINGS = 64  # of a sum of H_res's entries: a mixer may take many operations to make one
STEP = 2e-3
SECOND = 4  # times the tolerance of mappings with Sinkhorn: go-mhc's inverses need 1.2 of it


def _mixer(name: str) -> Mixer:
    known = mhc_core.mixers()
    return known[name] if name in known else replace(PAPER, mixer=name).made_by  # which raises


def _variant(name: str, options: Mapping[str, Any]) -> Variant:
    return replace(PAPER, mixer=name, mixer_options=tuple(options.items()))


def sizes_of(name: str, options: Mapping[str, Any]) -> list[int]:
    """Return the numbers of streams to try, those that the mixer takes."""
    variant = _variant(name, options)
    return [n for n in range(1, MOST + 1) if variant.refuses(n) is None]


def backends_of(name: str) -> list[str]:
    """Return the backends here that run the mixer."""
    found = mhc_core.backends().values()
    specs = [one.spec for one in found if one.spec is not None and one.available]
    taken = [spec for spec in specs if spec.mixers is None or name in spec.mixers]
    return [spec.name for spec in taken if {"mappings", "combine"} <= set(spec.ops)]


# --- its declaration, and its laws ------------------------------------------------------------


def declaration(name: str, options: Mapping[str, Any], seed: int) -> Iterator[Comparison]:
    """Check that the mixer takes some n, and starts from as many logits as it has."""
    variant = _variant(name, options)
    sizes = sizes_of(name, options)
    yield _said("the sizes", "" if sizes else f"takes no n from 1 to {MOST}")
    for n in sizes:
        count, start = variant.logits(n), list(variant.made_by.init(n, **variant.options))
        good = type(count) is int and count >= 0
        yield _said(f"logits, n={n}", "" if good else f"are {count!r}; needs an int, 0 or more")
        finite = len(start) == count and bool(np.isfinite(np.array(start, float)).all())
        yield _said(f"the start, n={n}", "" if finite else f"is {start}; needs {count} numbers")


def laws(name: str, options: Mapping[str, Any], seed: int) -> Iterator[Comparison]:
    """Check shapes, dtypes, tokens that do not see each other and, where declared, sums of 1."""
    variant = _variant(name, options)
    mixer = variant.made_by
    if mixer.forward is None:
        return
    for n in sizes_of(name, options):
        for leading, dtype in [(at, "float64") for at in LEADING] + [((2, 3), "float32")]:
            where = f"H_res, n={n}, leading {leading}, {dtype}"
            logits = _logits(variant, n, leading, dtype, seed)
            h_res = np.asarray(mixer.forward(logits, n=n, **variant.options))
            want = ((*leading, n, n), np.dtype(dtype))
            got = (h_res.shape, h_res.dtype)
            if got != want:
                yield _said(where, f"is {got[1]} {got[0]}; needs {want[1]} {want[0]}")
                continue
            limit = ROUNDINGS * n * eps(dtype)
            if leading == (5,):
                alone = [mixer.forward(row, n=n, **variant.options) for row in logits]
                off = np.abs(np.stack([np.asarray(one) for one in alone]) - h_res).max()
                yield Comparison(f"{where}, each token alone,", float(off), limit)
            if mixer.doubly_stochastic and h_res.size:
                for what, off in (
                    ("columns", h_res.sum(axis=-2) - 1),
                    ("rows", h_res.sum(axis=-1) - 1),
                    ("entries below 0", np.minimum(h_res, 0)),
                ):
                    yield Comparison(f"{where}, {what},", float(np.abs(off).max()), limit)


def slopes(name: str, options: Mapping[str, Any], seed: int) -> Iterator[Comparison]:
    """Check the vjp along random directions against central differences in float64."""
    variant = _variant(name, options)
    mixer = variant.made_by
    if mixer.forward is None or mixer.vjp is None:
        return
    forward, vjp = mixer.forward, mixer.vjp
    rng = np.random.default_rng(seed)
    for n in sizes_of(name, options):
        logits = _logits(variant, n, (2, 3), "float64", seed)
        if not logits.shape[-1]:
            continue
        along, g = rng.normal(size=logits.shape), rng.normal(size=(2, 3, n, n))

        def value(step: float, logits: Array = logits, along: Array = along, n: int = n) -> Array:
            return np.asarray(forward(logits + step * along, n=n, **variant.options))

        coarse, fine = ((value(h) - value(-h)) / (2 * h) for h in (STEP, STEP / 2))
        want = float((g * (4 * fine - coarse) / 3).sum())
        pulled = np.asarray(vjp(logits, g, n=n, **variant.options))
        terms = pulled * along
        total = max(float(np.abs(terms).sum()), 1e-3 * float(np.abs(g).sum()))  # H_res may be fixed
        off = abs(float(terms.sum()) - want) / total
        yield Comparison(f"the vjp, n={n},", off, DIFFERENCES)


def _logits(variant: Variant, n: int, leading: tuple[int, ...], dtype: str, seed: int) -> Array:
    rng = np.random.default_rng([seed, n])
    return rng.normal(0, 1.5, (*leading, variant.logits(n))).astype(dtype)


def _said(where: str, problem: str) -> Comparison:
    return Comparison(where, 0.0, 0.0, problem)


# --- on every backend ---------------------------------------------------------------------------


def _case(name: str, options: Mapping[str, Any]) -> Case:
    n = [n for n in sizes_of(name, options) if n <= 4][-1]
    sizes = Sizes((2, 3), n, 5, "an ordinary batch")
    return Case("mappings", f"mixer {name}", sizes, (("variant", _variant(name, options)),))


def ran_by(backend: str, name: str, options: Mapping[str, Any], seed: int) -> Iterator[Comparison]:
    """Check mappings on a backend, forward, vjp and own gradient, against NumPy's in float64."""
    case, subject, reference = _case(name, options), Subject(backend), Subject("numpy")
    drawn = data(case, "float32", seed)

    def forward(primals: Arrays, _: Arrays) -> Arrays:
        return reference.function(case)(*primals)

    def gradient(primals: Arrays, cotangents: Arrays) -> Arrays:
        return reference.vjp(case, tuple(primals), tuple(cotangents))

    primals, cotangents = subject.take(drawn.primals), subject.take(drawn.cotangents)
    outputs = subject.function(case)(*primals)
    yield from _close("forward", backend, subject.give(outputs), _twice(forward, drawn, seed))
    want = _twice(gradient, drawn, seed)
    pulled = subject.vjp(case, primals, cotangents)
    yield from _close("gradient", backend, subject.give(pulled), want)
    if subject.lacks("grad") is None:
        own = _gradient(subject, case, cotangents)(*primals)
        yield from _close("gradient", f"{backend}, by its own grad", subject.give(own), want)


def curved_by(
    backend: str, name: str, options: Mapping[str, Any], seed: int
) -> Iterator[Comparison]:
    """Check second derivatives on a backend against differences of NumPy's gradients."""
    case, subject, reference = _case(name, options), Subject(backend), Subject("numpy")
    if subject.lacks("grad") or subject.lacks("second"):
        return
    drawn = data(case, "float32", seed)
    rng = np.random.default_rng(seed)
    along = [rng.normal(size=array.shape).astype("float32") for array in drawn.primals]
    own = subject.take(along)
    gradient = _gradient(subject, case, subject.take(drawn.cotangents))

    def slope(*arrays: Any) -> Any:
        return sum((u * g).sum() for u, g in zip(own, gradient(*arrays), strict=True))

    grad = subject.transform("grad")(slope, range(len(drawn.primals)))
    got = grad(*subject.take(drawn.primals))

    def curved(primals: Arrays, cotangents: Arrays) -> Arrays:
        def pulled(step: float) -> Any:
            at = tuple(p + step * u for p, u in zip(primals, along, strict=True))
            return reference.vjp(case, at, tuple(cotangents))

        ends = zip(*(pulled(h) for h in (STEP, -STEP, STEP / 2, -STEP / 2)), strict=True)
        return [(4 * (c - d) / STEP - (a - b) / (2 * STEP)) / 3 for a, b, c, d in ends]

    yield from _close("second", backend, subject.give(got), _twice(curved, drawn, seed))


def _gradient(subject: Subject, case: Case, cotangents: Any) -> Callable[..., Any]:
    function = subject.function(case)

    def loss(*arrays: Any) -> Any:
        outputs = several(function(*arrays))
        return sum((c * o).sum() for c, o in zip(cotangents, outputs, strict=True))

    return subject.transform("grad")(loss, range(len(case.names)))


def _twice(
    ask: Callable[[Arrays, Arrays], Any], drawn: tuple[Arrays, Arrays], seed: int
) -> list[tuple[Array, Array]]:
    """Return float64 answers, each beside that for inputs that are moved by a float32 rounding."""
    rng = np.random.default_rng(seed)
    exact = [[array.astype(np.float64) for array in arrays] for arrays in drawn]
    moved = [
        [array * (1 + eps("float32") * rng.uniform(-1, 1, array.shape)) for array in arrays]
        for arrays in exact
    ]
    return list(zip(several(ask(*exact)), several(ask(*moved)), strict=True))


def _close(
    quantity: Quantity, where: str, got: Arrays, want: Sequence[tuple[Array, Array]]
) -> Iterator[Comparison]:
    for index, (one, (right, moved)) in enumerate(zip(got, want, strict=True)):
        off = distance(one.astype(np.float64), right) / size(right)
        magnified = SECOND if quantity == "second" else 1
        limit = magnified * tolerance(
            "mappings", quantity, "float32", condition(right, moved, "float32")
        )
        yield Comparison(f"{quantity} number {index} on {where},", off, limit)


Check = Callable[[str, Mapping[str, Any], int], Iterator[Comparison]]
MIXER_CHECKS: Mapping[str, Check] = {"declaration": declaration, "laws": laws, "slopes": slopes}


def check_mixer(
    name: str, options: Mapping[str, Any] | None = None, seed: int = 0
) -> Iterator[Comparison]:
    """Yield every comparison of a mixer, on every backend here that runs it."""
    _mixer(name)
    chosen = options or {}
    for check in MIXER_CHECKS.values():
        yield from check(name, chosen, seed)
    for backend in backends_of(name):
        yield from ran_by(backend, name, chosen, seed)
        yield from curved_by(backend, name, chosen, seed)
