"""Plugins that bring backends, and every way in which one can be broken."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pytest

import mhc_core as mhc
from mhc_core import discovery, dispatch, selection
from mhc_core.backend import API_VERSION, BackendSpec
from mhc_core.hookspecs import hookimpl
from mhc_core.math import OPS
from mhc_core.mixer import Mixer

if TYPE_CHECKING:
    from conftest import FakeArray, Plugins

Break = Callable[["Plugins"], None]
ZEROS = numpy.zeros((2, 2), numpy.float32)


def test_a_plugin_brings_a_backend(plugins: Plugins, fake: type[FakeArray]) -> None:
    plugins.backend("mine")
    assert mhc.backends()["mine"].available
    assert mhc.sinkhorn(fake(2, 2)) == "mine"
    assert mhc.vjp("sinkhorn", (fake(2, 2),), fake(2, 2)) == "mine"


def test_one_plugin_may_bring_several(plugins: Plugins, fake: type[FakeArray]) -> None:
    plugins.plugin("mine", [plugins.spec("one"), plugins.spec("two", priority=1)])
    assert mhc.sinkhorn(fake(2, 2)) == "two"
    assert mhc.sinkhorn(fake(2, 2), backend="one") == "one"


def test_a_plugin_may_bring_none(plugins: Plugins) -> None:
    plugins.plugin("mine", lambda: None)
    assert "mine" not in mhc.backends()


def _no_module(plugins: Plugins) -> None:
    plugins.point("mine", "no_such_module")


def _no_attribute(plugins: Plugins) -> None:
    plugins.point("mine", "sys:no_such_attribute")


def _no_hook(plugins: Plugins) -> None:
    plugins.plugin("mine")


def _raising(plugins: Plugins) -> None:
    def specs() -> Any:
        raise OSError("no driver")

    plugins.plugin("mine", specs)


def _no_list(plugins: Plugins) -> None:
    plugins.plugin("mine", lambda: 3)


def _no_spec(plugins: Plugins) -> None:
    plugins.plugin("mine", ["sinkhorn"])


def _bad_spec(plugins: Plugins) -> None:
    plugins.plugin("mine", lambda: [plugins.spec("mine", dtypes=("float8",))])


def _other_version(plugins: Plugins) -> None:
    plugins.plugin("mine", [plugins.spec("mine", api_version=API_VERSION + 1)])


def _taken_name(plugins: Plugins) -> None:
    plugins.plugin("mine", [plugins.spec("good"), plugins.spec("numpy")])


def _one_name_twice(plugins: Plugins) -> None:
    plugins.plugin("mine", [plugins.spec("twin"), plugins.spec("twin")])


def _wrong_arguments(plugins: Plugins) -> None:
    @hookimpl
    def mhc_select(call: Any) -> None: ...

    plugins.module("plugin_wrong_arguments", mhc_select=mhc_select)
    plugins.point("mine", "plugin_wrong_arguments")


def _leaving(plugins: Plugins) -> None:
    def specs() -> Any:
        sys.exit("needs a licence")

    plugins.plugin("mine", specs)


def _skipping(plugins: Plugins) -> None:
    """Raise as ``pytest.importorskip`` does at a module's top: an error that is no Exception."""
    plugins.plugin("mine", lambda: pytest.skip("no driver"))


def _speechless(plugins: Plugins) -> None:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise ValueError

    def specs() -> Any:
        raise SpeechlessError

    plugins.plugin("mine", specs)


def _asking(plugins: Plugins) -> None:
    plugins.plugin("mine", lambda: [plugins.spec("good"), *mhc.backends()])


MEAN: Any = {
    "name": "mean",
    "logits": lambda n: 1,
    "forward": lambda logits, n: logits,
    "vjp": lambda logits, g, n: logits,
    "init": lambda n: [0.0],
}


def _mixing(plugins: Plugins, *makes: Callable[[], Any]) -> None:
    plugins.mixers("mine", lambda: [make() for make in makes])


def _no_mixer(plugins: Plugins) -> None:
    _mixing(plugins, lambda: "sinkhorn")


