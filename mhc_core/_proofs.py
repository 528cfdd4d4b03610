"""Proofs: whether a backend has shown on this machine that it is right for a kind of call."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import Any

from mhc_core._messages import error_text, warn
from mhc_core.backend import BackendSpec
from mhc_core.signature import UNMIXED, Signature

__all__ = ["advice", "not_asked", "unproven", "unproven_text", "warn_once"]

not_asked: ContextVar[bool] = ContextVar("mhc_proofs_not_asked", default=False)
"""True where backends run without a proof, in this thread or task."""

_warned: set[tuple[Any, ...]] = set()


def unproven(what: str, spec: BackendSpec, call: Signature) -> str | None:
    """Return why a backend's proof rejects this kind of call, or None."""
    if spec.proof is None or not_asked.get():
        return None
    trusted = os.environ.get("MHC_TRUST", "").split(",")
    if spec.name in (name.strip() for name in trusted):
        return None
    dtypes = _as_if_mixed(
        call, call.dtypes if what == "vjp" else (*call.dtypes, *call.output_dtypes)
    )
    try:
        return spec.proof.verdict(call.op.name, dtypes, call.n) or None
    except BaseException as error:  # of code that is not ours
        return f"its proof raised {error_text(error)}"


def _as_if_mixed(call: Signature, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the dtypes of the call with all its outputs: a proof of that covers all kernels."""
    arrays, names = list(dtypes[: len(dtypes) - len(call.outputs)]), list(call.op.arrays)
    if UNMIXED in call.absent:
        arrays.insert(names.index(UNMIXED), call.mapping_dtype)
    given = iter(dtypes[len(dtypes) - len(call.outputs) :])
    own = {"stream": call.stream_dtype, "mapping": call.mapping_dtype}
    outputs = zip(call.op.outputs.values(), call.op.kept(call.static), strict=True)
    return (*arrays, *(next(given) if there else own[out.dtype] for out, there in outputs))


def unproven_text(spec: BackendSpec, call: Signature, source: str, reason: str) -> str:
    """Return a sentence that names what is not proven, and why."""
    n = "" if call.n is None else f"n={call.n}, "
    return (
        f"{call.op.name}: backend {spec.name!r}{source} has not proven itself on this machine for "
        f"{n}{call.stream_dtype}: {reason.rstrip('.')}."
    )


def advice(spec: BackendSpec, call: Signature) -> str:
    """Return what a user can do about a backend that is not proven."""
    return (
        "Please send this project the report that `mhc conformance "
        f"{spec.name} --op {call.op.name} --report report.html` writes; MHC_TRUST={spec.name} "
        "makes it run anyway."
    )


def warn_once(spec: BackendSpec, call: Signature, reason: str, instead: BackendSpec) -> None:
    """Warn once that another backend runs a kind of call, and why."""
    about = (spec.name, call.op.name, call.n, call.stream_dtype, reason)
    if about not in _warned:
        _warned.add(about)
        text = f"{unproven_text(spec, call, '', reason)} {instead.name!r} answers in its place."
        warn(f"{text} {advice(spec, call)}")
