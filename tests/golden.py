"""Golden cases and how to compute them with this library's ops.

A case holds what somebody else's implementation returned: outputs, and the gradients of
``sum(cotangent * output)``. A form is a small function that computes the same from our ops. It is
written once, against ``Ops``, and runs on the oracle's tape, through ``mhc.vjp`` and under the
autodiff of JAX and MLX.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import mhc_core as mhc
from mhc_conformance import autodiff, oracle

Unary = Literal["exp", "log", "tanh", "sigmoid"]
Precision = Literal["f64", "f32", "bf16"]
Arrays = Mapping[str, Any]
Attrs = Mapping[str, Any]


# --- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """One case: its source, its arrays by role, and its tolerances."""

    id: str
    variant: str
    impl: Mapping[str, str]
    precision: Precision
    attrs: Attrs
    formula: str
    arrays: Mapping[str, NDArray[Any]]
    about: Mapping[str, Mapping[str, Any]]
    differentiable: tuple[str, ...]
    skipped_always: frozenset[str]
    skipped_in_f32: frozenset[str]
    ill_conditioned_f32: bool
    rtol: Mapping[str, float]

    def __str__(self) -> str:
        return self.id

    def role(self, role: str) -> dict[str, NDArray[Any]]:
        return {
            key.split(".", 1)[1]: array
            for key, array in self.arrays.items()
            if key.split(".", 1)[0] == role
        }

    def precisions(self) -> frozenset[str]:
        """Return the precisions for which the case has a tolerance."""
        keys = {key for about in self.about.values() for key in about if key.startswith("atol_")}
        return frozenset(key.removeprefix("atol_") for key in keys)

    def stopped_alike(self) -> bool:
        """Return whether the source stopped after as many steps in float32 as in float64."""
        wide = self.attrs.get("iterations_executed_f64")
        return wide == self.attrs.get("iterations_executed_f32")


def read_index(directory: Path) -> list[Golden]:
    """Read a directory with an index.json and one npz for each case."""
    index = json.loads((directory / "index.json").read_text())
    cases: list[Golden] = []
    for record in index["cases"]:
        with np.load(directory / record["file"]) as stored:
            arrays = {key: stored[key] for key in record["arrays"]}
        cases.append(make_case(record, arrays))
    return cases


def read_subset(stem: Path) -> list[Golden]:
    """Read STEM.json and STEM.npz, where arrays are slices of one long array per dtype."""
    index = json.loads(stem.with_suffix(".json").read_text())
    with np.load(stem.with_suffix(".npz")) as stored:
        long = {name: stored[name] for name in stored.files}
    cases: list[Golden] = []
    for record in index["cases"]:
        arrays: dict[str, NDArray[Any]] = {}
        for key, about in record["arrays"].items():
            dtype, start, shape = about["at"]
            size = int(np.prod(shape, dtype=int))
            arrays[key] = long[dtype][start : start + size].reshape(shape)
        record["formula"] = record.get("formula", index["formulas"][record["variant"]])
        record["tol"] = index["tolerance"]
        cases.append(make_case(record, arrays))
    return cases


def make_case(record: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Golden:
    case = Golden(
        id=record["id"],
        variant=record["variant"],
        impl=record["impl"],
        precision=record["precision"],
        attrs=record["attrs"],
        formula=record["formula"],
        arrays=arrays,
        about=record["arrays"],
        differentiable=tuple(record["differentiable"]),
        skipped_always=frozenset(record.get("nonfinite_arrays", ())),
        skipped_in_f32=frozenset(record.get("f32_native_nonfinite", ())),
        ill_conditioned_f32=record.get("ill_conditioned_f32", False),
        rtol={p: t for p in ("f64", "f32", "bf16") if (t := record["tol"].get(f"rtol_{p}"))},
    )
    return _only_unclamped(case) if case.variant in CLAMPED else case


# Sinkhorn with a clamp or a mask on its divisors, and the axes in the order in which it sums. The
# cases are taken matrix by matrix: where a clamp never acts, the function is plain Sinkhorn.
CLAMPED = {
    "sinkhorn.rowcol_clamp": (-1, -2),
    "sinkhorn.colrow_l1": (-2, -1),
    "sinkhorn.rowcol_mask": (-1, -2),
    "sinkhorn.rowcol_mask_pos": (-1, -2),
}


def _only_unclamped(case: Golden) -> Golden:
    (given,) = case.role("in").values()
    positive = case.variant.endswith("_pos")
    kept = _unclamped(given, positive, CLAMPED[case.variant], case.attrs)
    if kept.all():
        return case
    arrays = {key: array[kept] for key, array in case.arrays.items()}
    infinite = {key for key in case.skipped_always if not np.isfinite(arrays[key]).all()}
    return replace(case, arrays=arrays, skipped_always=frozenset(infinite))


def _unclamped(
    given: NDArray[Any], positive: bool, axes: tuple[int, int], attrs: Attrs
) -> NDArray[np.bool_]:
    """Return which matrices never have a line whose sum is as small as the clamp."""
    matrix = given.astype(np.float64)
    if not positive:
        matrix = np.exp(matrix - matrix.max(axes[0], keepdims=True))
    kept = np.ones(len(matrix), dtype=np.bool_)
    for _ in range(attrs["iters"]):
        for axis in axes:
            sums = matrix.sum(axis, keepdims=True)
            kept &= (sums > attrs["eps"]).all((-1, -2))
            matrix = matrix / np.maximum(sums, attrs["eps"])
    return kept


def problems(case: Golden, found: Mapping[str, NDArray[Any]], precision: Precision) -> list[str]:
    """Return the arrays that do not meet ``|got - ref| <= atol[array] + rtol * |ref|``."""
    skipped = case.skipped_always | (case.skipped_in_f32 if precision == "f32" else frozenset())
    wanted = {key for key in case.arrays if key.split(".", 1)[0] in ("out", "grad")}
    report = [f"{key}: not computed" for key in sorted(wanted - set(found))]
    for key in sorted(wanted & set(found) - skipped):
        reference = case.arrays[key].astype(np.float64)
        got = np.asarray(found[key]).astype(np.float64)
        if got.shape != reference.shape:
            report.append(f"{key}: shape {got.shape}, needs {reference.shape}")
            continue
        allowed = case.about[key][f"atol_{precision}"] + case.rtol[precision] * np.abs(reference)
        excess = np.abs(got - reference) / allowed
        if not np.all(excess <= 1.0):  # a NaN is a difference
            report.append(f"{key}: {np.max(excess):.3g} times what is allowed")
    return report


# --- ops on one kind of array -----------------------------------------------------------------


class Ops(ABC):
    """The ops of mHC and the little arithmetic that a form needs between them."""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in oracle.OPS:
            raise AttributeError(op)
        return partial(self.call, op)

    @abstractmethod
    def call(self, op: str, *arrays: Any, **static: Any) -> Any: ...

    @abstractmethod
    def concatenate(self, parts: Sequence[Any], axis: int = 0) -> Any: ...

    @abstractmethod
    def total(self, a: Any, axis: int) -> Any:
        """Sum along an axis, which stays with size 1."""

    @abstractmethod
    def unary(self, name: Unary, a: Any) -> Any: ...

    @abstractmethod
    def power(self, a: Any, exponent: float) -> Any: ...

    @abstractmethod
    def cast(self, a: Any, like: Any) -> Any: ...

    @abstractmethod
    def one_hot(self, shape: tuple[int, ...], like: Any) -> Any:
        """Return ones at index 0 of the last axis, zeros elsewhere."""

    def layer(self, h: Any, W: Any) -> Any:
        """Return the toy layer of the golden cases, computed in the precision of its weights."""
        wide = self.cast(h, W)
        return self.cast(self.unary("tanh", wide @ W if W.ndim == 2 else wide * W), h)


class TapeOps(Ops):
    """The ops on the oracle's tape."""

    def call(self, op: str, *arrays: Any, **static: Any) -> Any:
        return oracle.OPS[op](*arrays, **static)

    def concatenate(self, parts: Sequence[Any], axis: int = 0) -> Any:
        return autodiff.concatenate(parts, axis)

    def total(self, a: Any, axis: int) -> Any:
        return autodiff.total(a, axis)

    def unary(self, name: Unary, a: Any) -> Any:
        return getattr(autodiff, name)(a)

    def power(self, a: Any, exponent: float) -> Any:
        return a**exponent

    def cast(self, a: Any, like: Any) -> Any:
        narrow, wide = a.data.dtype, like.data.dtype
        if narrow == wide:
            return a
        return autodiff.node(
            "cast", a.data.astype(wide), (a,), lambda g: (np.asarray(g).astype(narrow),)
        )

    def one_hot(self, shape: tuple[int, ...], like: Any) -> Any:
        return autodiff.value(np.eye(1, shape[-1], dtype=like.data.dtype) * np.ones(shape))