def _taken_mixer(plugins: Plugins) -> None:
    _mixing(plugins, lambda: Mixer(**{**MEAN, "name": "sinkhorn"}))


def _one_mixer_twice(plugins: Plugins) -> None:
    _mixing(plugins, lambda: Mixer(**MEAN), lambda: Mixer(**MEAN))


def _bad_mixer(plugins: Plugins) -> None:
    _mixing(plugins, lambda: Mixer(**{**MEAN, "vjp": None}))


BROKEN: list[tuple[Break, str]] = [
    (_no_mixer, "TypeError: mhc_mixers gave 'sinkhorn'; needs mhc_core.mixer.Mixer"),
    (_taken_mixer, "ValueError: mixer 'sinkhorn' is already there"),
    (_one_mixer_twice, "ValueError: mixer 'mean' is already there"),
    (_bad_mixer, "TypeError: Mixer: forward is <function"),
    (_no_module, "ModuleNotFoundError: No module named 'no_such_module'"),
    (_no_attribute, "AttributeError: module 'sys' has no attribute 'no_such_attribute'"),
    (_no_hook, "TypeError: it implements none of mhc_backend_specs, mhc_mixers, mhc_select"),
    (_raising, "OSError: no driver"),
    (_no_list, "TypeError: 'int' object is not iterable"),
    (_no_spec, "TypeError: mhc_backend_specs gave 'sinkhorn'; needs mhc_core.backend.BackendSpec"),
    (_bad_spec, "TypeError: BackendSpec: dtypes is ('float8',); needs names out of ('float32', "),
    (
        _other_version,
        f"ValueError: backend 'mine' was written for version {API_VERSION + 1} of the backend "
        f"contract; this mhc-core has version {API_VERSION}",
    ),
    (_taken_name, "ValueError: backend 'numpy' is already there, from mhc_backends.numpy.ops"),
    (_one_name_twice, "ValueError: backend 'twin' is already there, from ops_of_twin"),
    (_leaving, "SystemExit: needs a licence"),
    (_skipping, "Skipped: no driver"),
    (_speechless, "SpeechlessError: (a message that cannot be read)"),
    (_asking, "RuntimeError: a plugin asks for backends while they are being discovered"),
    (_wrong_arguments, "PluginValidationError: Plugin 'mine' for hook 'mhc_select'"),
]


def test_a_mixer_of_a_plugin_is_there_and_its_mistakes_are_its_own(plugins: Plugins) -> None:
    mean, wrong = Mixer(**MEAN), Mixer(**{**MEAN, "name": "wrong", "logits": lambda n: n / 2})
    plugins.mixers("mine", lambda: [mean, wrong])
    assert mhc.mixers()["mean"] is mean
    assert mhc.Variant(mixer="mean").columns(4) == 9
    with pytest.raises(ValueError, match=r"no mixer is named 'meen'; the nearest is 'mean'; known"):
        mhc.Variant(mixer="meen")
    x, phi = numpy.zeros((2, 3)), numpy.zeros((5, 6))
    with pytest.raises(TypeError, match=r"mixer 'wrong' is broken: its logits gave 1.0 for n=2"):
        mhc.mappings(x, phi, numpy.ones(3), numpy.zeros(5), mhc.Variant(mixer="wrong"))


def test_a_backend_is_refused_for_a_mixer_that_it_does_not_take(plugins: Plugins) -> None:
    fields: Any = {"dtypes": ("float64",), "ops": OPS, "priority": 9}
    plugins.backend("mine", array_types=("numpy.ndarray",), **fields)
    variant = mhc.Variant(mixer="identity")
    arrays = (numpy.zeros((2, 3)), numpy.zeros((4, 6)), numpy.ones(2), numpy.zeros(4))
    assert mhc.mappings(*arrays, variant)[2] is None  # the next backend answers
    assert mhc.combine(arrays[0], arrays[0][0], arrays[2], None).shape == (2, 3)
    for call in (
        lambda: mhc.mappings(*arrays, variant, backend="mine"),
        lambda: mhc.combine(arrays[0], arrays[0][0], arrays[2], None, backend="mine"),
    ):
        with pytest.raises(mhc.UnsupportedError, match="has no mixer 'identity'"):
            call()
    rooted = mhc.Variant(norm_root_eps=1e-8)
    wide = (arrays[0], numpy.zeros((8, 6)), numpy.ones(3), numpy.zeros(8))
    with pytest.raises(mhc.UnsupportedError, match="does not know a variant's norm_root_eps"):
        mhc.mappings(*wide, rooted, backend="mine")


