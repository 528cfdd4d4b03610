"""A call's fixed inputs, and its results compared with those of the float64 oracle on NumPy.

The oracle and the tolerances are the conformance kit's, which share no code with any backend. It
computes only the distinct tokens. Further tokens repeat these, so their results repeat too, and
gradients that are sums over the tokens are multiplied by the number of repeats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mhc_backends.proof.launches import Call
from mhc_conformance.answers import answers, condition, size
from mhc_conformance.cases import Case, Sizes, data, numpy_dtype
from mhc_conformance.tolerances import Quantity, tolerance
from mhc_core.math import load

__all__ = ["Inputs", "Want", "fault", "inputs", "wanted"]

Array = NDArray[Any]


class Inputs(NamedTuple):
    """A call's arrays and cotangents: for the distinct tokens, and for all."""

    primals: list[Array]
    cotangents: list[Array]
    all_primals: list[Array]
    all_cotangents: list[Array]


def inputs(call: Call) -> Inputs:
    """Draw a call's arrays as the kit does, in the call's dtypes."""
    declared = load(call.op).OP
    case = Case(
        call.op,
        "proof",
        Sizes((call.distinct,), call.n, call.C, ""),
        call.static,
        shared=call.shared,
        optional=call.given == len(declared.arrays),
        unmixed=call.unmixed,
    )
    drawn = data(case, call.dtypes[0], 0)
    primals, cotangents = (
        [array.astype(numpy_dtype(name)) for array, name in zip(arrays, own.values(), strict=True)]
        for arrays, own in zip(drawn, (call.arrays, call.cotangents), strict=True)
    )
    per_token = [_per_token(call, name) for name in call.arrays]
    return Inputs(
        primals,
        cotangents,
        [_all(call, a) if every else a for a, every in zip(primals, per_token, strict=True)],
        [_all(call, array) for array in cotangents],
    )


def _per_token(call: Call, name: str) -> bool:
    """Return whether an array has separate values for each token."""
    patterns = load(call.op).OP.patterns[name]
    return patterns[-1 if call.shared else 0][0] == "..."


def _all(call: Call, array: Array) -> Array:
    return np.concatenate([array] * (call.T // call.distinct))


# ---- comparing -----------------------------------------------------------------------------------


class Want(NamedTuple):
    """One result of the oracle: for the distinct tokens, or summed over all."""

    name: str
    value: Array
    per_token: bool
    dtype: np.dtype[Any]
    allowed: float


def wanted(
    call: Call, quantity: Quantity, given: Inputs, stored: Mapping[str, Array] | None = None
) -> list[Want]:
    """Return the oracle's outputs or gradients for a call.

    ``stored`` has the outputs that the op reads back, as the backend rounded them, by the oracle's
    names for them.
    """
    absent = tuple(name for name in load(call.op).OP.arrays if name not in call.arrays)
    rounded = {name: array[: call.distinct] for name, array in (stored or {}).items()}
    options = {**call.options, "absent": absent, **rounded}
    streams, times = call.dtypes[0], call.T // call.distinct
    asked = answers(call.op, quantity, given.primals, given.cotangents, options, streams)
    found: list[Want] = []
    names = call.cotangents if quantity == "forward" else call.arrays
    for name, value, moved in zip(names, *asked, strict=True):
        every = quantity == "forward" or _per_token(call, name)
        value, moved = (value, moved) if every else (value * times, moved * times)
        dtype = _dtype(call, quantity, name)
        allowed = tolerance(call.op, quantity, dtype, condition(value, moved, streams))
        label = name if quantity == "forward" else f"d {name}"
        found.append(Want(label, value, every, np.dtype(numpy_dtype(dtype)), allowed))
    return found


def _dtype(call: Call, quantity: Quantity, name: str) -> str:
    """Return the name of a result's dtype: a gradient has that of its array."""
    if quantity == "gradient":
        return call.arrays[name]
    return call.dtypes[0] if load(call.op).OP.outputs[name].dtype == "stream" else "float32"


def fault(call: Call, got: Sequence[Array], want: Sequence[Want]) -> str | None:
    """Return what is wrong with the first wrong result, or None."""
    for one, right in zip(got, want, strict=True):
        shape = (call.T, *right.value.shape[1:]) if right.per_token else right.value.shape
        if (one.shape, one.dtype) != (shape, right.dtype):
            return f"{right.name} is {one.dtype} {one.shape}; needs {right.dtype} {shape}"
        folded = one.reshape(-1, *right.value.shape).astype(np.float64)
        error = float(np.abs(folded - right.value).max(initial=0.0)) / size(right.value)
        if not error <= right.allowed:  # NaN is not
            return f"{right.name} is off by {error:.2g}, allowed {right.allowed:.2g}"
    return None