class VjpOps(TapeOps):
    """The library's ops on the tape: each op's derivative is what ``mhc.vjp`` returns.

    So a chain of ops needs only forwards from its array library: the oracle's tape differentiates
    the arithmetic between ops, with constants in float64. ``widest`` is the dtype to which such
    results are narrowed before they enter an op.
    """

    def __init__(self, backend: str, widest: Any) -> None:
        self.backend = backend
        self.widest = widest

    def enter(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.astype(self.widest) if array.dtype == np.float64 else array

    def call(self, op: str, *arrays: Any, h_pre: Any = None, **static: Any) -> Any:
        """h_pre is an array that may be left out; vjp counts it as the last of the primals.

        A primal may be None, and so may an output.
        """
        optional = {} if h_pre is None else {"h_pre": self.enter(h_pre.data)}
        primals = tuple(None if array is None else self.enter(array.data) for array in arrays)
        result = getattr(mhc, op)(*primals, **optional, **static, backend=self.backend)
        primals = (*primals, *optional.values())
        parents = tuple(array for array in (*arrays, h_pre) if array is not None)
        single = not isinstance(result, tuple)
        outputs = [
            None if output is None else on_host(output)
            for output in ((result,) if single else result)
        ]

        def pull(index: int, g: NDArray[Any]) -> tuple[NDArray[Any], ...]:
            cotangents = [None if output is None else np.zeros_like(output) for output in outputs]
            cotangents[index] = g.astype(cast("NDArray[Any]", outputs[index]).dtype)
            gradients = mhc.vjp(op, primals, tuple(cotangents), **static, backend=self.backend)
            return tuple(on_host(gradient) for gradient in gradients if gradient is not None)

        values = tuple(
            None if output is None else autodiff.node(op, output, parents, partial(pull, index))
            for index, output in enumerate(outputs)
        )
        return values[0] if single else values


def on_host(array: Any) -> NDArray[Any]:
    """Return a NumPy array of the same dtype; MLX cannot export its bfloat16 directly."""
    if str(array.dtype) != "mlx.core.bfloat16":
        return np.asarray(array)
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(ml_dtypes.bfloat16)


class NativeOps(Ops):
    """The library's ops on an array library's own arrays, and that library's autodiff."""

    backend: str
    xp: Any

    @abstractmethod
    def differentiate(
        self,
        function: Callable[..., list[Any]],
        primals: list[Any],
        cotangents: Callable[[list[Any]], list[Any]],
    ) -> tuple[list[Any], Sequence[Any]]:
        """Return the outputs, and the gradients for the cotangents chosen from them."""

    def call(self, op: str, *arrays: Any, **static: Any) -> Any:
        return getattr(mhc, op)(*arrays, **static, backend=self.backend)

    def concatenate(self, parts: Sequence[Any], axis: int = 0) -> Any:
        return self.xp.concatenate(list(parts), axis=axis)

    def total(self, a: Any, axis: int) -> Any:
        return self.xp.sum(a, axis=axis, keepdims=True)

    def unary(self, name: Unary, a: Any) -> Any:
        return getattr(self.xp, name)(a)

    def power(self, a: Any, exponent: float) -> Any:
        return a**exponent

    def cast(self, a: Any, like: Any) -> Any:
        return a.astype(like.dtype)

    def one_hot(self, shape: tuple[int, ...], like: Any) -> Any:
        return self.from_numpy(np.eye(1, shape[-1]) * np.ones(shape), like.dtype)

    def from_numpy(self, array: NDArray[Any], dtype: Any = None) -> Any:
        """Return an array of the library, in a dtype of the library if one is given."""
        narrow = array.dtype == ml_dtypes.bfloat16
        taken = self.xp.array(array.astype(np.float32) if narrow else array)
        return taken.astype(dtype or (self.xp.bfloat16 if narrow else taken.dtype))


class JaxOps(NativeOps):
    """``jax.vjp`` through our ops."""

    def __init__(self, backend: str) -> None:
        import jax.numpy

        self.backend = backend
        self.xp = jax.numpy

    def unary(self, name: Unary, a: Any) -> Any:
        import jax

        return jax.nn.sigmoid(a) if name == "sigmoid" else super().unary(name, a)

    def differentiate(
        self,
        function: Callable[..., list[Any]],
        primals: list[Any],
        cotangents: Callable[[list[Any]], list[Any]],
    ) -> tuple[list[Any], Sequence[Any]]:
        import jax

        def both(*primals: Any) -> Any:
            outputs, pull = jax.vjp(function, *primals)
            return outputs, pull(cotangents(outputs))

        return jax.jit(both)(*primals)


class MlxOps(NativeOps):
    """``mx.vjp`` through our ops."""

    def __init__(self, backend: str) -> None:
        import mlx.core as mx

        self.backend = backend
        self.xp = mx

    def differentiate(
        self,
        function: Callable[..., list[Any]],
        primals: list[Any],
        cotangents: Callable[[list[Any]], list[Any]],
    ) -> tuple[list[Any], Sequence[Any]]:
        # mx.vjp wants the cotangents beforehand, so the outputs are computed once for them.
        return self.xp.vjp(function, primals, cotangents(function(*primals)))


# --- running a case ---------------------------------------------------------------------------

Form = Callable[[Ops, Arrays, Attrs], Mapping[str, Any]]
DTYPES: Mapping[str, Any] = {"f64": np.float64, "f32": np.float32, "bf16": ml_dtypes.bfloat16}


def host_inputs(case: Golden, precision: Precision) -> dict[str, NDArray[Any]]:
    """Return the inputs in a precision; in bf16 only streams are narrow, parameters are float32."""
    return {
        name: array.astype(_dtype(case.about[f"in.{name}"], case.precision, precision))
        for name, array in case.role("in").items()
        if array.dtype.kind == "f"
    }


def _dtype(about: Mapping[str, Any], recorded: Precision, wanted: Precision) -> Any:
    if wanted != "bf16":
        return DTYPES[wanted]
    # A case recorded in bf16 says which arrays were; one in float64 says which are streams.
    narrow = about["dtype"] == "bfloat16" if recorded == "bf16" else about["kind"] == "input"
    return ml_dtypes.bfloat16 if narrow else np.float32


def run(ops: Ops, case: Golden, form: Form, precision: Precision) -> dict[str, NDArray[Any]]:
    """Return ``out.*`` and ``grad.*`` of a case."""
    host = host_inputs(case, precision)
    if isinstance(ops, NativeOps):
        outputs, gradients = _run_natively(ops, case, form, host)
    else:
        outputs, gradients = _run_on_tape(ops, case, form, host)
    grads = zip(case.differentiable, gradients, strict=True)
    return {f"out.{k}": v for k, v in outputs.items()} | {f"grad.{k}": v for k, v in grads}


Ran = tuple[Mapping[str, NDArray[Any]], Sequence[NDArray[Any]]]


def _run_on_tape(ops: Ops, case: Golden, form: Form, host: Mapping[str, NDArray[Any]]) -> Ran:
    leaves = {name: autodiff.value(array) for name, array in host.items()}
    outputs = form(ops, leaves, case.attrs)
    cotangents = case.role("ct")
    gradients = autodiff.pull_back(
        list(outputs.values()),
        [cotangents[name].astype(out.data.dtype) for name, out in outputs.items()],
        [leaves[name] for name in case.differentiable],
    )
    return {name: out.data for name, out in outputs.items()}, gradients


def _run_natively(
    ops: NativeOps, case: Golden, form: Form, host: Mapping[str, NDArray[Any]]
) -> Ran:
    inputs = {name: ops.from_numpy(array) for name, array in host.items()}
    given = case.role("ct")
    names: list[str] = []

    def function(*varied: Any) -> list[Any]:
        moved = {**inputs, **dict(zip(case.differentiable, varied, strict=True))}
        outputs = form(ops, moved, case.attrs)
        names[:] = outputs
        return list(outputs.values())

    def cotangents(outputs: list[Any]) -> list[Any]:
        pairs = zip(names, outputs, strict=True)
        return [ops.from_numpy(given[name], out.dtype) for name, out in pairs]

    varied = [inputs[name] for name in case.differentiable]
    outputs, gradients = ops.differentiate(function, varied, cotangents)
    host_outputs = [on_host(out) for out in outputs]
    return dict(zip(names, host_outputs, strict=True)), [on_host(g) for g in gradients]
