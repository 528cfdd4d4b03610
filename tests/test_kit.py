"""The conformance kit itself: each bug that it is there to catch, put into a right backend."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

import mhc_core
from mhc_backends.numpy import SPEC
from mhc_backends.numpy import ops as right
from mhc_conformance import CHECKS, Subject, applies, check, grid, skips
from mhc_conformance.bugs import BUGS, Bug, Outcome, present, run_bug
from mhc_conformance.bugs import right as right_forward_of
from mhc_conformance.bugs.transforms import dropping_saved
from mhc_conformance.cases import SIZES, SMALL, TOKENS, Case, cases, dealt
from mhc_conformance.generated import MUTANTS, get, paths, published
from mhc_conformance.telling import quick
from mhc_conformance.trials import trials
from mhc_core import math
from mhc_core.backend import DTYPES, TRANSFORMS
from mhc_core.cli import app

if TYPE_CHECKING:
    from conftest import Plugins

KINDS = ("forward", "gradient", "strided", "repeated", "host", "updated", "properties")  # of NumPy

# Each bug that shipped in this field, as this project's design lists them. The kit names each.
FIELD = """
RMS over C instead of nC; columns of phi in the wrong order; missing transpose of comb;
exp where softmax + eps belongs; eps missing on H_pre; eps differing between forward and backward;
no max shift: overflow above 88; Sinkhorn run in bfloat16; Sinkhorn run in float16;
an extra normalising pass; fused kernel right only for one C; a tail that is dead code;
carry-over between rows: odd tokens wrong from T=1024 on; T=0 launch;
inf or NaN gradient at real gradient scale, not at random init;
zero gradient of H_res at a common init; a norm weight ignored under no-grad;
stale cache after loading weights; batched matrices normalised on the wrong axes;
float() on arrays inside compile; gradients dropped for captured arrays;
unsupported n silently wrong; an unrolled loop reading past n, where n is no multiple of 8;
tiles assuming C divisible by the threadgroup;
a tree reduction that double-counts when the threadgroup is no power of two;
a float4 load through a half pointer; shared memory reused without a barrier;
more than 32 KiB of threadgroup memory at n=64; a tail under #if on a template argument;
a Sinkhorn backward that uses the final matrix for every iteration;
NaN gradients from where(s > eps, 1/s, ...) at s = 0;
division gradients overflowing on unshifted exp
"""


# --- bugs -------------------------------------------------------------------------------------


@functools.cache
def outcome(name: str) -> Outcome:
    return run_bug(BUGS[name])


def test_every_bug_that_shipped_is_there() -> None:
    listed = {" ".join(what.split()) for what in FIELD.split(";")}
    assert {bug.what for bug in BUGS.values() if bug.shipped} == listed


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_fails_the_named_checks_and_no_other(name: str) -> None:
    found = outcome(name)
    assert found.reason == ""
    assert found.problem == ""
    failed = {record.kind for record in found.failed}
    assert found.bug.fails[0] == found.failed[0].kind
    assert set(found.bug.fails) <= failed < {record.kind for record in found.records}


@pytest.mark.parametrize("name", BUGS)
def test_its_message_says_what_where_how_much_and_how_to_see_it_again(name: str) -> None:
    bug, record = BUGS[name], outcome(name).failed[0]
    again = (
        f"mhc conformance bug:{name} --op {bug.op} --dtype {bug.dtype} --kind {bug.fails[0]} "
        "--seed 0"
    )
    says = (
        rf"{bug.op} {bug.fails[0]} {bug.dtype} on bug:{name}: (.+) \(leading .+, n=\d+, C=\d+\)"
        r"(?:, (?:second values|every second number|(?:all|number \d+) from an odd number on))?"
        r" (?:is off by (\S+), allowed (\S+)|is .*; needs .*|has .*; needs .*"
        rf"|raised \w+: .*|differs .*|changed .*)\. Reproduce: {again}"
    )
    match = re.fullmatch(says, record.detail)
    assert match, record.detail
    if match[2]:
        assert float(match[2]) == pytest.approx(record.error, rel=1e-2, nan_ok=True)
        assert float(match[3]) == pytest.approx(record.tolerance, rel=1e-2)
        assert not record.error <= record.tolerance


@pytest.mark.parametrize(
    ("library", "op", "dtype"),
    sorted({(bug.library, bug.op, bug.dtype) for bug in BUGS.values()}),
    ids=lambda word: word,
)
def test_the_same_backend_without_a_bug_passes(library: str, op: str, dtype: str) -> None:
    subject = Subject(library)
    kinds = [kind for one, d, kind in grid(subject) if (one, d) == (op, dtype)]
    found = [check(subject, op, dtype, kind) for kind in kinds]
    assert [record.detail for record in found if not record.passed] == []


def test_one_command_prints_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    import mhc_conformance.bugs

    # what the other tests ask for too runs once
    monkeypatch.setattr(mhc_conformance.bugs, "run_bug", lambda bug, seed: outcome(bug.name))
    result = CliRunner().invoke(app, ["conformance", "--mutations"])
    assert result.exit_code == 0, result.output
    flat = " ".join(result.output.replace("│", " ").split())
    for bug in BUGS.values():
        assert bug.name in flat
    assert f"{len(BUGS)} caught, 0 missed, 0 skipped (seed 0" in flat
    proved = sum(bool(mutant.proof) for mutant in MUTANTS.values())
    counts = f"{len(MUTANTS) - proved} caught, 0 missed, {proved} equivalent"
    assert f"{len(MUTANTS)} made, {counts} (seed 0" in flat
    for mutant in MUTANTS.values():
        assert not mutant.proof or mutant.proof in flat


def test_a_bug_that_the_kit_misses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Bug(name="none", what="no bug", op="expand", fails=("forward",), says="x of")
    found = hunt_in(monkeypatch, harmless)
    assert found.exit_code == 1
    assert "MISSED none: fails nothing; should fail forward" in found.output
    assert "0 caught, 1 missed, 0 skipped" in found.output


def test_a_bug_in_a_library_that_is_not_here_is_skipped(
    monkeypatch: pytest.MonkeyPatch, plugins: Plugins
) -> None:
    plugins.backend("absent", missing=lambda: "absent is not installed")
    away = Bug(name="away", what="?", op="expand", fails=("grad",), says="", library="absent")
    found = hunt_in(monkeypatch, away)
    assert found.exit_code == 0
    assert "0 caught, 0 missed, 1 skipped" in found.output
    assert "skipped: bug:away is in absent: absent is not" in found.output


def hunt_in(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> Any:
    import mhc_conformance.bugs
    import mhc_conformance.generated

    monkeypatch.setattr(mhc_conformance.bugs, "BUGS", {bug.name: bug})
    monkeypatch.setattr(mhc_conformance.generated, "MUTANTS", {})
    return CliRunner().invoke(app, ["conformance", "--mutations"])


def test_a_mutant_that_the_kit_misses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import mhc_conformance.bugs
    import mhc_conformance.generated

    one = next(mutant for mutant in MUTANTS.values() if mutant.half == "forward")

    def right_forward(op: str, *arrays: Any, **static: Any) -> Any:
        return right_forward_of(op)(*arrays, **static)

    right_one = dataclasses.replace(one, wrong=right_forward)
    monkeypatch.setattr(mhc_conformance.bugs, "BUGS", {})
    monkeypatch.setattr(mhc_conformance.generated, "MUTANTS", {right_one.name: right_one})
    found = CliRunner().invoke(app, ["conformance", "--mutations"])
    assert found.exit_code == 1
    assert f"MISSED {right_one.name}: passes the whole kit" in found.output
    assert "1 made, 0 caught, 1 missed, 0 equivalent" in found.output


def test_every_declared_argument_has_mutants_of_both_halves() -> None:
    made = {(mutant.op, mutant.argument, mutant.half) for mutant in MUTANTS.values()}
    for op in math.OPS:
        declared = math.load(op).OP
        named = {".".join(path) for path in paths(op)} | set(declared.arrays)
        assert {(op, name, half) for name in named for half in ("forward", "vjp")} <= made


@pytest.mark.parametrize("op", [op for op in math.OPS if math.load(op).OP.static])
def test_in_some_case_all_numbers_differ(op: str) -> None:
    """Check numbers against each other and the published ones: none may stand for another."""
    numbers = [path for path in paths(op) if type(published(op, path)[0]) in (int, float)]

    def apart(static: dict[str, Any]) -> bool:
        values = [get(static, path) for path in numbers]
        new = all(get(static, path) not in published(op, path) for path in numbers)
        return new and len(set(values)) == len(values)

    found = [case for dtype in DTYPES for case in cases(op, dtype) if apart(case.options)]
    assert found, op
    most = max(case.iterations for case in cases(op))
    assert most == 0 or most > 100  # 0 where there is no Sinkhorn


def _values(case: Case) -> list[tuple[str, Any]]:
    """Return the value of each static argument of a case, and of each field of a variant."""
    return [(".".join(path), get(case.options, path)) for path in paths(case.op) if path[1:]] + [
        (name, value) for name, value in case.static if name != "variant"
    ]


def _choices(case: Case) -> list[tuple[str, Any]]:
    """Return what is chosen by a case's values: of numbers, whether one is 0, 1 or another."""
    return [
        (name, value if isinstance(value, (str, bool)) or value in (0, 1, None) else type(value))
        for name, value in _values(case)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_dealt_out_still_have_every_size_and_choice(dtype: str) -> None:
    every = {op: list(cases(op, dtype)) for op in math.OPS}
    some = {op: list(dealt(op, dtype)) for op in math.OPS}
    own = {sizes[:3] for sizes in (*SIZES, *(sizes for sizes, *_ in TOKENS))}
    for of in (lambda case: {case.sizes[:3]} & own, _choices):
        there = {one for found in some.values() for case in found for one in of(case)}
        assert there == {one for found in every.values() for case in found for one in of(case)}
    if dtype == "float32":
        assert sum(map(len, some.values())) < 0.7 * sum(map(len, every.values()))
    for op in math.OPS:
        assert some[op][0] == every[op][0]
        for name in ("shared", "optional", "unmixed", "narrow"):
            small = [case for case in every[op] if case.sizes == SMALL and not case.for_all]
            assert {case for case in small if getattr(case, name)} <= set(some[op])


@pytest.mark.parametrize(
    ("name", "deals"), [("numpy", False), ("jax", True), ("mlx-compiled", True)]
)
def test_only_neutral_backends_that_compile_get_a_share_of_the_cases(
    name: str, deals: bool
) -> None:
    assert Subject(name).deals == deals
    assert not Subject(name, full=True).deals
    count = sum(1 for _ in trials(Subject(name), "combine_pre", "float32", 0))
    assert (count < sum(1 for _ in cases("combine_pre"))) == deals


def test_a_mutants_backend_is_run_by_its_name() -> None:
    name = "head-forward-variant.norm_eps-pre_eps-s-value"
    command = ["conformance", f"bug:{name}", "--op", "head", "--kind", "forward", "--jobs", "1"]
    result = CliRunner().invoke(app, [*command, "--dtype", "float32"])
    assert result.exit_code == 1
    assert f"FAILED head forward float32 on bug:{name}" in result.output


def test_a_first_check_tries_every_op() -> None:
    result = CliRunner().invoke(app, ["conformance", "--quick", "numpy", "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert f"{2 * len(math.OPS)} passed, 0 failed, 0 skipped" in result.output
    both = CliRunner().invoke(app, ["conformance", "--quick", "--full"])
    assert both.exit_code == 2


def test_a_bugs_backend_is_there_while_it_is_wanted() -> None:
    before = dict(mhc_core.backends())
    with present("numpy", "bug:wrong-sign"):
        assert set(mhc_core.backends()) == {*before, "bug:wrong-sign"}
        assert not Subject("bug:wrong-sign").spec.automatic
    assert mhc_core.backends() == before
    with pytest.raises(mhc_core.UnknownBackendError, match="the nearest is bug:wrong-sign"):
        Subject(present("bug:wrongsign").__enter__())


def test_a_message_is_followed_to_the_same_failure() -> None:
    detail = outcome("carry-over").message
    command = shlex.split(detail.partition(" Reproduce: ")[2])
    result = CliRunner().invoke(app, [*command[1:], "--jobs", "1"])
    assert result.exit_code == 1
    assert f"FAILED {detail}" in result.output


# --- what a backend declares ----------------------------------------------------------------------


def _functions() -> dict[str, Any]:
    """Return NumPy's ops module as a dict."""
    return {name: getattr(right, name) for name in (*math.OPS, "vjp", "from_host", "to_host")}


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
    tried = {kind for op, _, kind in grid(subject) if op == "aggregate"}
    assert tried == {*CHECKS} - {"grad", "vmap", "checkpoint", "second"}
    found = {(skip.kind, skip.reason) for skip in skips(subject) if skip.op == "aggregate"}
    assert {("grad", "no autodiff"), ("vmap", "no batching")} < found
    assert ("checkpoint", "no autodiff") in found


# --- second derivatives -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jax", "mlx-compiled"])
def test_second_derivatives_are_not_left_out(backend: str) -> None:
    assert "second" not in mhc_core.backends()[backend].spec.without  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("raises", "problem"),
    [
        ("pre: no second derivatives here; take backend='mlx-compiled'", ""),
        ("pre: kernels cannot", ""),  # the declared reason
        ("kernels cannot", "needs the op's name and the declared reason"),
        ("pre: no", "needs the op's name and the declared reason"),
        ("", "gave numbers, where mine has no second derivatives, and wrong ones"),
    ],
)
def test_second_derivatives_left_out_are_refused(
    plugins: Plugins, raises: str, problem: str
) -> None:
    from mhc_backends.mlx_compiled import SPEC as MLX
    from mhc_backends.mlx_compiled import ops

    def refusing(function: Callable[..., Any], argnums: Any) -> Callable[..., Any]:
        def gradients(*arrays: Any) -> Any:
            if raises and depth:
                raise NotImplementedError(raises)
            depth.append(1)
            try:
                return ops.grad(function, argnums)(*arrays)
            finally:
                depth.pop()

        return gradients

    depth: list[int] = []
    functions = {name: getattr(ops, name) for name in ("vjp", "from_host", "to_host")}
    functions |= {"pre": dropping_saved, "grad": refusing}
    plugins.backend(
        "mine",
        functions,
        ops=("pre",),
        array_types=MLX.array_types,
        without={"second": "kernels cannot", "compile": "no", "vmap": "no", "checkpoint": "no"},
    )
    assert applies(Subject("mine"), "pre", "float32", "second") is None
    record = check(Subject("mine"), "pre", "float32", "second")
    assert record.passed == (not problem), record.detail
    assert problem in record.detail


def test_ops_dtypes_and_sizes_left_out_are_skipped_and_counted(plugins: Plugins) -> None:
    fields = {"array_types": SPEC.array_types, "without": SPEC.without, "sizes": (2, 4)}
    plugins.backend("mine", _functions(), ops=("aggregate",), **fields)
    subject = Subject("mine")
    assert {(op, dtype) for op, dtype, _ in grid(subject)} == {("aggregate", "float32")}
    assert check(subject, "aggregate", "float32", "forward").passed
    found = {(s.op, s.dtype, s.kind): s.reason for s in skips(subject)}
    assert found["combine", "float32", "forward"] == "mine has no combine"
    assert found["aggregate", "float64", "gradient"] == "mine has no float64"
    assert found["all", "all", "n=64"] == "takes n from 2 to 4, not 64"
    whole = len(math.OPS) * (2 * len(DTYPES) + len(CHECKS) - 2)
    every_n = [skip for skip in skips(subject) if skip.op == "all"]
    assert len(list(grid(subject))) + len(list(skips(subject))) - len(every_n) == whole


def test_a_backend_whose_sizes_no_case_has_does_not_pass(plugins: Plugins) -> None:
    fields = {"array_types": SPEC.array_types, "without": SPEC.without, "sizes": (1000, None)}
    plugins.backend("mine", _functions(), **fields)
    record = check(Subject("mine"), "aggregate", "float32", "forward")
    assert not record.passed
    assert "has no case" in record.detail


def test_an_op_declared_but_not_there(plugins: Plugins) -> None:
    hosts = {name: getattr(right, name) for name in ("from_host", "to_host")}
    plugins.backend("mine", hosts, array_types=SPEC.array_types, without=SPEC.without)
    record = check(Subject("mine"), "aggregate", "float32", "forward")
    assert not record.passed
    assert "has no function 'aggregate'" in record.detail


# --- somebody else's backend, from a folder of its own --------------------------------------------

PLUGIN = """
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
    result = elsewhere(*_pytest("-k", "[aggregate-"))
    assert result.code == 0, result.text
    for kind in KINDS:
        assert f"TestMine::test_{kind}[aggregate-float32] PASSED" in result.text
    # all kinds but the transforms and second derivatives; then those, and three dtypes forward
    # and gradient
    assert "7 passed, 11 skipped" in result.text
    assert "mine has no autodiff" in result.text
    assert "mine has no bfloat16" in result.text


def test_a_wrong_sign_in_a_plugin_fails_and_is_seen_again(elsewhere: Callable[..., Any]) -> None:
    result = elsewhere(*_pytest("-k", "[combine- and (forward or gradient)"))
    assert result.code == 1, result.text
    assert "test_forward[combine-float32] PASSED" in result.text
    assert "test_gradient[combine-float32] FAILED" in result.text
    match = re.search(
        r"combine gradient float32 on mine: d x of .* Reproduce: (mhc .*)$", result.text, re.M
    )
    assert match, result.text
    command, *options = shlex.split(match[1])
    again = elsewhere(str(Path(sys.executable).with_name(command)), *options)
    assert again.code == 1, again.text
    assert "combine gradient float32 on mine: d x of " in again.text.replace("\n", " ")


@pytest.mark.parametrize("op", math.OPS)
def test_the_quick_case_is_within_a_backend_s_streams(op: str) -> None:
    """Check kernels too: expand's first case had more streams than any kernel takes."""
    assert quick(op, 32).sizes.n <= 32
    assert quick(op, 1).sizes.n == 1
