"""The conformance kit itself: every bug that it is there to catch, put into a right backend."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from mhc_backends.numpy import SPEC
from mhc_backends.numpy import ops as right
from mhc_conformance import CHECKS, Record, Subject, applies, check, grid
from mhc_conformance.cases import data
from mhc_core import math
from mhc_core.backend import TRANSFORMS

if TYPE_CHECKING:
    from conftest import Plugins

Array = NDArray[Any]
Op = Callable[..., Any]
KINDS = ("forward", "gradient", "strided", "repeated", "host")  # that NumPy declares
FORWARD = {"forward", "strided", "host"}  # fail where a forward is wrong in every case
GRADIENT = {"gradient", "strided", "host"}


# --- bugs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """A wrong version of one op's forward or vjp, and which checks must fail for it."""

    name: str
    op: str
    fails: set[str]
    forward: Op | None = None
    vjp: Op | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        return self.name

    def functions(self) -> dict[str, Any]:
        """Give NumPy's ops module with the bug in it."""
        functions = _functions()
        if self.forward:
            functions[self.op] = self.forward
        if self.vjp:
            functions["vjp"] = self._vjp
        return functions

    def _vjp(self, op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        assert self.vjp is not None
        wrong = self.vjp if op == self.op else right.vjp
        return wrong(op, primals, cotangents, **static)


def _functions() -> dict[str, Any]:
    """Give NumPy's ops module as a dict."""
    return {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}


def _forward(op: str, change: Op) -> Op:
    """Change what goes into the right forward: its arrays and static arguments."""

    def wrong(*arrays: Array, **static: Any) -> Any:
        arrays, static = change(*arrays, **static)
        return getattr(right, op)(*arrays, **static)

    return wrong


def _gradients(change: Op) -> Op:
    """Change what comes out of the right vjp."""

    def wrong(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
        return change(*right.vjp(op, primals, cotangents, **static))

    return wrong


def _sinkhorn_in(dtype: Any) -> Op:
    """Run Sinkhorn's sums and divisions in a narrow dtype."""

    def wrong(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
        del eps
        powers = np.exp(logits.astype(np.float32) - logits.max(axis=(-1, -2), keepdims=True))
        matrix = powers.astype(dtype)
        axes = (-2, -1) if first == "columns" else (-1, -2)
        for axis in axes * iterations:
            matrix = matrix / matrix.sum(axis=axis, keepdims=True)
        return matrix.astype(np.float32)

    return wrong


def _extra_pass(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    matrix = right.sinkhorn(logits, iterations=iterations, eps=eps, first=first)
    return matrix / (matrix.sum(axis=-2 if first == "columns" else -1, keepdims=True) + eps)


def _unshifted(logits: Array, *, iterations: int, eps: float, first: str) -> Array:
    with np.errstate(all="ignore"):
        matrix = np.exp(logits.astype(np.float32)) + np.float32(eps)
        for axis in ((-2, -1) if first == "columns" else (-1, -2)) * iterations:
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + np.float32(eps))
        return matrix


def _over_channels(x: Array, phi: Array, scale: Array, bias: Array, *, variant: Any) -> Any:
    """Divide each stream by its own root mean square, over C rather than n C."""
    square = np.mean(x.astype(np.float32) ** 2, axis=-1, keepdims=True)
    normed = (x / np.sqrt(square + variant.norm_eps)).astype(np.float32)
    return right.mappings(normed, phi, scale, bias, variant=variant)


def _other_columns(x: Array, phi: Array, *rest: Array, variant: Any) -> Any:
    """Read phi's columns as [C, n] rather than [n, C]."""
    n, channels = x.shape[-2:]
    swapped = phi.reshape(-1, n, channels).swapaxes(1, 2).reshape(phi.shape)
    return (x, swapped, *rest), {"variant": variant}


def _other_variant(**fields: Any) -> Op:
    def change(*arrays: Array, variant: Any) -> Any:
        return arrays, {"variant": replace(variant, **fields)}

    return change


def _tokens(array: Array, like: Array) -> Array:
    """View an array with its leading axes flattened."""
    return array.reshape(-1, *like.shape[-2:])


def _one_token_off(dx: Array, *rest: Array) -> Any:
    return np.roll(_tokens(dx, dx), 1, axis=0).reshape(dx.shape), *rest


def _carrying_over(x: Array, *rest: Array) -> Array:
    """Add an odd token's predecessor to it, from token 1024 on."""
    out = _tokens(right.combine(x, *rest), x).copy()
    out[1025::2] += out[1024:-1:2][: len(out[1025::2])]
    return out.reshape(x.shape)


def _no_tail(x: Array, *rest: Array) -> Array:
    out = right.combine(x, *rest).copy()
    out[..., out.shape[-1] // 4 * 4 :] = 0
    return out


def _eight_streams(x: Array, h_pre: Array) -> Array:
    return right.aggregate(x[..., :8, :], h_pre[..., :8])


def _no_empty_launch(x: Array, *rest: Array) -> Array:
    if x.size == 0:
        raise RuntimeError("invalid grid")
    return right.combine(x, *rest)


def _first_token_for_all(x: Array, y: Array, h_post: Array, h_res: Array) -> Array:
    """Read per-token mappings as if they were shared."""
    one = [h.reshape(-1, *h.shape[-rank:])[:1] for h, rank in ((h_post, 1), (h_res, 2))]
    if not x.size:
        return right.combine(x, y, h_post, h_res)
    many = [np.broadcast_to(h[0], (*x.shape[:-2], *h.shape[1:])) for h in one]
    return right.combine(x, y, *many)


def _strideless(x: Array, h_pre: Array) -> Array:
    """Read the numbers from where they would lie, were the array contiguous."""
    base = x if x.base is None or x.flags.c_contiguous else x.base
    flat = np.ravel(base)[: x.size].reshape(x.shape)
    return right.aggregate(flat, h_pre)


def _nan_at_zero(op: str, primals: Any, cotangents: Any, **static: Any) -> Any:
    """Divide by the gradient's own norm, which may be zero or overflow."""
    gradients = right.vjp(op, primals, cotangents, **static)
    worst = max((float(np.abs(c).max(initial=0)) for c in cotangents), default=0)
    return tuple(g * (np.nan if worst > 1e3 else 1) for g in gradients)


_calls = itertools.count()


def _different_every_time(x: Array, h_pre: Array) -> Array:
    h = right.aggregate(x, h_pre).astype(np.float32)
    return (h * (1 + 1e-7 * (next(_calls) % 2))).astype(x.dtype)


def _written_over(x: Array, h_pre: Array) -> Array:
    h = right.aggregate(x, h_pre)
    x *= 2
    return h


V3 = _other_variant(pre_eps=0.0)
BUGS = [
    # gradients
    Bug(
        "one wrong sign",
        "combine",
        GRADIENT,
        vjp=_gradients(lambda dx, dy, dh_post, dh_res: (dx, dy, -dh_post, dh_res)),
    ),
    Bug("gradients off by one token", "aggregate", GRADIENT, vjp=_gradients(_one_token_off)),
    Bug(
        "a gradient of zeros",
        "mappings",
        GRADIENT,
        vjp=_gradients(lambda dx, dphi, *rest: (dx, 0 * dphi, *rest)),
    ),
    Bug("a gradient missing", "aggregate", GRADIENT, vjp=_gradients(lambda dx, _: (dx,))),
    Bug(
        "a gradient in float64",
        "rms_norm",
        GRADIENT,
        vjp=_gradients(lambda dx, dweight: (dx, dweight.astype(np.float64))),
    ),
    Bug(
        "another eps in the backward",
        "sinkhorn",
        {"gradient"},
        vjp=lambda op, p, c, *, eps, **rest: right.vjp(op, p, c, eps=min(eps, 1e-3), **rest),
    ),
    Bug(
        "one iteration less in the backward",
        "sinkhorn",
        {"gradient"},
        vjp=lambda op, p, c, *, iterations, **rest: right.vjp(
            op, p, c, iterations=max(1, iterations - 1), **rest
        ),
    ),
    Bug("NaN at real gradients", "pre", {"gradient"}, vjp=_nan_at_zero),
    # Sinkhorn
    Bug("Sinkhorn in bfloat16", "sinkhorn", FORWARD, _sinkhorn_in(ml_dtypes.bfloat16)),
    Bug("Sinkhorn in float16", "sinkhorn", FORWARD, _sinkhorn_in(np.float16)),
    Bug(
        "Sinkhorn of bfloat16 logits in bfloat16",
        "sinkhorn",
        {"forward"},
        _sinkhorn_in(ml_dtypes.bfloat16),
        dtype="bfloat16",
    ),
    Bug("an extra normalising pass", "sinkhorn", {"forward"}, _extra_pass),
    Bug("no max shift", "sinkhorn", {"forward"}, _unshifted),
    Bug(
        "rows before columns",
        "sinkhorn",
        {"forward"},
        _forward("sinkhorn", lambda m, *, first, **rest: ((m,), {"first": "rows", **rest})),
    ),
    Bug(
        "matrices normalised on the wrong axes",
        "sinkhorn_knopp",
        FORWARD,
        lambda m, **static: right.sinkhorn_knopp(m.swapaxes(-1, -2), **static).swapaxes(-1, -2),
    ),
    # mappings
    Bug("eps missing on H_pre", "mappings", {"forward"}, _forward("mappings", V3)),
    Bug("RMS over C instead of n C", "mappings", FORWARD, _over_channels),
    Bug(
        "columns of phi in another order", "mappings", FORWARD, _forward("mappings", _other_columns)
    ),
    Bug(
        "comb not transposed",
        "mappings",
        {"forward"},
        _forward("mappings", _other_variant(res_transposed=False)),
    ),
    Bug(
        "mappings rounded to the streams' dtype",
        "mappings",
        {"forward"},
        lambda x, *rest, variant: tuple(
            h.astype(x.dtype).astype(h.dtype) for h in right.mappings(x, *rest, variant=variant)
        ),
        dtype="bfloat16",
    ),
    Bug(
        "mappings in the streams' dtype",
        "mappings",
        {"forward"},
        lambda x, *rest, variant: tuple(
            h.astype(x.dtype) for h in right.mappings(x, *rest, variant=variant)
        ),
        dtype="float16",
    ),
    Bug(
        "the given h_pre ignored",
        "combine_pre",
        {"forward"},
        _forward("combine_pre", lambda *arrays, variant: (arrays[:7], {"variant": variant})),
    ),
    # streams
    Bug(
        "H_res transposed",
        "combine",
        FORWARD,
        _forward("combine", lambda x, y, p, r: ((x, y, p, r.swapaxes(-1, -2)), {})),
    ),
    Bug("mappings of the first token for all", "combine", FORWARD, _first_token_for_all),
    Bug("carry-over between rows", "combine", {"forward"}, _carrying_over),
    Bug("a dead tail", "combine", {"forward"}, _no_tail),
    Bug("only eight streams", "aggregate", {"forward"}, _eight_streams),
    Bug("no launch without tokens", "combine", {"forward"}, _no_empty_launch),
    Bug("inputs written over", "aggregate", {*FORWARD, "repeated"}, _written_over),
    Bug("strides ignored", "aggregate", {"strided"}, _strideless),
    Bug("not twice the same", "aggregate", {"repeated"}, _different_every_time),
    Bug(
        "a sum in bfloat16",
        "contract",
        {"forward"},
        lambda x, *, how: (
            np.add.reduce(x, axis=-2, dtype=x.dtype) / (x.shape[-2] if how == "mean" else 1)
        ),
        dtype="bfloat16",
    ),
]


@pytest.fixture
def records(plugins: Plugins) -> Iterator[Callable[..., dict[str, Record]]]:
    """Run every check of one op on NumPy's backend with a bug in it, or without one."""

    def run(op: str, dtype: str, functions: dict[str, Any], seed: int = 0) -> dict[str, Record]:
        fields = {field: getattr(SPEC, field) for field in ("array_types", "dtypes", "without")}
        plugins.backend("broken", functions, automatic=False, **fields)
        kinds = KINDS if dtype == "float32" else KINDS[:2]
        return {kind: check(Subject("broken"), op, dtype, kind, seed) for kind in kinds}

    yield run
    data.cache_clear()  # one of the bugs writes into it


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_bug_fails_the_right_checks(bug: Bug, records: Any) -> None:
    found = records(bug.op, bug.dtype, bug.functions())
    assert {kind for kind, record in found.items() if not record.passed} == bug.fails


@pytest.mark.parametrize(
    ("op", "dtype"), sorted({(bug.op, bug.dtype) for bug in BUGS}), ids=lambda word: word
)
def test_the_same_backend_without_a_bug_passes(op: str, dtype: str, records: Any) -> None:
    found = records(op, dtype, Bug("none", op, set()).functions())
    assert [record.detail for record in found.values() if not record.passed] == []


def test_a_failure_says_what_where_how_much_and_how_to_see_it_again(records: Any) -> None:
    bug = BUGS[0]
    record = records(bug.op, "float32", bug.functions(), seed=3)["gradient"]
    assert (record.op, record.dtype, record.kind, record.seed) == (
        "combine",
        "float32",
        "gradient",
        3,
    )
    assert record.error > 1 > record.tolerance
    says = (
        r"^combine gradient float32 on broken: d h_post of .*\(leading .*, n=\d+, C=\d+\) "
        r"is off by ([\d.e+-]+), allowed ([\d.e+-]+)\. "
        r"Again: mhc conformance broken --op combine --dtype float32 --kind gradient --seed 3$"
    )
    match = re.match(says, record.detail)
    assert match, record.detail
    assert float(match[1]) == pytest.approx(record.error, rel=1e-2)
    assert float(match[2]) == pytest.approx(record.tolerance, rel=1e-2)


# --- what a backend declares ----------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_capability_declared_but_not_there(plugins: Plugins, transform: str) -> None:
    without = {name: "not tried" for name in TRANSFORMS if name not in (transform, "grad")}
    plugins.backend("mine", _functions(), array_types=SPEC.array_types, without=without)
    subject = Subject("mine")
    assert ("aggregate", "float32", transform) in grid(subject)
    record = check(subject, "aggregate", "float32", transform)
    assert not record.passed
    assert f"declares '{transform}' (it is not in BackendSpec.without)" in record.detail


def test_a_capability_left_out_is_skipped_with_its_reason(plugins: Plugins) -> None:
    without = {"grad": "no autodiff", "vmap": "no batching"}
    plugins.backend("mine", _functions(), array_types=SPEC.array_types, without=without)
    subject = Subject("mine")
    assert applies(subject, "aggregate", "float32", "grad") == "no autodiff"
    assert applies(subject, "aggregate", "float32", "vmap") == "no batching"
    assert applies(subject, "aggregate", "float32", "compile") is None
    assert {kind for _, _, kind in grid(subject)} == {*CHECKS} - {"grad", "vmap", "checkpoint"}


def test_ops_and_dtypes_left_out_are_not_tried(plugins: Plugins) -> None:
    fields = {"array_types": SPEC.array_types, "without": SPEC.without, "sizes": (2, 4)}
    plugins.backend("mine", _functions(), ops=("aggregate",), **fields)
    assert {(op, dtype) for op, dtype, _ in grid(Subject("mine"))} == {("aggregate", "float32")}
    assert check(Subject("mine"), "aggregate", "float32", "forward").passed


def test_an_op_declared_but_not_there(plugins: Plugins) -> None:
    hosts = {name: getattr(right, name) for name in ("from_host", "to_host")}
    plugins.backend("mine", hosts, array_types=SPEC.array_types, without=SPEC.without)
    record = check(Subject("mine"), "aggregate", "float32", "forward")
    assert not record.passed
    assert "has no function 'aggregate'" in record.detail


# --- somebody else's backend, from a folder of its own --------------------------------------------

PLUGIN = """
from mhc_backends.numpy.ops import *
from mhc_backends.numpy import ops
from mhc_core.backend import BackendSpec
from mhc_core.hookspecs import hookimpl

aggregate = ops.aggregate
combine = ops.combine
from_host, to_host = ops.from_host, ops.to_host


def vjp(op, primals, cotangents, **static):
    first, *rest = ops.vjp(op, primals, cotangents, **static)
    return (-first if op == "combine" else first, *rest)


@hookimpl
def mhc_backend_specs():
    why = "mine has no autodiff"
    return [
        BackendSpec(
            name="mine",
            module="mine",
            array_types=("numpy.ndarray",),
            ops=("aggregate", "combine"),
            without=dict.fromkeys(("grad", "compile", "vmap", "checkpoint"), why),
        )
    ]
"""

SUITE = """
from mhc_conformance import BackendConformance

class TestMine(BackendConformance):
    backend = "mine"
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., Any]:
    """Install a plugin in a folder of its own, and run commands there."""
    about = tmp_path / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mhc_core.backends]\nmine = mine\n")
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "test_mine.py").write_text(SUITE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}

    def run(*command: str) -> Any:
        options: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run(command, check=False, **options)
        return SimpleNamespace(code=result.returncode, text=result.stdout + result.stderr)

    return run


def _pytest(*options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-v", *options)


def test_two_lines_run_the_suite_on_a_plugin(elsewhere: Callable[..., Any]) -> None:
    result = elsewhere(*_pytest("-k", "aggregate"))
    assert result.code == 0, result.text
    for kind in KINDS:
        assert f"TestMine::test_{kind}[aggregate-float32] PASSED" in result.text
    assert "5 passed, 4 skipped" in result.text
    assert result.text.count("mine has no autodiff") >= 1
    assert "combine" not in result.text.replace("deselected", "")


def test_a_wrong_sign_in_a_plugin_fails_and_is_seen_again(elsewhere: Callable[..., Any]) -> None:
    result = elsewhere(*_pytest("-k", "combine and (forward or gradient)"))
    assert result.code == 1, result.text
    assert "test_forward[combine-float32] PASSED" in result.text
    assert "test_gradient[combine-float32] FAILED" in result.text
    match = re.search(
        r"combine gradient float32 on mine: d x of .* Again: (mhc .*)$", result.text, re.M
    )
    assert match, result.text
    command, *options = shlex.split(match[1])
    again = elsewhere(str(Path(sys.executable).with_name(command)), *options)
    assert again.code == 1, again.text
    assert "combine gradient float32 on mine: d x of " in again.text.replace("\n", " ")