@pytest.mark.parametrize(("make", "says"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_plugin_is_named_and_breaks_nothing(
    plugins: Plugins, make: Break, says: str
) -> None:
    make(plugins)
    plugins.backend("healthy")
    known = mhc.backends()
    assert list(known)[-1] == "mine"
    assert not known["mine"].available
    assert known["mine"].spec is None
    assert f"plugin 'mine' is broken: {says}" in (known["mine"].reason or "")
    assert all(known[name].available for name in ("numpy", "jax", "mlx-compiled", "healthy"))
    assert not {"good", "twin"} & set(known)
    assert mhc.sinkhorn(ZEROS).shape == (2, 2)
    for error, name in ((mhc.BackendUnavailableError, "mine"), (mhc.UnknownBackendError, "mime")):
        with pytest.raises(error) as caught:
            mhc.sinkhorn(ZEROS, backend=name)
        assert says in str(caught.value)


def test_broken_plugins_are_named_where_nobody_takes_an_array(
    plugins: Plugins, fake: type[FakeArray]
) -> None:
    _no_module(plugins)
    with pytest.raises(TypeError, match=r"no backend takes; .* No module named 'no_such_module'"):
        mhc.sinkhorn(fake(2, 2))


def test_two_plugins_of_one_name_are_both_taken_in(plugins: Plugins) -> None:
    plugins.plugin("numpy", [plugins.spec("first")])
    plugins.plugin("numpy", [plugins.spec("first")])
    known = mhc.backends()
    assert known["numpy"].available
    assert known["first"].available
    (other,) = [name for name in known if name.startswith("numpy (")]
    assert "backend 'first' is already there" in (known[other].reason or "")


def test_an_older_distribution_that_names_built_ins_changes_nothing(plugins: Plugins) -> None:
    before = list(mhc.backends())
    for name, value in (
        ("numpy", "mhc_backends.numpy"),
        ("again", "mhc_backends.numpy"),
        ("mlx-metal", "mhc_backends.mlx_metal:HOOKS"),
        ("gone", "mhc_backends.gone"),
    ):
        plugins.point(name, value)
    assert list(mhc.backends()) == before
    assert all(problem is None for _, problem in discovery.plugins())


def test_one_module_counts_once_whoever_names_it(plugins: Plugins) -> None:
    plugins.plugin("mine", [plugins.spec("mine")])
    plugins.point("again", plugins._points[-1].value)
    assert mhc.backends()["mine"].available
    assert "again" not in mhc.backends()


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (lambda: open("/no/driver"), "raised FileNotFoundError: [Errno 2] No such file or "),  # noqa: SIM115
        (lambda: sys.exit("needs a licence"), "raised SystemExit: needs a licence"),
        (lambda: True, "gave True; needs None or the reason"),
    ],
)
def test_a_missing_that_goes_wrong_is_a_reason(
    plugins: Plugins, fake: type[FakeArray], missing: Any, says: str
) -> None:
    plugins.backend("mine", missing=missing, priority=9)
    plugins.backend("healthy")
    assert (mhc.backends()["mine"].reason or "").startswith(f"missing() {says}")
    assert mhc.sinkhorn(fake(2, 2)) == "healthy"
    with pytest.raises(mhc.BackendUnavailableError, match=re.escape(says)):
        mhc.sinkhorn(fake(2, 2), backend="mine")


def test_a_plugin_that_leaves_the_program_at_import(plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "plugin_that_leaves.py").write_text("raise SystemExit(3)")
    plugins._monkeypatch.syspath_prepend(str(tmp_path))
    plugins.point("mine", "plugin_that_leaves")
    assert mhc.backends()["mine"].reason == "plugin 'mine' is broken: SystemExit: 3"
    assert mhc.backends()["numpy"].available


def test_ctrl_c_is_nobodys_fault(plugins: Plugins) -> None:
    def specs() -> Any:
        raise KeyboardInterrupt

    plugins.plugin("mine", specs)
    with pytest.raises(KeyboardInterrupt):
        mhc.backends()
    assert discovery._discovered is None  # nothing half found is kept


def test_missing_is_asked_once(plugins: Plugins, fake: type[FakeArray]) -> None:
    asked: list[int] = []

    def missing() -> str:
        asked.append(1)
        return ""

    plugins.backend("mine", missing=missing)
    assert mhc.backends()["mine"].available  # an empty reason is none
    mhc.sinkhorn(fake(2, 2))
    mhc.sinkhorn(fake(3, 3), backend="mine")
    assert asked == [1]


def test_specs_are_asked_for_once(plugins: Plugins, fake: type[FakeArray]) -> None:
    asked: list[int] = []
    spec = plugins.spec("mine")

    def specs() -> list[BackendSpec]:
        asked.append(1)
        return [spec]

    plugins.plugin("mine", specs)
    for _ in range(2):
        mhc.backends()
        mhc.sinkhorn(fake(2, 2))
    assert asked == [1]


@pytest.mark.parametrize("value", ["mine", "other, mine", " mine ,jax"])
def test_plugins_can_be_disabled(
    plugins: Plugins, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    plugins.point("mine", "no_such_module")
    monkeypatch.setenv("MHC_DISABLE_PLUGINS", value)
    known = mhc.backends()
    assert "mine" not in known
    assert ("jax" in known) == ("jax" not in value)
    assert "numpy" in known


# --- where nothing is installed ---------------------------------------------------------------

ROOT = Path(discovery.__file__).parent.parent
SHOW = """
import numpy, mhc_core as mhc
from mhc_core import discovery
print(mhc.sinkhorn(numpy.zeros((2, 2))).tolist(), *mhc.backends())
print([name for name, one in mhc.backends().items() if one.spec is None])
"""


def _folder(package: str) -> Path:
    return Path(importlib.import_module(package).__file__ or "").parent


@pytest.mark.parametrize("older", [False, True], ids=["no metadata", "an older distribution"])
def test_built_ins_need_no_metadata(tmp_path: Path, older: bool) -> None:
    """Check a process that sees the three packages and the libraries, no distribution of ours."""
    for name in ("mhc_core", "mhc_backends", "numpy", "pluggy", "array_api_compat"):
        (tmp_path / name).symlink_to(_folder(name))
    beside = _folder("numpy").with_name("numpy.libs")
    if beside.exists():  # what NumPy's wheel for Linux brings
        (tmp_path / beside.name).symlink_to(beside)
    if older:
        info = tmp_path / "mhc_core-0.0.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mhc-core\nVersion: 0.0.9\n")
        lines = ("numpy = mhc_backends.numpy", "old = mhc_backends.old", "jax = mhc_backends.jax")
        (info / "entry_points.txt").write_text("\n".join(["[mhc_core.backends]", *lines]) + "\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{SHOW}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    sums, broken = done.stdout.splitlines()
    names = ("numpy", "jax", "mlx-compiled", "mlx-cuda", "mlx-metal")
    assert sums.startswith("[[0.5, 0.5], [0.5, 0.5]] ")
    assert set(names) <= set(sums.split())
    assert broken == "[]"
    assert done.stderr == ""


# --- the ops module ---------------------------------------------------------------------------


def test_an_ops_module_that_cannot_be_imported(plugins: Plugins, fake: type[FakeArray]) -> None:
    spec = replace(plugins.spec("mine"), module="no_such_module")
    plugins.plugin("mine", [spec])
    with pytest.raises(mhc.BackendUnavailableError, match="'mine' cannot run here: ModuleNotFound"):
        mhc.sinkhorn(fake(2, 2))


def test_an_ops_module_that_cannot_be_imported_leaves_the_call_to_the_next(
    plugins: Plugins, fake: type[FakeArray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ops_that_leave.py").write_text("raise SystemExit(3)")
    plugins._monkeypatch.syspath_prepend(str(tmp_path))
    plugins.plugin("mine", [replace(plugins.spec("mine", priority=9), module="ops_that_leave")])
    plugins.backend("healthy")
    for size in (2, 3):
        assert mhc.sinkhorn(fake(size, size)) == "healthy"
    (told,) = [record.message for record in caplog.records]
    assert told == ("backend 'mine' cannot run here: SystemExit: 3; its calls go to 'healthy'")
    assert mhc.backends()["mine"].reason == "SystemExit: 3"
    with pytest.raises(mhc.BackendUnavailableError, match="'mine' cannot run here: SystemExit: 3"):
        mhc.sinkhorn(fake(2, 2), backend="mine")


@pytest.mark.parametrize("lacks", ["sinkhorn", "vjp"])
def test_an_ops_module_without_what_it_declares(
    plugins: Plugins, fake: type[FakeArray], lacks: str
) -> None:
    plugins.backend("mine", {"vjp" if lacks == "sinkhorn" else "sinkhorn": lambda *_, **__: 0})
    calls = {
        "sinkhorn": lambda: mhc.sinkhorn(fake(2, 2)),
        "vjp": lambda: mhc.vjp("sinkhorn", (fake(2, 2),), fake(2, 2)),
    }
    with pytest.raises(mhc.UnsupportedError, match=f"ops_of_mine has no function '{lacks}'"):
        calls[lacks]()


def test_the_module_of_an_array_types_backend_is_imported_ahead_of_dispatch(
    plugins: Plugins, fake: type[FakeArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that it can tell a compiler to leave dispatch alone; other modules stay unimported."""
    monkeypatch.setattr(dispatch, "_PREPARED", set())
    imported: list[str] = []

    def importing(spec: BackendSpec) -> Any:
        imported.append(spec.name)
        return importlib.import_module(spec.module)

    monkeypatch.setattr(dispatch, "backend_module", importing)
    plugins.backend("absent", priority=4, missing=lambda: "no driver")
    plugins.backend("shy", priority=3, automatic=False)
    plugins.backend("best", priority=2)
    plugins.backend("second", priority=1)
    for _ in range(2):
        dispatch.prepare(fake)
        dispatch.prepare(int)
    assert imported == ["best"]


def test_one_backend_more_is_known_for_a_while(plugins: Plugins, fake: type[FakeArray]) -> None:
    plugins.backend("mine")
    spec = plugins.spec("guest", priority=9)
    with selection.registered(spec):
        assert mhc.sinkhorn(fake(2, 2)) == "guest"
        with (
            pytest.raises(ValueError, match="'mine' is already there"),
            selection.registered(plugins.spec("mine")),
        ):
            pass
    assert "guest" not in mhc.backends()
    assert mhc.sinkhorn(fake(2, 2)) == "mine"


# --- the hook that chooses --------------------------------------------------------------------


def test_mhc_select_is_asked_once_per_kind_of_call(plugins: Plugins, fake: type[FakeArray]) -> None:
    asked: list[tuple[str, list[str]]] = []

    def select(op: str, candidates: Any) -> str:
        asked.append((op, [spec.name for spec in candidates]))
        return "second"

    plugins.backend("first", priority=2)
    plugins.backend("second", priority=1)
    plugins.backend("narrow", priority=3, sizes=(5, 6))
    plugins.backend("shy", automatic=False)
    plugins.plugin("chooser", select=select)
    for size in (2, 2, 3):
        assert mhc.sinkhorn(fake(size, size)) == "second"
        assert mhc.sinkhorn(fake(7, size, size), iterations=3) == "second"
    assert asked == [("sinkhorn", ["first", "second"])] * 2  # n = 2 and n = 3
    mhc.expand(fake(4), 2)
    mhc.vjp("sinkhorn", (fake(2, 2),), fake(2, 2))
    assert [op for op, _ in asked[2:]] == ["expand", "sinkhorn"]


def test_mhc_select_is_not_asked_where_somebody_chose(
    plugins: Plugins, fake: type[FakeArray]
) -> None:
    def select(op: str, candidates: Any) -> str:
        raise AssertionError((op, candidates))

    plugins.backend("mine")
    plugins.plugin("chooser", select=select)
    assert mhc.sinkhorn(fake(2, 2), backend="mine") == "mine"
    with mhc.use_backend("mine"):
        assert mhc.sinkhorn(fake(2, 2)) == "mine"


def test_mhc_select_may_leave_it_to_others(plugins: Plugins, fake: type[FakeArray]) -> None:
    plugins.backend("first", priority=2)
    plugins.backend("second")
    plugins.plugin("undecided", select=lambda op, candidates: None)
    assert mhc.sinkhorn(fake(2, 2)) == "first"
    plugins.plugin("decided", select=lambda op, candidates: "second")
    assert mhc.sinkhorn(fake(2, 2)) == "second"


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit("no")])
def test_a_raising_mhc_select_is_named_and_asked_no_more(
    plugins: Plugins,
    fake: type[FakeArray],
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[str] = []

    def select(op: str, candidates: Any) -> str:
        asked.append(op)
        raise error

    plugins.backend("first", priority=2)
    plugins.backend("second")
    plugins.plugin("decided", select=lambda op, candidates: "second")
    plugins.plugin("chooser", select=select)  # the last that came is asked first
    for size in (2, 3):
        assert mhc.sinkhorn(fake(size, size)) == "second"
    assert asked == ["sinkhorn"]
    says = f"plugin 'chooser' is broken: its mhc_select raised {type(error).__name__}: no"
    assert [record.message for record in caplog.records] == [says]
    assert {p.name: problem for p, problem in discovery.plugins()}["chooser"] == says


@pytest.mark.parametrize("answer", ["secnd", "numpy", 3])
def test_a_wrong_answer_of_mhc_select_is_reported(
    plugins: Plugins, fake: type[FakeArray], answer: Any
) -> None:
    plugins.backend("first", priority=2)
    plugins.backend("second")
    plugins.plugin("chooser", select=lambda op, candidates: answer)
    with pytest.raises(mhc.UnknownBackendError) as caught:
        mhc.sinkhorn(fake(2, 2))
    assert str(caught.value) == (
        f"sinkhorn: mhc_select of plugin 'chooser' answered {answer!r}; needs one of first, second"
    )


# --- the declaration --------------------------------------------------------------------------

FINE: dict[str, Any] = {"name": "a", "module": "a.ops", "array_types": ("a.B",), "ops": ("pre",)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", None),
        ("module", 3),
        ("array_types", "a.B"),
        ("array_types", ("B",)),
        ("ops", ["pre"]),
        ("ops", ("",)),
        ("dtypes", ("float8",)),
        ("sizes", (0, 4)),
        ("sizes", (4, 2)),
        ("sizes", (4,)),
        ("sizes", [1, 4]),
        ("sizes", (1, 4.0)),
        ("priority", "high"),
        ("priority", True),
        ("automatic", 1),
        ("neutral", "yes"),
        ("without", {"gard": "no autodiff"}),
        ("without", {"grad": ""}),
        ("without", ("grad",)),
        ("missing", "no driver"),
        ("device", "gpu"),
        ("disabled_by", ""),
        ("disabled_by", True),
    ],
)
def test_a_wrong_spec_is_refused_when_it_is_made(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^BackendSpec: {field} is .*; needs "):
        BackendSpec(**{**FINE, field: value})


@pytest.mark.parametrize(
    ("sizes", "n", "reason"),
    [
        ((1, None), 1000, None),
        ((2, None), 1, "takes n from 2 on, not 1"),
        ((2, 8), 8, None),
        ((2, 8), 9, "takes n from 2 to 8, not 9"),
        ((2, 8), None, None),
    ],
)
def test_sizes_are_refused_in_words(sizes: Any, n: int | None, reason: str | None) -> None:
    spec = BackendSpec(**FINE, sizes=sizes)
    assert spec.refuses("pre", ("float32",), n) == reason
